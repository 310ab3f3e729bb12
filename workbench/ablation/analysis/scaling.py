"""Scaling laws over ablations of the same arms at other sizes or horizons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from workbench.ablation.verdict.statistics import Floats

__all__ = ["ScalingLaw", "fit_scaling_law"]

MIN_POINTS_WITH_FLOOR = 4
"""Points from which on the law has an irreducible part (our choice); with fewer it is a plain power law."""


@dataclass(frozen=True)
class ScalingLaw:
    """L(x) = floor + A · x^(−exponent), fitted to geometric means over seeds; intervals by resampling seeds per x."""

    floor: float
    scale: float
    """A."""
    exponent: float
    exponent_low: float | None
    """None if some x has one seed: its noise is unknown."""
    exponent_high: float | None
    points: int
    replicates: Floats
    """(R, 3): floor, log A, exponent of every bootstrap replicate; none if some x has one seed."""

    def at(self, x: float) -> tuple[float, float | None, float | None]:
        """Value at x with its 95 % interval over replicates, if there are any."""
        value = self.floor + self.scale * x**-self.exponent
        values = self.replicates[:, 0] + np.exp(self.replicates[:, 1] - self.replicates[:, 2] * math.log(x))
        return value, *_interval(values)

    def describe(self, x: str, unit: str) -> str:
        """The law in words, without a full stop.

        Args:
            x: name of the variable it is fitted over.
            unit: of the loss.
        """
        floor = f"{self.floor:.4g} + " if self.floor else ""
        law = f"{unit} = {floor}{self.scale:.4g} · {x}^−{self.exponent:.4f}"
        if self.exponent_low is None:
            return f"{law}, no interval because a point has one seed ({self.points} points)"
        return (
            f"{law}, exponent {self.exponent_low:.4f} to {self.exponent_high:.4f} (95 % over seeds, "
            f"{self.points} points)"
        )


def _interval(values: Floats) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of bootstrap values; None without values."""
    if not values.size:
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def fit_scaling_law(values: Mapping[float, Sequence[float]], replicates: int = 300, seed: int = 0) -> ScalingLaw:
    """Fit by least squares of log L (so that small and large losses count alike), over the seeds' means of log L.

    The interval covers the noise over seeds, not a misspecified law; extrapolation beyond the largest x should be read
    accordingly.

    Args:
        values: x -> losses over seeds, at least two x; positive.
        replicates: bootstrap draws of seeds within every x.
        seed: of the draws.

    Raises:
        ValueError: with fewer than two x, or values that are not positive.
    """
    xs = np.array(sorted(values))
    groups = [np.asarray(values[x], np.float64) for x in xs]
    if len(xs) < 2 or xs[0] <= 0 or any(g.size == 0 or not ((g > 0) & np.isfinite(g)).all() for g in groups):
        raise ValueError(f"values: got {len(xs)} point(s); expected at least two positive x with positive losses each.")
    logs = [np.log(g) for g in groups]  # resampled as logarithms, no replicate is a negative loss
    with_floor = len(xs) >= MIN_POINTS_WITH_FLOOR
    best = _fit(xs, np.array([np.exp(group.mean()) for group in logs]), with_floor, None)
    rng = np.random.default_rng(seed)

    def mean(group: Floats) -> float:
        widening = math.sqrt(group.size / max(1, group.size - 1)) * _t_over_normal(group.size)
        return math.exp(group.mean() + widening * (rng.choice(group, group.size).mean() - group.mean()))

    num_draws = replicates if min(group.size for group in logs) > 1 else 0
    draws = [_fit(xs, np.array([mean(group) for group in logs]), with_floor, best) for _ in range(num_draws)]
    table = np.array(draws).reshape(-1, 3)
    low, high = _interval(table[:, 2])
    return ScalingLaw(float(best[0]), float(np.exp(best[1])), float(best[2]), low, high, len(xs), table)


def _t_over_normal(n: int) -> float:
    """Length of a t-interval over n seeds relative to a normal one; bootstrap draws of few seeds are too narrow."""
    return float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975)) if n > 1 else 1.0


def _fit(x: Floats, y: Floats, with_floor: bool, start: Floats | None) -> Floats:
    """Floor, log A, exponent."""
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    if not with_floor:
        return np.array([0.0, intercept, -slope])
    middle = (
        log_x.mean()
    )  # A is fitted at the middle of the data: far from it the three parameters are hardly identifiable

    def residuals(p: Floats) -> Floats:
        return np.log(np.exp(p[0]) + np.exp(p[1] - np.exp(p[2]) * (log_x - middle))) - log_y

    starts = [
        np.array([math.log(y.min() * share), math.log(max(y.mean() - y.min() * share, 1e-9)), math.log(exponent)])
        for share in (0.3, 0.9)
        for exponent in (0.1, 0.5)
    ]
    if start is not None:
        floor, log_a, exponent = max(start[0], 1e-9), start[1], max(start[2], 1e-6)
        starts = [np.array([math.log(floor), log_a - exponent * middle, math.log(exponent)])]
    best = min((optimize.least_squares(residuals, s, max_nfev=400) for s in starts), key=lambda r: r.cost)
    exponent = math.exp(best.x[2])
    return np.array([math.exp(best.x[0]), best.x[1] + exponent * middle, exponent])
