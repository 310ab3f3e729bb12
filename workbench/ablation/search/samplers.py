"""Optuna's samplers and pruners, and ranges as Optuna distributions."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import optuna

from workbench.ablation.spec.tuning import SMOOTHING, Tuning
from workbench.ranges import Range

__all__ = ["INFEASIBLE", "allow_experimental", "distribution", "make_pruner", "make_sampler", "suggest"]

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are tracebacks of trials, which run folders record

INFEASIBLE = "infeasible"
"""The constraint of a setting that cannot be trained: 1 if it is violated, -1 if it is met."""


@contextlib.contextmanager
def allow_experimental() -> Iterator[None]:
    """Silence Optuna's warning about heartbeat and retry, which are marked experimental; they recover killed
    workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def distribution(choice: Range) -> optuna.distributions.BaseDistribution:
    """The Optuna distribution of a range."""
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


def make_sampler(tuning: Tuning, num_started: int) -> optuna.samplers.BaseSampler:
    """The sampler for the next trial, reseeded by the number of trials started so far so that workers draw different
    points.

    Settings that are fixed before launch are enqueued. Only an adaptive sampler draws, after the first trials, which
    all arms share.
    """
    seed, startup = (tuning.sampler_seed + 7919 * num_started) % 2**32, tuning.num_shared
    with allow_experimental():
        if tuning.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        if tuning.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        if tuning.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(tuning: Tuning, num_evaluations: int) -> optuna.pruners.BasePruner:
    """The pruner of one arm's search. Trials report once per evaluation, so it compares at equal tokens."""
    if tuning.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=tuning.num_shared, n_warmup_steps=SMOOTHING)
    if tuning.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=SMOOTHING, max_resource=num_evaluations)
    return optuna.pruners.NopPruner()
