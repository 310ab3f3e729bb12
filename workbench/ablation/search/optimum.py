"""The settings that an arm tried, and what they show of its optimum: the best one, a fit, the ends of ranges.

Legend: N observations (a setting on a tuning seed), F numeric fields. Lower values are better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.ranges import Range

__all__ = ["Edge", "Gap", "Setting", "Surface", "best", "edges", "fit_surface", "gather", "interpolate", "leading"]

Floats = NDArray[np.float64]

FITTED_SETTINGS = 3
"""Settings, at least, that a parabola over one field is fitted to (ours): those nearest to the best one, or half of all
if that is more. Far from the optimum a curve of losses is no parabola."""
OUTER = 0.05
"""Share of a range, at either end, in which an optimum counts as one at the edge (ours)."""
DRAWS = 2_000
"""Draws of a fit's coefficients behind the interval of a gap."""
SIGNIFICANT_DIGITS = 3
"""Of an interpolated value."""


@dataclass(frozen=True)
class Setting:
    """One setting of an arm's search, with what its runs measured on the selection split."""

    hyperparameters: Mapping[str, Any]
    values: Mapping[int, float] = field(default_factory=dict)
    """Tuning seed -> value; infinite where the run diverged or was pruned. Seeds without a result are left out."""
    run: str | None = None
    """Its trial."""

    def mean(self, seeds: Sequence[int]) -> float:
        """Mean over ``seeds``; infinite if any of them has no finite value."""
        return float(np.mean([self.values.get(seed, math.inf) for seed in seeds]))


def gather(observations: Iterable[tuple[Mapping[str, Any], int, float, str | None]]) -> list[Setting]:
    """Settings from single runs, in the order of their first one.

    Args:
        observations: hyper-parameters, tuning seed, value and run. Of two runs of one setting on one seed the first
            counts.
    """
    values: dict[tuple[Any, ...], dict[int, float]] = {}
    settings: dict[tuple[Any, ...], Setting] = {}
    for hyperparameters, seed, value, run in observations:
        key = tuple(sorted((name, repr(setting)) for name, setting in hyperparameters.items()))
        values.setdefault(key, {}).setdefault(seed, value)
        settings.setdefault(key, Setting(dict(hyperparameters), values[key], run))
    return list(settings.values())


def leading(settings: Sequence[Setting], count: int, seed: int) -> list[Setting]:
    """The best settings on one seed, best first; of equal ones the first. Those without a finite value are left out."""
    finite = [setting for setting in settings if math.isfinite(setting.mean([seed]))]
    return sorted(finite, key=lambda setting: setting.mean([seed]))[:count]


def best(settings: Sequence[Setting], seeds: Sequence[int]) -> Setting | None:
    """The setting with the best mean over ``seeds``; None if none has a finite value on all of them."""
    finite = [setting for setting in settings if math.isfinite(setting.mean(seeds))]
    return min(finite, key=lambda setting: setting.mean(seeds), default=None)


# -- the ends of ranges ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """A field whose chosen value is at the edge of what was tried: its optimum may be outside."""

    name: str
    value: int | float
    where: str
    """the lowest tried, the highest tried, at the low end of its range, or at the high end of its range."""

    def __str__(self) -> str:
        return f"{self.name.rpartition('.')[2].replace('_', ' ')} {self.value:.3g}, {self.where}"


def edges(settings: Sequence[Setting], space: Mapping[str, Range], chosen: Mapping[str, Any]) -> list[Edge]:
    """The numeric fields whose chosen value no other setting brackets, or that lies in the outer 5 % of an interval.

    A setting brackets the chosen one whether its run was done, diverged or was pruned. The lowest value of a field is
    no edge where it is 0: there is nothing below (ours).
    """
    found = []
    for name, choice in space.items():
        if name not in chosen or not choice.is_numeric:
            continue
        tried = [setting.hyperparameters[name] for setting in settings if name in setting.hyperparameters]
        value, where = chosen[name], ""
        share = None if choice.values else _share(choice, value)
        if value >= max(tried, default=value):
            where = "the highest tried"
        elif value <= min(tried, default=value):
            where = "the lowest tried"
        elif share is not None and not OUTER <= share <= 1 - OUTER:
            where = f"at the {'low' if share < OUTER else 'high'} end of its range"
        if where and not (value == 0 and "low" in where):
            found.append(Edge(name, value, where))
    return found


def _share(choice: Range, value: Any) -> float:
    """Where a value lies between the ends of a numeric range, on its scale: 0 at the low end, 1 at the high one."""
    low, high = _ends(choice)
    return ((math.log(value) if choice.is_logarithmic else value) - low) / (high - low)


def _value_at(choice: Range, share: float) -> float:
    low, high = _ends(choice)
    position = low + share * (high - low)
    return math.exp(position) if choice.is_logarithmic else position


def _ends(choice: Range) -> tuple[float, float]:
    """The ends of a numeric range on its scale."""
    low, high = (min(choice.values), max(choice.values)) if choice.values else (choice.low, choice.high)
    assert isinstance(low, int | float) and isinstance(high, int | float)
    return (math.log(low), math.log(high)) if choice.is_logarithmic else (float(low), float(high))


# -- the fit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """How far a setting is from the arm's fitted optimum, in the unit of the metric, on the selection split."""

    value: float
    low: float | None = None
    """The middle 90 % over the noise of repeats; None without repeats, where that noise is unknown."""
    high: float | None = None


@dataclass(frozen=True)
class Surface:
    """A separable quadratic through an arm's settings: value = seed effect + Σ over fields of b x + c x² (ours).

    x is the position of a field's value between the ends of its range (0 to 1), relative to the best setting.
    """

    space: Mapping[str, Range]
    """The F numeric fields and their ranges."""
    origin_F: Floats
    low_F: Floats
    """(F,), smallest x that was fitted."""
    high_F: Floats
    level: float
    """Mean of the seed effects."""
    slope_F: Floats
    """(F,), b."""
    curvature_F: Floats
    """(F,), c."""
    covariance: Floats
    """(2 F, 2 F), of slopes then curvatures, in units of the noise variance."""
    noise: float | None
    """Standard deviation of a run about its setting and seed, from repeats; None without any."""
    noise_df: int

    def position(self, hyperparameters: Mapping[str, Any]) -> Floats:
        """(F,), x of a setting."""
        x = [_share(choice, hyperparameters[name]) for name, choice in self.space.items()]
        return np.array(x) - self.origin_F

    def gap(self, hyperparameters: Mapping[str, Any]) -> Gap:
        """The fitted value of a setting above the smallest one among the values that were fitted.

        An optimum beyond them is not extrapolated, so that the gap of a setting at an edge is a lower bound.
        """
        x_F = self.position(hyperparameters)
        value = float(self._above_minimum(x_F, self.slope_F, self.curvature_F))
        if self.noise is None:
            return Gap(value)
        rng = np.random.default_rng(0)
        scale = self.noise * np.sqrt(self.noise_df / rng.chisquare(self.noise_df, DRAWS))
        normal = rng.multivariate_normal(np.zeros(len(self.covariance)), self.covariance, DRAWS, method="svd")
        drawn = np.concatenate([self.slope_F, self.curvature_F]) + scale[:, None] * normal
        slope_RF, curvature_RF = np.split(drawn, 2, axis=1)
        low, high = np.quantile(self._above_minimum(x_F, slope_RF, curvature_RF), [0.05, 0.95])
        return Gap(value, float(low), float(high))

    def _above_minimum(self, x_F: Floats, slope: Floats, curvature: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = np.where(curvature > 0, -slope / (2 * curvature), self.low_F)
        ends = np.stack(np.broadcast_arrays(self.low_F, self.high_F, np.clip(vertex, self.low_F, self.high_F)))
        smallest = (slope * ends + curvature * ends**2).min(0)
        return np.maximum(slope * x_F + curvature * x_F**2 - smallest, 0).sum(-1)


def fit_surface(settings: Sequence[Setting], space: Mapping[str, Range], near: Setting) -> Surface | None:
    """The quadratic through the settings around ``near`` with its non-numeric values, by least squares.

    One field is fitted locally (``FITTED_SETTINGS``), several to all settings. Each seed has an effect, so that
    a setting with one seed can be compared with one that was repeated.

    Returns:
        None if nothing numeric was tuned, or the settings do not determine the fit: at least 1 + 2 F of them, three
        values of each field.
    """
    fields = {name: choice for name, choice in space.items() if choice.is_numeric and name in near.hyperparameters}
    others = [name for name in near.hyperparameters if name not in fields]
    comparable = [
        setting
        for setting in settings
        if any(map(math.isfinite, setting.values.values()))
        and all(setting.hyperparameters.get(name) == near.hyperparameters[name] for name in others)
    ]
    origin_F = np.array([_share(choice, near.hyperparameters[name]) for name, choice in fields.items()])

    def position(setting: Setting) -> Floats:
        x = [_share(choice, setting.hyperparameters[name]) for name, choice in fields.items()]
        return np.array(x) - origin_F

    if len(fields) == 1:
        comparable.sort(key=lambda setting: abs(position(setting)[0]))
        comparable = comparable[: max(FITTED_SETTINGS, math.ceil(len(comparable) / 2))]
    if not fields or len(comparable) < 1 + 2 * len(fields):
        return None
    seeds = sorted({seed for setting in comparable for seed, value in setting.values.items() if math.isfinite(value)})
    rows, values = [], []
    for setting in comparable:
        x_F = position(setting)
        for seed, value in setting.values.items():
            if math.isfinite(value):
                rows.append([*(float(seed == other) for other in seeds), *x_F, *x_F**2])
                values.append(value)
    design = np.array(rows)
    coefficients, _, rank, _ = np.linalg.lstsq(design, np.array(values), rcond=None)
    if rank < design.shape[1]:
        return None
    positions = np.array([position(setting) for setting in comparable])
    noise, noise_df = _noise(settings)
    slope_F, curvature_F = np.split(coefficients[len(seeds) :], 2)
    return Surface(
        fields,
        origin_F,
        positions.min(0),
        positions.max(0),
        float(coefficients[: len(seeds)].mean()),
        slope_F,
        curvature_F,
        np.linalg.inv(design.T @ design)[len(seeds) :, len(seeds) :],
        noise,
        noise_df,
    )


def _noise(settings: Sequence[Setting]) -> tuple[float | None, int]:
    """Standard deviation of a run about the sum of its setting's and its seed's effect, over the settings that have the
    most seeds, and its degrees of freedom; None and 0 where fewer than two settings were repeated."""
    seeds = max((sorted(setting.values) for setting in settings), key=len, default=[])
    rows = [[setting.values.get(seed, math.inf) for seed in seeds] for setting in settings]
    table = np.array([row for row in rows if all(map(math.isfinite, row))]).reshape(-1, len(seeds))
    df = (len(table) - 1) * (len(seeds) - 1)
    if df < 1:
        return None, 0
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return math.sqrt(float((residuals**2).sum()) / df), df


def interpolate(
    settings: Sequence[Setting], space: Mapping[str, Range], near: Setting
) -> tuple[dict[str, Any], float] | None:
    """The optimum of a parabola over the one field that was tuned, with its fitted value.

    Returns:
        None if there is no optimum between the settings that were fitted, or a setting that diverged lies between it
        and ``near``, the best one that was tried.
    """
    surface = fit_surface(settings, space, near)
    if surface is None or len(space) != 1 or len(surface.space) != 1 or surface.curvature_F[0] <= 0:
        return None
    ((name, choice),) = surface.space.items()
    x = float(-surface.slope_F[0] / (2 * surface.curvature_F[0]))
    crossed = [
        setting
        for setting in settings
        if math.inf in setting.values.values()
        and min(0.0, x) <= surface.position(setting.hyperparameters)[0] <= max(0.0, x)
    ]
    if crossed or not surface.low_F[0] < x < surface.high_F[0]:
        return None
    value = _value_at(choice, x + float(surface.origin_F[0]))
    rounded = round(value) if choice.is_integer else float(f"{value:.{SIGNIFICANT_DIGITS - 1}e}")
    fitted = surface.level + x * float(surface.slope_F[0]) + x * x * float(surface.curvature_F[0])
    return {name: rounded}, fitted
