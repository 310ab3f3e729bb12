"""Optuna's part: storage, what a sampler draws, and the studies of one ablation.

A study's trials are *slots*: every trial that the ablation needs is enqueued beforehand and carries its slot number, so
the number of trials is a total, however many workers there are and however often it is started.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from workbench.contract import Range

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are tracebacks of trials that ended, which runs tell

ATTEMPTS = 3
"""Times a trial whose process or worker died is taken up again before it counts as killed."""


def open_storage(folder: Path, heartbeat: float) -> RDBStorage:
    """SQLite in the ablation's folder: write-ahead log, a minute of patience, heartbeat and retry."""
    path = folder / "study.db"
    with sqlite3.connect(path, timeout=60) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    interval = max(1, round(heartbeat))
    with experimental_on_purpose():
        return RDBStorage(
            f"sqlite:///{path}",
            engine_kwargs={"connect_args": {"timeout": 60}},
            heartbeat_interval=interval,
            grace_period=3 * interval,
            # a resumed trial reports its evaluations again, from the run's own file
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(
                ATTEMPTS, inherit_intermediate_values=False
            ),
        )


@contextlib.contextmanager
def experimental_on_purpose() -> Iterator[None]:
    """Heartbeat and retry are marked experimental in Optuna; they are what survives a killed worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def fail_stale_trials(study: optuna.Study) -> None:
    """Give up trials whose worker has missed three heartbeats; each comes back as a waiting trial."""
    with experimental_on_purpose():
        optuna.storages.fail_stale_trials(study)


def suggest(trial: optuna.Trial, name: str, choice: Range) -> Any:
    """A value of ``choice`` for ``trial``."""
    if choice.values:
        return trial.suggest_categorical(name, list(choice.values))
    assert choice.low is not None and choice.high is not None
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return trial.suggest_int(name, choice.low, choice.high, log=choice.log)
    return trial.suggest_float(name, choice.low, choice.high, log=choice.log)


def draw(name: str, choice: Range, count: int, seed: int) -> list[Any]:
    """``count`` random values of one hyper-parameter, a function of (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=key))
    return [suggest(study.ask(), name, choice) for _ in range(count)]


def sampler(kind: str, seed: int, trials_so_far: int) -> optuna.samplers.BaseSampler:
    """The adaptive sampler for the next trial; reseeded by count, so that workers do not draw the same point."""
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed + 7919 * trials_so_far)
    return optuna.samplers.RandomSampler(seed=seed)


def slots(study: optuna.Study) -> dict[int, list[FrozenTrial]]:
    """Slot number -> its trials, oldest first."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if "slot" in trial.user_attrs:
            found.setdefault(trial.user_attrs["slot"], []).append(trial)
    return found


def enqueue(study: optuna.Study, slot: int, params: dict[str, Any], **attributes: Any) -> None:
    """Enter the trial of a slot that nobody has taken yet."""
    study.enqueue_trial(params, user_attrs={"slot": slot, **attributes})


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enter a slot's trial again, with the same parameters; its run goes on from its checkpoint."""
    kept = {k: v for k, v in trial.user_attrs.items() if k not in ("status", "reason")}
    study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}), user_attrs=kept)


def is_open(trial: FrozenTrial) -> bool:
    """Whether a trial still waits or runs."""
    return trial.state in (TrialState.WAITING, TrialState.RUNNING)
