"""What is still to do: the studies of an ablation, their slots, and the step from tuning to confirmation.

Everybody who holds the plan's lock may advance it; advancing twice changes nothing.
"""

from __future__ import annotations

import json
import math
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from workbench.ablation.execution.studies import (
    ATTEMPTS,
    add_earlier,
    begun,
    enqueue,
    fail_never_begun,
    fail_stale_trials,
    is_open,
    open_storage,
    pruner,
    retry,
    sampler,
    slots,
)
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results.store import RunFolder
from workbench.status import LOST, RETRYABLE, Stage
from workbench.training.config import RunConfig, describe_run

TUNING, CONFIRMATION = Stage.TUNING, Stage.CONFIRMATION


class Plan:
    """The work of one ablation.

    One Optuna study for each arm and stage. Tuning slots exist from the start; confirmation slots appear when the
    arm's tuning has ended.
    """

    def __init__(self, run: AblationRun):
        self.run = run
        self.config = AblationConfig.parse(run.about["config"])
        self._points = {arm: self.config.points(arm) for arm in self.config.order}
        self.storage = open_storage(run.folder, self.config.launch.heartbeat, self.config.launch.storage)

    def study(self, arm: str, stage: str) -> optuna.Study:
        """The study of one arm and stage, made if missing."""
        tuning = self.config.tuning
        objectives = len(tuning.objectives) if stage == TUNING else 1
        study = optuna.create_study(
            storage=self.storage,
            study_name=self.run.study_name(arm, stage),
            load_if_exists=True,
            directions=["minimize"] * objectives,
        )
        if stage == TUNING:
            study.pruner = pruner(tuning, self.config.run(arm, seed=tuning.seed).training.evaluations)
            study.sampler = sampler(tuning, begun(study))
        else:
            study.pruner = optuna.pruners.NopPruner()
        return study

    def advance(self, relaunch: bool = False) -> None:
        """Bring the plan up to date. Call it with the plan's lock held.

        Args:
            relaunch: the user started the ablation (again): take up what was interrupted, crashed or killed.
        """
        open_somewhere = False
        for arm in self.config.order:
            tuning = self.study(arm, TUNING)
            chosen = self.run.selection().get(arm, {"failed": "not chosen yet"})
            settled = "failed" not in chosen  # a tuning trial tried again now would come too late
            add_earlier(tuning, self.run.about.get("warm_start", {}).get(arm, []), self.config.space(arm))
            points = self._remembered(arm, tuning, self._points[arm])
            self._fill(tuning, [(point, {}) for point in points], relaunch and not settled)
            if any(is_open(trials[-1]) for trials in slots(tuning).values()):
                open_somewhere = True
                self._choose(arm, None)
                continue
            if not settled:
                chosen = self._select(tuning)
                self._check_sealed(arm, chosen)
                self._choose(arm, chosen)
            if "failed" in chosen:
                continue
            confirmation = self.study(arm, CONFIRMATION)
            self._fill(confirmation, [({}, {"seed": seed}) for seed in self.config.confirmation.seeds], relaunch)
            open_somewhere |= any(is_open(trials[-1]) for trials in slots(confirmation).values())
        if open_somewhere:
            (self.run.folder / "finished.json").unlink(missing_ok=True)
        elif not self.run.finished:
            write_json(self.run.folder / "finished.json", {"identity": self.run.about["identity"]})

    def _remembered(self, arm: str, study: optuna.Study, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``points``, with settings that a sampler drew before its study was lost: their runs still know them."""
        lost = {slot for slot, point in enumerate(points) if not point} - set(slots(study))
        if lost:
            points = list(points)
            for path in sorted(self.run.folder.glob("runs/tuning-*")):
                about = RunFolder(path).about()
                if about.get("arm") == arm and about.get("slot") in lost:
                    points[about["slot"]] = about["hyperparameters"]
        return points

    def _fill(self, study: optuna.Study, wanted: list[tuple[dict[str, Any], dict[str, Any]]], relaunch: bool) -> None:
        fail_never_begun(study, self.storage)
        there = slots(study)
        for slot, (params, attributes) in enumerate(wanted):
            if slot not in there:
                enqueue(study, slot, params, **attributes)
            elif self._again(there[slot], relaunch):
                trial = there[slot][-1]
                if "run" in trial.user_attrs:
                    RunFolder(self.run.folder / "runs" / trial.user_attrs["run"]).reopen()
                retry(study, trial)

    def _again(self, trials: list[FrozenTrial], relaunch: bool) -> bool:
        """Whether a slot whose latest trial has ended is taken up again."""
        if is_open(trials[-1]):
            return False
        failed = trials[-1].state == TrialState.FAIL
        status = trials[-1].user_attrs.get("status", "killed" if failed else "done")
        if status in LOST and not relaunch:  # a trial's process died, its worker did not
            return sum(trial.user_attrs.get("status", "killed") in LOST for trial in trials) < ATTEMPTS
        return status == "interrupted" or (relaunch and status in (*LOST, *RETRYABLE))

    def _select(self, tuning: optuna.Study) -> dict[str, Any]:
        """The arm's setting, chosen on the selection split."""
        latest = [trials[-1] for trials in slots(tuning).values()]
        done = [trial for trial in latest if trial.state == TrialState.COMPLETE and math.isfinite(trial.values[0])]
        if not latest:  # nothing was to be tuned
            return {"run": None, "hyperparameters": {}}
        if not done:
            states = ", ".join(sorted(trial.user_attrs.get("status", "killed") for trial in latest))
            return {"failed": f"every tuning trial failed ({states})"}
        best = min(done, key=lambda trial: (trial.values[0], trial.number))
        return {
            "run": best.user_attrs["run"],
            "hyperparameters": best.params,
            "selection_value": best.values[0],
            "done": len(done),
            "trials": len(latest),
        }

    def _check_sealed(self, arm: str, chosen: dict[str, Any]) -> None:
        """Raise ConfigError where the arm has been confirmed with another setting: the report split is opened once."""
        for path in sorted(self.run.folder.glob("runs/confirmation-*")):
            about = RunFolder(path).about()
            if (
                about.get("arm") == arm
                and "failed" not in chosen
                and about["hyperparameters"] != chosen["hyperparameters"]
            ):
                raise ConfigError.at(
                    f"arms.{arm}",
                    got=f"another setting than the one it was confirmed with, {about['hyperparameters']}",
                    expected="one opening of the report split for every arm",
                    do="Give the ablation another name (name=...), and other documents to report on.",
                )

    def _choose(self, arm: str, chosen: dict[str, Any] | None) -> None:
        """Write down, or take back, what an arm is confirmed with."""
        held = self.run.selection()
        wanted = {name: value for name, value in {**held, arm: chosen}.items() if value is not None}
        if wanted != held:
            write_json(self.run.folder / "selection.json", wanted)

    # -- taking work ---------------------------------------------------------------------------------------------

    def next_study(self) -> tuple[str, str, optuna.Study] | None:
        """The study whose turn it is among those with a waiting trial: tuning first, the least advanced arm first."""
        waiting = []
        for stage_number, stage in enumerate((TUNING, CONFIRMATION)):
            for position, arm in enumerate(self.config.order):
                study = self.study(arm, stage)
                fail_stale_trials(study)
                trials = study.get_trials(deepcopy=False)
                if any(trial.state == TrialState.WAITING for trial in trials):
                    waiting.append((stage_number, begun(study), position, arm, stage, study))
        if not waiting:
            return None
        *_, arm, stage, study = min(waiting, key=lambda entry: entry[:3])
        return arm, stage, study

    def folder_for(self, arm: str, stage: str, seed: int, hyperparameters: dict[str, Any], **about: Any) -> RunFolder:
        """The run's folder, made if missing. Its name holds the configuration's identity, so one configuration has
        one folder, however often it is asked for.

        Raises:
            ConfigError: where the setting makes no run, or one that is off the budget.
        """
        self.config.check_setting(arm, hyperparameters)
        config: RunConfig = self.config.run(arm, seed=seed, hyperparameters=hyperparameters)
        slug = "".join(c if c.isalnum() or c in ".+-" else "_" for c in arm)
        name = f"{stage}-{slug}-{config.identity[:8]}-seed{seed}"
        base = self.config.run(self.config.order[0], seed=seed)
        about = describe_run(
            config,
            self.run.about["data"][arm],
            arm=arm,
            stage=stage,
            hyperparameters=hyperparameters,
            solved=self.config.solved.get(arm, {}),
            split=self.config.confirmation.split,
            difference=json.loads(json.dumps(config.diff(base))),
            **about,
        )
        return RunFolder.create(self.run.folder / "runs" / name, about)
