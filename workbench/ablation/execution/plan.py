"""The plan: the studies of an ablation, their slots, and the step from tuning to confirmation.

Whoever holds the plan's lock may advance it; advancing twice changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from workbench.ablation.arms import Arm, resolve
from workbench.ablation.execution.roster import Roster
from workbench.ablation.execution.storage import ATTEMPTS, open_storage
from workbench.ablation.execution.studies import (
    add_earlier_trials,
    enqueue,
    fail_orphaned_trials,
    fail_stale_trials,
    is_open,
    num_started,
    retry,
    slots,
    status_of,
)
from workbench.ablation.execution.timing import DEFAULT_TIMING, Timing
from workbench.ablation.folder import AblationFolder, Choice
from workbench.ablation.search.optimum import Setting, best, gather, interpolate, leading
from workbench.ablation.search.samplers import make_pruner, make_sampler
from workbench.ablation.verdict.measurements import looks_taken, take_look
from workbench.ablation.verdict.sequential import decided, seeds_needed_now
from workbench.config import ConfigError, hash_of
from workbench.results.store import RunFolder
from workbench.status import LOST, RETRYABLE, Stage, Status
from workbench.training.config import describe_run

__all__ = ["Plan"]


class Plan:
    """The work of one ablation.

    One Optuna study for each arm and stage. Tuning slots exist from the start; slots of repeats are added when the
    arm's trials have ended, and those of confirmation when its tuning has: of a sequential design up to its next look.

    Args:
        folder: the launched ablation.
        timing: time limits.

    Raises:
        ConfigError: if the studies' database does not answer.
    """

    def __init__(self, folder: AblationFolder, timing: Timing = DEFAULT_TIMING):
        self.folder, self.timing = folder, timing
        self.record = folder.record()
        self.config = self.record.config
        self.arms = resolve(self.config, self.record.solved, self.record.weights)
        self.storage = open_storage(folder.path, self.config.launch.heartbeat, self.config.launch.storage)

    def study_name(self, arm: str, stage: Stage) -> str:
        """Name of an arm's study: ``arm/stage``; prefixed by name and key of the launch if the database is shared."""
        key = self.record.storage_key
        return "/".join((*((self.record.name, key) if key else ()), arm, stage))

    def study(self, arm: str, stage: Stage) -> optuna.Study:
        """The study of one arm and stage, created if missing."""
        study = optuna.create_study(
            storage=self.storage, study_name=self.study_name(arm, stage), load_if_exists=True, direction="minimize"
        )
        if stage == Stage.TUNING:
            study.pruner = make_pruner(self.config.tuning, self.arms[arm].run().training.evaluations)
            study.sampler = make_sampler(self.config.tuning, num_started(study))
        else:
            study.pruner = optuna.pruners.NopPruner()
        return study

    def advance(self, relaunch: bool = False) -> None:
        """Bring the plan up to date. Call it with the plan's lock held.

        Args:
            relaunch: the user launched the ablation (again): retry what was interrupted, crashed or killed.
        """
        if relaunch:
            self._restore_records()
        any_open = self._advance_arms(relaunch)
        while not any_open and take_look(self.folder, self.record):
            any_open = self._advance_arms(relaunch=False)
        self.folder.mark_finished(not any_open)

    def _advance_arms(self, relaunch: bool) -> bool:
        """Bring every arm up to the next look, or to its last seed. Returns whether a trial is open."""
        any_open = False
        taken = looks_taken(self.folder)
        needed, stopped = seeds_needed_now(self.config, taken), decided(taken)
        for name, arm in self.arms.items():
            choice = self.folder.choices().get(name)
            is_chosen = choice is not None and choice.failed is None
            may_retry = relaunch and not (is_chosen and self._is_final(name))
            if not self._is_tuned(name, arm, may_retry):
                any_open = True
                self.folder.choose(name, None)
                continue
            if not is_chosen:
                choice = self._choose(name)
                self._check_sealed(name, choice)
                self.folder.choose(name, choice)
            if choice is None or choice.failed is not None:
                continue
            confirmation = self.study(name, Stage.CONFIRMATION)
            seeds = self.config.planned_seeds[: needed[name]]
            self._fill(
                confirmation,
                [({}, {"seed": seed}) for seed in seeds],
                relaunch and name not in stopped,
                once=self._run_again,
            )
            any_open |= _any_open(confirmation)
        return any_open

    def _is_final(self, name: str) -> bool:
        """Whether a trial that is tried again would come too late: the arm is confirmed, or may be at any moment."""
        return self._is_confirmed(name) or bool(Roster(self.folder).live_workers())

    def _is_tuned(self, name: str, arm: Arm, relaunch: bool) -> bool:
        """Bring an arm's trials, and then the repeats of the best, up to date; whether all have ended.

        Trials are final as soon as the first repeat is planned: another trial might change which settings are repeated.
        """
        tuning, repeats = self.study(name, Stage.TUNING), self.config.tuning.repeats
        repeated = self.study(name, Stage.REPEAT) if repeats else None
        add_earlier_trials(tuning, self.record.warm_start.get(name, []), arm.space)
        points = self._restore_drawn(name, tuning, arm.points)
        self._fill(tuning, [(point, {}) for point in points], relaunch and not (repeated and slots(repeated)))
        if _any_open(tuning):
            return False
        if repeats is None or repeated is None:
            return True
        settings = leading(self._settings(name), repeats.settings, self.config.tuning.seed)
        wanted = [(dict(setting.hyperparameters), seed) for setting in settings for seed in repeats.seeds]
        self._fill(repeated, [(params, {"seed": seed}) for params, seed in wanted], relaunch)
        return not _any_open(repeated)

    def _settings(self, name: str) -> list[Setting]:
        """What an arm's trials and repeats have measured on the selection split."""
        found = []
        for stage in (Stage.TUNING, Stage.REPEAT) if self.config.tuning.repeats else (Stage.TUNING,):
            for trials in slots(self.study(name, stage)).values():
                trial = trials[-1]
                if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                    value = trial.values[0] if trial.state == TrialState.COMPLETE else math.inf
                    seed = trial.user_attrs.get("seed", self.config.tuning.seed)
                    found.append((trial.params, seed, value, trial.user_attrs.get("run")))
        return gather(found)

    def _restore_drawn(self, arm: str, study: optuna.Study, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``points``, with settings that a sampler drew before its study was lost, read from their runs."""
        lost = {slot for slot, point in enumerate(points) if not point} - set(slots(study))
        if not lost:
            return points
        restored = list(points)
        for run in self.folder.run_folders(Stage.TUNING):
            record = run.record()
            if record.arm == arm and record.slot in lost:
                restored[record.slot] = record.hyperparameters
        return restored

    def _is_damaged(self, trial: FrozenTrial) -> bool:
        """Whether a trial is done and its run can no longer be read; it then resumes from its last checkpoint."""
        name = trial.user_attrs.get("run")
        if name is None or trial.state != TrialState.COMPLETE or trial.user_attrs.get("status") != Status.DONE:
            return False
        run = self.folder.run(name)
        if damage := run.damage():
            run.discard_result(damage)
        return bool(damage)

    def _restore_records(self) -> None:
        """Write run.json again where it was lost: the studies hold all that it is made of."""
        for arm in self.arms:
            for stage in Stage:
                if stage == Stage.REPEAT and self.config.tuning.repeats is None:
                    continue
                for trial in self.study(arm, stage).get_trials(deepcopy=False):
                    attributes = trial.user_attrs
                    path = self.folder.runs_path / attributes.get("run", "")
                    if "run" in attributes and path.is_dir() and not RunFolder(path).exists():
                        seed = attributes.get("seed", self.config.tuning.seed)
                        params = json.loads(attributes.get("hyperparameters", "null")) or trial.params
                        self.create_run(arm, stage, seed, params, slot=attributes.get("slot"))

    @property
    def _run_again(self) -> tuple[Status, ...]:
        """How a confirmation run may end to be run again once."""
        return (*RETRYABLE, *([Status.DIVERGED] if self.config.protocol.rerun_diverged else []))

    def _fill(
        self,
        study: optuna.Study,
        wanted: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
        relaunch: bool,
        once: tuple[Status, ...] = (),
    ) -> None:
        """Add missing slots, and retry those that ended without a result where that is due; those that ended as one of
        ``once`` a first time."""
        fail_orphaned_trials(study, self.storage, self.timing.first_heartbeat)
        by_slot = slots(study)
        for slot, (params, attributes) in enumerate(wanted):
            if slot not in by_slot:
                enqueue(study, slot, params, **attributes)
            elif _is_retried(by_slot[slot], relaunch, once) or (relaunch and self._is_damaged(by_slot[slot][-1])):
                trial = by_slot[slot][-1]
                if "run" in trial.user_attrs:
                    self.folder.run(trial.user_attrs["run"]).reopen((*RETRYABLE, *once))
                retry(study, trial)

    def _choose(self, name: str) -> Choice:
        """The arm's setting, chosen on the selection split."""
        tuning, arm = self.config.tuning, self.arms[name]
        latest = [trials[-1] for trials in slots(self.study(name, Stage.TUNING)).values()]
        if not latest:  # nothing was to be tuned
            return Choice(run=None, hyperparameters={})
        done = sum(trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0]) for trial in latest)
        if not done:
            statuses = ", ".join(sorted(trial.user_attrs.get("status", Status.KILLED) for trial in latest))
            return Choice(failed=f"every tuning trial failed ({statuses})")
        settings = self._settings(name)
        chosen = best(settings, tuning.seeds)
        if chosen is None:
            return Choice(failed=f"none of its best settings finished on all of the tuning seeds {list(tuning.seeds)}")
        counts: dict[str, Any] = {"done": done, "trials": len(latest), "seeds": len(tuning.seeds)}
        optimum = interpolate(settings, arm.space, chosen) if tuning.interpolate else None
        if optimum is not None and self._is_valid(name, optimum[0]):
            hyperparameters, value = optimum
            return Choice(hyperparameters=hyperparameters, selection_value=value, interpolated=True, **counts)
        value = chosen.mean(tuning.seeds)
        return Choice(run=chosen.run, hyperparameters=dict(chosen.hyperparameters), selection_value=value, **counts)

    def _is_valid(self, name: str, hyperparameters: Mapping[str, Any]) -> bool:
        try:
            self.arms.check_setting(name, hyperparameters)
        except ConfigError:
            return False
        return True

    def _is_confirmed(self, arm: str) -> bool:
        """Whether a confirmation run of the arm was created."""
        return any(run.record().arm == arm for run in self.folder.run_folders(Stage.CONFIRMATION))

    def _check_sealed(self, arm: str, choice: Choice) -> None:
        """Raise ConfigError if the arm was confirmed with another setting: the report split is opened once."""
        for run in self.folder.run_folders(Stage.CONFIRMATION):
            record = run.record()
            if record.arm == arm and choice.failed is None and record.hyperparameters != choice.hyperparameters:
                raise ConfigError.at(
                    f"arms.{arm}",
                    got=f"another setting than the one it was confirmed with, {record.hyperparameters}",
                    expected="one opening of the report split per arm",
                    do="Restore selection.json: the setting was chosen once, on the selection split. A confirmation of "
                    "another setting takes an ablation with new seeds, and new documents where there are any.",
                )

    # -- taking work ---------------------------------------------------------------------------------------------

    def next_study(self) -> tuple[str, Stage, optuna.Study] | None:
        """Arm, stage and study of the next trial: trials before repeats before confirmations, the least advanced arm
        first. None if no trial is waiting."""
        waiting = []
        for stage_number, stage in enumerate(Stage):
            if stage == Stage.REPEAT and self.config.tuning.repeats is None:
                continue
            for arm_number, arm in enumerate(self.arms):
                study = self.study(arm, stage)
                fail_stale_trials(study)
                if any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
                    waiting.append((stage_number, num_started(study), arm_number, arm, stage, study))
        if not waiting:
            return None
        *_, arm, stage, study = min(waiting, key=lambda entry: entry[:3])
        return arm, stage, study

    def hyperparameters_of(self, arm: str) -> dict[str, Any]:
        """The setting that an arm is confirmed with."""
        return self.folder.choices()[arm].hyperparameters

    def create_run(
        self, arm: str, stage: Stage, seed: int, hyperparameters: Mapping[str, Any], slot: int | None = None
    ) -> RunFolder:
        """The folder of a run, created if missing. Its name holds the configuration's identity, so one configuration
        has one folder, however often it is requested.

        Raises:
            ConfigError: if the setting makes no valid run, or one that is off the budget.
        """
        self.arms.check_setting(arm, hyperparameters)
        config = self.arms[arm].run(seed, hyperparameters)
        record = describe_run(
            config,
            self.record.data[arm],
            arm=arm,
            stage=stage,
            hyperparameters=dict(hyperparameters),
            solved=self.arms[arm].solved,
            split=self.config.confirmation.split,
            ablation=self.record.name,
            launch=self.record.launch,
            arm_identity=self.arms[arm].run().setting,
            difference=config.diff(self.arms.baseline.run(seed)),
            slot=slot,
        )
        return RunFolder.create(self.folder.runs_path / run_name(stage, arm, config.identity, seed), record)


def run_name(stage: Stage, arm: str, identity: str, seed: int) -> str:
    """Name of a run's folder, at most 140 bytes: different for different arms, configurations and seeds."""
    slug = "".join(c if c.isalnum() or c in ".+-" else "_" for c in arm)
    slug += "" if slug == arm else f".{hash_of(arm)[:8]}"  # `a b` and `a_b` are two arms
    return f"{stage}-{slug}-{identity}-seed{seed}"


def _any_open(study: optuna.Study) -> bool:
    """Whether a slot of the study is waiting or running."""
    return any(is_open(trials[-1]) for trials in slots(study).values())


def _is_retried(trials: list[FrozenTrial], relaunch: bool, once: tuple[Status, ...]) -> bool:
    """Whether a slot gets another trial.

    Args:
        trials: of the slot, oldest first.
        relaunch: whether the user launched the ablation again.
        once: statuses after which it is tried once more.
    """
    if is_open(trials[-1]):
        return False
    status = status_of(trials[-1])
    if status in once and sum(status_of(trial) in once for trial in trials) == 1:
        return True
    if status in LOST and not relaunch:  # a trial's process died, its worker did not
        return sum(trial.user_attrs.get("status", Status.KILLED) in LOST for trial in trials) < ATTEMPTS
    return status == Status.INTERRUPTED or (relaunch and status in (*LOST, *RETRYABLE))
