"""The Optuna studies of an ablation and their slots.

A *slot* is one trial that the ablation needs. Every slot is enqueued in advance and its trials carry its number, so the
number of trials is a total, however many workers there are and however often the ablation is launched.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import polars as pl
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from workbench import compat
from workbench.ablation.folder import AblationFolder
from workbench.ablation.search.samplers import INFEASIBLE, allow_experimental, distribution
from workbench.ranges import Range
from workbench.status import Stage, Status

__all__ = [
    "add_earlier_trials",
    "earlier_trials",
    "enqueue",
    "fail_orphaned_trials",
    "fail_stale_trials",
    "is_open",
    "num_started",
    "retry",
    "slots",
    "status_of",
]


def slots(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Slot number -> its trials, oldest first."""
    by_slot: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if "slot" in trial.user_attrs:
            by_slot.setdefault(trial.user_attrs["slot"], []).append(trial)
    return by_slot


def enqueue(study: optuna.Study, slot: int, params: Mapping[str, Any], **attributes: Any) -> None:
    """Add the first trial of a slot."""
    study.enqueue_trial(dict(params), user_attrs={"slot": slot, **attributes})


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Add a slot's trial again, with the same parameters; its run resumes from its checkpoint."""
    attributes = {name: value for name, value in trial.user_attrs.items() if name not in ("status", "reason")}
    study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}), user_attrs=attributes)


def is_open(trial: FrozenTrial) -> bool:
    """Whether a trial is waiting or running."""
    return trial.state in (TrialState.WAITING, TrialState.RUNNING)


def status_of(trial: FrozenTrial) -> Status:
    """The status of a trial that has ended; killed if its worker died before it recorded one."""
    default = Status.KILLED if trial.state == TrialState.FAIL else Status.DONE
    return Status(trial.user_attrs.get("status", default))


def num_started(study: optuna.Study) -> int:
    """Trials that are no longer waiting. Waiting ones are in the study from the start."""
    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def fail_stale_trials(study: optuna.Study) -> None:
    """Fail trials whose worker has missed three heartbeats; each comes back as a waiting trial."""
    with allow_experimental():
        optuna.storages.fail_stale_trials(study)


def fail_orphaned_trials(study: optuna.Study, storage: RDBStorage, first_heartbeat: float) -> None:
    """Fail trials whose worker was killed between taking them and its first heartbeat.

    Optuna, which looks for old heartbeats, would leave them running for ever. A worker that is only slow finds its
    trial taken over. Call it with the plan's lock held.

    Args:
        first_heartbeat: seconds within which a worker records its first heartbeat.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not running:
        return
    alive = compat.trials_with_heartbeat(storage)
    for trial in running:
        assert trial.datetime_start
        age = (datetime.datetime.now() - trial.datetime_start).total_seconds()
        if compat.trial_id(trial) not in alive and abs(age) > first_heartbeat:
            study.tell(trial.number, state=TrialState.FAIL)


def earlier_trials(folder: str, arm: str, space: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Finished tuning trials of ``arm`` in an earlier ablation that lie in ``space``: parameters, selection value, run.

    Raises:
        ConfigError: if there is no ablation in ``folder``.
    """
    ablation = AblationFolder(folder)
    ablation.record()
    is_tuned = (pl.col("arm") == arm) & (pl.col("stage") == Stage.TUNING) & (pl.col("status") == Status.DONE)
    trials = []
    for row in ablation.runs().filter(is_tuned).sort("run").iter_rows(named=True):
        params = json.loads(row["hyperparameters"])
        if set(params) == set(space) and all(value in space[name] for name, value in params.items()):
            trials.append({"params": params, "value": row["selection_value"], "run": f"{folder}/runs/{row['run']}"})
    return trials


def add_earlier_trials(study: optuna.Study, trials: Sequence[dict[str, Any]], space: Mapping[str, Range]) -> None:
    """Add trials of earlier ablations to a study, for its sampler to learn from; each once. They have no slot."""
    added = {trial.user_attrs.get("warm_start") for trial in study.get_trials(deepcopy=False)}
    distributions = {name: distribution(choice) for name, choice in space.items()}
    for trial in trials:
        if trial["run"] not in added:
            frozen = optuna.create_trial(
                params=trial["params"],
                distributions=distributions,
                value=trial["value"],
                user_attrs={"warm_start": trial["run"]},
            )
            frozen.set_constraint(INFEASIBLE, -1.0)
            study.add_trial(frozen)
