"""The settings that are fixed before launch: grid, random or Sobol points, the same for every arm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.ablation.spec.tuning import ADAPTIVE, Tuning
from workbench.config import ConfigError, nearest
from workbench.ranges import Range
from workbench.seeding import derived_seed

__all__ = ["check_enqueued", "fixed_points", "sobol", "value_at"]


def fixed_points(tuning: Tuning, space: Mapping[str, Range], names: Sequence[str]) -> list[dict[str, Any]]:
    """The settings of an arm, one per trial; an empty mapping where an adaptive sampler decides.

    Args:
        tuning: the search as declared; ``tuning.policy`` decides the number of trials.
        space: the arm's fields and ranges.
        names: fields tuned in any arm, in an order that all arms share. A field's values depend on the sampler's seed
            and on ``names``, not on the arm, so that arms share them.

    Raises:
        ConfigError: if there is nothing to tune, or a grid does not have ``tuning.trials`` points.
    """
    if not tuning.trials:
        return []
    if not space:
        raise ConfigError.at("space", got="nothing to tune", expected="at least one field, or trials: 0")
    if tuning.sampler == "grid":
        return _grid(tuning, space)
    num_trials = tuning.num_trials(len(space))
    num_drawn = tuning.num_shared if tuning.sampler in ADAPTIVE else num_trials
    if tuning.sampler == "random":
        columns = {name: _random(name, choice, num_drawn, tuning.sampler_seed) for name, choice in space.items()}
    else:
        positions = dict(zip(names, sobol(len(names), num_drawn, tuning.sampler_seed)))
        columns = {name: [value_at(choice, share) for share in positions[name]] for name, choice in space.items()}
    points = [{name: column[i] for name, column in columns.items()} for i in range(num_drawn)]
    for point, setting in zip(points, tuning.enqueue):
        point.update({name: value for name, value in setting.items() if name in space})
    return points + [{} for _ in range(num_trials - num_drawn)]


def check_enqueued(tuning: Tuning, spaces: Mapping[str, Mapping[str, Range]]) -> None:
    """Raise ConfigError if an enqueued setting lies outside an arm's space, or its field is tuned in no arm."""
    valid = {name for space in spaces.values() for name in space}
    for i, setting in enumerate(tuning.enqueue):
        for name, value in setting.items():
            path = f"enqueue[{i}].{name}"
            if name not in valid:
                raise ConfigError.at(path, got=value, expected="a field that some arm tunes", do=nearest(name, valid))
            for arm, space in spaces.items():
                if name in space and value not in space[name]:
                    expected = f"a value of {space[name].describe()}, the range in arm {arm!r}"
                    raise ConfigError.at(path, got=value, expected=expected)


def sobol(dimensions: int, count: int, seed: int) -> list[list[float]]:
    """``count`` points of a scrambled Sobol sequence in the unit cube, as one column per dimension."""
    import numpy as np
    from scipy.stats import qmc

    exponent = max(1, math.ceil(math.log2(max(1, count))))  # balanced only in powers of two
    points = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed)).random_base2(exponent)[:count]
    return points.T.tolist()


def value_at(choice: Range, share: float) -> Any:
    """The value of ``choice`` at ``share`` in [0, 1) of the way from low to high."""
    if choice.values:
        return choice.values[int(share * len(choice.values))]
    assert choice.low is not None and choice.high is not None
    integer = choice.is_integer
    low, high = (choice.low - 0.5, choice.high + 0.5) if integer else (choice.low, choice.high)
    log = choice.log
    value = math.exp(math.log(low) + share * (math.log(high) - math.log(low))) if log else low + share * (high - low)
    value = min(max(round(value) if integer else value, choice.low), choice.high)
    return value if integer else float(value)


def _grid(tuning: Tuning, space: Mapping[str, Range]) -> list[dict[str, Any]]:
    for name, choice in space.items():
        if not choice.values:
            raise ConfigError.at(f"space.{name}", got="an interval", expected="`values` for a grid")
    size = math.prod(len(choice.values) for choice in space.values())
    if size != tuning.trials:
        raise ConfigError.at("trials", got=tuning.trials, expected=f"the whole grid: {size}")
    return [dict(zip(space, values)) for values in itertools.product(*(c.values for c in space.values()))]


def _random(name: str, choice: Range, count: int, seed: int) -> list[Any]:
    """``count`` random values of one hyper-parameter, a function of (seed, name) alone."""
    import optuna

    from workbench.ablation.search.samplers import suggest

    sampler = optuna.samplers.RandomSampler(seed=derived_seed(seed, name) % 2**32)
    study = optuna.create_study(sampler=sampler)
    return [suggest(study.ask(), name, choice) for _ in range(count)]
