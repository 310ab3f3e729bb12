"""Optuna's part: storage, what a sampler draws, and the studies of one ablation.

A study's trials are *slots*: every trial that the ablation needs is enqueued beforehand and carries its slot number, so
the number of trials is a total, however many workers there are and however often it is started.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from workbench.ablation.run import AblationRun
from workbench.ablation.spec.tuning import SMOOTHING, Tuning, contains
from workbench.config import ConfigError
from workbench.contract import Range

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are tracebacks of trials that ended, which runs tell

NEVER_BEGUN = 30.0
"""Seconds within which a worker that took a trial has given its first sign of life."""
ATTEMPTS = 3
"""Times a trial whose process or worker died, or that hung, is taken up before it counts as killed."""


def open_storage(folder: Path, heartbeat: float, url: str | None = None) -> RDBStorage:
    """The studies' database, with heartbeat and retry.

    Without ``url`` SQLite in the ablation's folder: write-ahead log, a minute of patience.

    Raises:
        ConfigError: when the database does not answer, or its driver is not installed.
    """
    interval = max(1, round(heartbeat))
    if url is None:
        path = folder / "study.db"
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        engine: dict[str, Any] = {"connect_args": {"timeout": 60}}
        url = f"sqlite:///{path}"
    else:  # connections that the server has dropped meanwhile are opened again
        engine = {"pool_pre_ping": True, "pool_size": 2}
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        with experimental_on_purpose():
            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=interval,
                grace_period=3 * interval,
                # a resumed trial reports its evaluations again, from the run's own file
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(
                    ATTEMPTS, inherit_intermediate_values=False
                ),
            )
    except (ImportError, OperationalError) as error:
        if url.startswith("sqlite"):
            raise
        raise ConfigError.at(
            "launch.storage",
            got=str(error).splitlines()[0],
            expected="a database that answers",
            do="Its driver: pip install 'workbench[postgresql]'.",
        ) from None


def set_aside_damaged(folder: Path) -> None:
    """Move a study.db that is no whole database out of the way. Runs know their settings: the studies are made anew from them.

    Call it with the plan's lock held and no worker at work.
    """
    path = folder / "study.db"
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            whole = connection.execute("PRAGMA quick_check").fetchone()[0] == "ok"
            held = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        whole = whole and (not held or "studies" in held)
    except sqlite3.DatabaseError:
        whole = False
    if not whole:
        for part in folder.glob("study.db*"):
            part.rename(folder / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{part.name}")


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


def fail_never_begun(study: optuna.Study, storage: RDBStorage) -> None:
    """Give up trials whose worker was killed between taking them and its first sign of life: Optuna, which looks for signs that
    have grown old, would let them run for ever. A worker that is only slow finds its trial taken over. Call with the plan's lock
    held.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not running:
        return
    with storage.engine.connect() as connection:
        alive = {trial for (trial,) in connection.execute(text("SELECT trial_id FROM trial_heartbeats"))}
    for trial in running:
        assert trial.datetime_start
        age = (datetime.datetime.now() - trial.datetime_start).total_seconds()
        if trial._trial_id not in alive and abs(age) > NEVER_BEGUN:
            study.tell(trial.number, state=TrialState.FAIL)


def distribution(choice: Range) -> optuna.distributions.BaseDistribution:
    """``choice`` in Optuna's words."""
    if choice.values:
        return optuna.distributions.CategoricalDistribution(list(choice.values))
    assert choice.low is not None and choice.high is not None
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return optuna.distributions.IntDistribution(choice.low, choice.high, log=choice.log)
    return optuna.distributions.FloatDistribution(choice.low, choice.high, log=choice.log)


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


def begun(study: optuna.Study) -> int:
    """Trials that no longer wait. Those still waiting stand in the study from the start."""
    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def sampler(tuning: Tuning, trials_so_far: int) -> optuna.samplers.BaseSampler:
    """The sampler for the next trial; reseeded by count, so that workers do not draw the same point.

    Settings that are fixed before launch are enqueued; only those of a sampler that learns are drawn by it, after the first
    trials, which all arms share.
    """
    seed, first = (tuning.sampler_seed + 7919 * trials_so_far) % 2**32, tuning.shared
    with experimental_on_purpose():
        if tuning.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=first)
        if tuning.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=first, warn_independent_sampling=False)
        if tuning.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=first, warn_independent_sampling=False)
        if tuning.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, first))
        if tuning.sampler == "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=max(2, first))
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(tuning: Tuning, evaluations: int) -> optuna.pruners.BasePruner:
    """The pruner of one arm's search. Trials report once an evaluation, so it compares at equal tokens."""
    if tuning.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=tuning.shared, n_warmup_steps=SMOOTHING)
    if tuning.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=SMOOTHING, max_resource=evaluations)
    return optuna.pruners.NopPruner()


INFEASIBLE = "infeasible"
"""The constraint of a setting that cannot be trained: 1 where it is violated, -1 where it is met."""


def earlier_trials(folder: str, arm: str, space: Mapping[str, Range]) -> list[dict[str, Any]]:
    """Finished tuning trials of ``arm`` in an earlier ablation that lie in ``space``: parameters and selection value."""
    import polars as pl

    rows = (
        AblationRun(folder)
        .runs()
        .filter((pl.col("arm") == arm) & (pl.col("stage") == "tuning") & (pl.col("status") == "done"))
    )
    found = []
    for row in rows.sort("run").iter_rows(named=True):
        params = json.loads(row["hyperparameters"])
        if set(params) == set(space) and all(contains(space[name], value) for name, value in params.items()):
            found.append({"params": params, "value": row["selection_value"], "run": f"{folder}/runs/{row['run']}"})
    return found


def add_earlier(study: optuna.Study, trials: Sequence[dict[str, Any]], space: Mapping[str, Range]) -> None:
    """Enter earlier trials into a study that has none yet, for its sampler to learn from. They have no slot."""
    there = {trial.user_attrs.get("warm_start") for trial in study.get_trials(deepcopy=False)}
    for trial in trials:
        if trial["run"] not in there:
            distributions = {name: distribution(choice) for name, choice in space.items()}
            frozen = optuna.create_trial(
                params=trial["params"],
                distributions=distributions,
                value=trial["value"],
                user_attrs={"warm_start": trial["run"]},
            )
            frozen.set_constraint(INFEASIBLE, -1.0)
            study.add_trial(frozen)


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
