"""The search for each arm's hyper-parameters, as declared."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, ConfigError, require
from workbench.ranges import Range
from workbench.seeding import Seed

__all__ = ["ADAPTIVE", "SMOOTHING", "Tuning"]

ADAPTIVE = ("tpe", "gp", "cmaes")
"""Samplers that learn from earlier trials; their draws depend on the order in which trials end."""
SMOOTHING = 3
"""Evaluations that are averaged before a trial is compared with others; none is pruned on fewer."""
HELD_EQUAL = ("training.tokens", "training.evaluations")
"""Fields that trials of one arm must share: they are compared at equal tokens."""


class Tuning(Config):
    """The search for each arm's own setting: equal effort for every arm, judged on the selection split."""

    trials: Annotated[int, Field(ge=0, le=100_000)] = 3
    """Trials per arm, in total. 0 uses the base's settings unchanged."""
    sampler: Literal["grid", "random", "qmc", "tpe", "gp", "cmaes"] = "random"
    """How settings are drawn. grid, random and qmc (a scrambled Sobol sequence) draw the same points for every arm, and
    are what published comparisons should use. tpe, gp and cmaes learn from earlier trials, so their curves depend on
    the order."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler, the same for every arm."""
    space: dict[str, Range] = {}
    """Dotted fields of a run and their ranges: {training.learning_rate: {low: 1e-3, high: 1e-2, log: true}}."""
    variants: bool = False
    """Whether each arm's mixers, feed-forwards, embedding and optimiser add their search spaces; ranges in ``space``
    override theirs."""
    startup_trials: Annotated[int, Field(ge=1)] = 4
    """First trials of every arm: the same settings in every arm, never pruned. An adaptive sampler starts after
    them."""
    enqueue: tuple[dict[str, int | float | str | bool], ...] = ()
    """Settings that every arm tries before anything is drawn (known good ones), counted among its trials. Missing
    fields are drawn; fields that an arm does not tune are ignored."""
    warm_start: tuple[str, ...] = ()
    """Folders of earlier ablations whose finished tuning trials an adaptive sampler starts from, arm by arm of the same
    name. They do not count as trials and are never chosen."""
    pruner: Literal["none", "median", "hyperband"] = "none"
    """Stops hopeless trials early, only ever by comparison inside one arm, at equal tokens, after warm-up, on the mean
    of three evaluations."""
    seed: Seed = 1000
    """Seed of every tuning run; not one of the confirmation seeds."""

    def model_post_init(self, _context: Any) -> None:
        for name in self.space:
            self.check_field(name)
        require(
            self.sampler != "cmaes" or importlib.util.find_spec("cmaes") is not None,
            "sampler",
            got="cmaes",
            expected="a sampler whose package is installed",
            do="pip install 'workbench[search]', or use tpe or gp.",
        )
        require(
            not self.warm_start or self.sampler in ADAPTIVE,
            "warm_start",
            got=list(self.warm_start),
            expected=f"nothing: {self.sampler} does not learn",
            do=f"Use one of {', '.join(ADAPTIVE)}.",
        )
        require(
            not self.enqueue or self.sampler != "grid",
            "enqueue",
            got=list(self.enqueue),
            expected="nothing: a grid is its points",
        )
        require(
            len(self.enqueue) <= self.trials,
            "enqueue",
            got=f"{len(self.enqueue)} settings",
            expected=f"at most the {self.trials} trials",
        )

    @staticmethod
    def check_field(name: str) -> None:
        """Raise ConfigError if a field may not be searched."""
        if {"seed", "seeds"} & set(name.split(".")):
            raise ConfigError.at(
                "space",
                got=name,
                expected="hyper-parameters only",
                do="A seed is noise to average over, never a hyper-parameter.",
            )
        if name in HELD_EQUAL:
            raise ConfigError.at(
                "space",
                got=name,
                expected="fields that may differ between trials",
                do="Trials are compared at equal tokens: set it in `base`.",
            )

    @property
    def num_shared(self) -> int:
        """The first trials, whose settings all arms share and which are never pruned."""
        return min(self.trials, max(self.startup_trials, len(self.enqueue)))
