"""The search for each arm's setting: what is declared, and the settings that are fixed before launch."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from workbench.config import Config, ConfigError, nearest
from workbench.contract import Range

ADAPTIVE = ("tpe", "gp", "cmaes", "nsga2", "nsga3")
"""Samplers that look at the trials before; what they draw depends on the order in which trials end."""
SMOOTHING = 3
"""Evaluations that are averaged before a trial is compared with others; none is pruned on fewer."""
HELD_EQUAL = ("training.tokens", "training.evaluations")
"""Fields that trials of one arm must share: they are compared at equal tokens."""


class Tuning(Config):
    """The search for each arm's own setting: equal effort for every arm, judged on the selection split."""

    trials: Annotated[int, Field(ge=0, le=100_000)] = 3
    """Trials an arm, in total. 0 takes the base's settings as they are."""
    sampler: Literal["grid", "random", "qmc", "tpe", "gp", "cmaes", "nsga2", "nsga3"] = "random"
    """How settings are drawn. grid, random and qmc (a scrambled Sobol sequence) draw the same points for every arm, and are
    what published comparisons should use. The others learn from earlier trials, so their curves depend on the order."""
    sampler_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler, the same for every arm."""
    space: dict[str, Range] = {}
    """Dotted fields of a run and their ranges: {training.learning_rate: {low: 1e-3, high: 1e-2, log: true}}."""
    variants: bool = False
    """Whether each arm's variants add their own search spaces; ranges in ``space`` override theirs."""
    first: Annotated[int, Field(ge=1)] = 4
    """First trials of every arm: the same settings in every arm, never pruned. A sampler that learns begins after them."""
    enqueue: tuple[dict[str, int | float | str | bool], ...] = ()
    """Settings that every arm tries before anything is drawn (known good ones), counted among its trials. Fields left out are
    drawn; fields that an arm does not tune are passed over."""
    warm_start: tuple[str, ...] = ()
    """Folders of earlier ablations whose finished tuning trials a learning sampler starts from, arm by arm of the same name.
    They do not count as trials and are never chosen."""
    objectives: tuple[Literal["selection", "parameters", "active_parameters", "flops", "cache_bytes"], ...] = (
        "selection",
    )
    """What the sampler makes small: the value on the selection split first, then costs of the model. The setting that is
    confirmed is the one with the smallest selection value; the others show the front."""
    pruner: Literal["none", "median", "hyperband"] = "none"
    """Stops hopeless trials early, only ever by comparison inside one arm, at equal tokens, after warm-up, on the mean of three
    evaluations."""
    seed: int = 1000
    """Seed of every tuning run; not one of the confirmation seeds."""

    def model_post_init(self, _context: Any) -> None:
        for name in self.space:
            self.check_field(name)
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError.at(
                "sampler",
                got="cmaes",
                expected="a sampler whose package is installed",
                do="pip install 'workbench[search]', or take tpe or gp.",
            )
        if self.objectives[:1] != ("selection",) or len(set(self.objectives)) != len(self.objectives):
            raise ConfigError.at(
                "objectives", got=list(self.objectives), expected="selection first, then others, each once"
            )
        if len(self.objectives) > 1 and self.pruner != "none":
            raise ConfigError.at("pruner", got=self.pruner, expected="none where there are several objectives")
        if len(self.objectives) > 1 and self.sampler == "cmaes":
            raise ConfigError.at(
                "sampler", got="cmaes", expected="a sampler for several objectives", do="Take nsga2, nsga3, tpe or gp."
            )
        if self.warm_start and self.sampler not in ADAPTIVE:
            raise ConfigError.at(
                "warm_start",
                got=list(self.warm_start),
                expected=f"nothing: {self.sampler} does not learn",
                do=f"Take one of {', '.join(ADAPTIVE)}.",
            )
        if self.enqueue and self.sampler == "grid":
            raise ConfigError.at("enqueue", got=list(self.enqueue), expected="nothing: a grid is its points")
        if len(self.enqueue) > self.trials:
            raise ConfigError.at(
                "enqueue", got=f"{len(self.enqueue)} settings", expected=f"at most the {self.trials} trials"
            )

    @staticmethod
    def check_field(name: str) -> None:
        """Raise ConfigError where a field may not be searched."""
        if name.rpartition(".")[2] == "seed":
            raise ConfigError.at(
                "space", got=name, expected="hyper-parameters only", do="A seed is noise to average over, never a knob."
            )
        if name in HELD_EQUAL:
            raise ConfigError.at(
                "space",
                got=name,
                expected="fields that may differ between trials",
                do="Trials are compared at equal tokens: set it in `base`.",
            )

    @property
    def shared(self) -> int:
        """The first trials that all arms have in common and that are never pruned."""
        return min(self.trials, max(self.first, len(self.enqueue)))

    def points(self, space: Mapping[str, Range], names: Sequence[str]) -> list[dict[str, Any]]:
        """The settings of an arm that are fixed before launch, one a trial; empty where the sampler will decide.

        Args:
            space: the arm's fields and ranges.
            names: fields tuned in any arm, in an order that all arms share. A field's values depend on the sampler's seed and
                on ``names``, not on the arm, so that arms share them.
        """
        if not self.trials:
            return []
        if not space:
            raise ConfigError.at("space", got="nothing to tune", expected="at least one field, or trials: 0")
        if self.sampler == "grid":
            return self._grid(space)
        drawn = min(self.shared, self.trials) if self.sampler in ADAPTIVE else self.trials
        if self.sampler == "random":
            from workbench.ablation.execution.studies import draw

            columns = {name: draw(name, choice, drawn, self.sampler_seed) for name, choice in space.items()}
        else:
            positions = dict(zip(names, sobol(len(names), drawn, self.sampler_seed)))
            columns = {name: [place(choice, at) for at in positions[name]] for name, choice in space.items()}
        points = [{name: column[i] for name, column in columns.items()} for i in range(drawn)]
        for point, given in zip(points, self.enqueue):
            point.update({name: value for name, value in given.items() if name in space})
        return points + [{} for _ in range(self.trials - drawn)]

    def _grid(self, space: Mapping[str, Range]) -> list[dict[str, Any]]:
        for name, choice in space.items():
            if not choice.values:
                raise ConfigError.at(f"space.{name}", got="an interval", expected="`values` for a grid")
        size = math.prod(len(choice.values) for choice in space.values())
        if size != self.trials:
            raise ConfigError.at("trials", got=self.trials, expected=f"the whole grid: {size}")
        return [dict(zip(space, values)) for values in itertools.product(*(c.values for c in space.values()))]

    def check_enqueued(self, spaces: Mapping[str, Mapping[str, Range]]) -> None:
        """Raise ConfigError where an enqueued setting lies outside an arm's space, or tunes nothing anywhere."""
        valid = {name for space in spaces.values() for name in space}
        for i, given in enumerate(self.enqueue):
            for name, value in given.items():
                if name not in valid:
                    raise ConfigError.at(
                        f"enqueue[{i}].{name}",
                        got=value,
                        expected="a field that some arm tunes",
                        do=nearest(name, valid),
                    )
                for arm, space in spaces.items():
                    if name in space and not contains(space[name], value):
                        raise ConfigError.at(
                            f"enqueue[{i}].{name}",
                            got=value,
                            expected=f"a value of {describe(space[name])}, the range in arm {arm!r}",
                        )


def sobol(dimensions: int, count: int, seed: int) -> list[list[float]]:
    """``count`` points of a scrambled Sobol sequence in the unit cube, as one column a dimension."""
    import numpy as np
    from scipy.stats import qmc

    length = max(1, math.ceil(math.log2(max(1, count))))  # balanced only in powers of two
    points = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed)).random_base2(length)[:count]
    return points.T.tolist()


def place(choice: Range, at: float) -> Any:
    """The value of ``choice`` at a share ``at`` in [0, 1) of its way from low to high."""
    if choice.values:
        return choice.values[int(at * len(choice.values))]
    assert choice.low is not None and choice.high is not None
    whole = isinstance(choice.low, int) and isinstance(choice.high, int)
    low, high = (choice.low - 0.5, choice.high + 0.5) if whole else (choice.low, choice.high)
    value = math.exp(math.log(low) + at * (math.log(high) - math.log(low))) if choice.log else low + at * (high - low)
    value = min(max(round(value) if whole else value, choice.low), choice.high)
    return value if whole else float(value)


def contains(choice: Range, value: Any) -> bool:
    """Whether ``value`` is one of ``choice``."""
    if choice.values:
        return any(value == held and isinstance(value, bool) == isinstance(held, bool) for held in choice.values)
    assert choice.low is not None and choice.high is not None
    if isinstance(value, bool) or not isinstance(value, int | float) or not choice.low <= value <= choice.high:
        return False
    return isinstance(value, int) or not (isinstance(choice.low, int) and isinstance(choice.high, int))


def describe(choice: Range) -> str:
    """``choice`` in words."""
    return repr(list(choice.values)) if choice.values else f"{choice.low!r} to {choice.high!r}"
