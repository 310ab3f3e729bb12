"""Scaling laws over ablations of the same arms at other sizes or horizons.

Legend: A arms (one, or an arm and its baseline), P points x, M models, R bootstrap replicates, G candidates of the
floor, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from workbench.ablation.design import distinct_sizes
from workbench.ablation.verdict.statistics import Floats, pooled_sd, widening

__all__ = ["MIN_POINTS", "MIN_SIZES", "PairedLaw", "Prediction", "ScalingLaw", "fit_paired_law", "fit_scaling_law"]

MIN_SIZES = 3
"""Sizes from which on a law is fitted (our choice): there is always a law through two."""
MIN_POINTS = 4
"""Points from which on the floor can be fitted. With fewer the law is a plain power law without intervals: if the true
law has a floor, the plain one misses its exponent, whatever the noise."""


@dataclass(frozen=True)
class ScalingLaw:
    """L(x) = floor + A · x^(−exponent), fitted to geometric means over seeds; intervals by resampling seeds per x."""

    floor: float
    """0 where it is unknown."""
    scale: float
    """A."""
    exponent: float
    exponent_low: float | None
    """None with fewer than four points, or if some x has one seed, whose noise is unknown."""
    exponent_high: float | None
    points: int
    replicates: Floats
    """(M, R, 3): floor, log A, exponent of every bootstrap replicate, with a floor and, where none is shown, without;
    none where there is no interval."""

    @property
    def is_floor_shown(self) -> bool:
        """Whether the points reject a law without a floor."""
        return len(self.replicates) == 1

    @property
    def is_floor_known(self) -> bool:
        """Whether there are enough points to fit the floor."""
        return self.points >= MIN_POINTS

    def at(self, x: float) -> tuple[float, float | None, float | None]:
        """Value at x with its 95 % interval over replicates, if there are any."""
        floor, log_scale, exponent = np.moveaxis(self.replicates, -1, 0)
        values = floor + np.exp(log_scale - exponent * math.log(x))
        return self.floor + self.scale * x**-self.exponent, *_interval(values)

    def describe(self, x: str, unit: str) -> str:
        """The law in words, without a full stop.

        Args:
            x: name of the variable it is fitted over.
            unit: of the loss.
        """
        floor = f"{self.floor:.4g} + " if self.floor else ""
        law = f"{unit} = {floor}{self.scale:.4g} · {x}^−{self.exponent:.4f}"
        if not self.is_floor_known:
            return f"{law}, floor unknown and no interval ({self.points} points; the floor needs {MIN_POINTS})"
        if self.exponent_low is None:
            return f"{law}, no interval because a point has one seed ({self.points} points)"
        shown = "" if self.is_floor_shown else "; a floor is not shown"
        return (
            f"{law}, exponent {self.exponent_low:.4f} to {self.exponent_high:.4f} (95 % over seeds, "
            f"{self.points} points){shown}"
        )


class Prediction(NamedTuple):
    """A predicted difference, arm − baseline, in the unit of the loss."""

    value: float
    """Median over the replicates of all models; with one seed at some x, that of the first model."""
    low: float | None
    """95 % prediction interval of the mean difference, the choice of the model included; None if some x has one
    seed."""
    high: float | None


@dataclass(frozen=True)
class PairedLaw:
    """Difference of two laws, E + A · x^(−α) − (F + B · x^(−β)), fitted to an arm and its baseline.

    The models (ours) have one floor E = F, a floor each, or none. A model is left out if the measured paired
    differences reject it (F-test at 1 % against their noise over seeds), unless they reject all. The interval of a
    prediction is the middle 95 % of bootstrap replicates of the models, seeds resampled in pairs, on all points and
    leaving out each in turn; widened to hold every model's fit. It is the interval of a mean over many seeds at that x,
    not of a single run.
    """

    fits: Mapping[str, Floats]
    """Model -> floor, log A, exponent of arm and baseline, (2, 3)."""
    points: int
    replicates: Floats
    """(R, 2, 3), of all models; none if some x has one seed."""

    def at(self, x: float) -> Prediction:
        """The difference at x."""
        fits = [float(_difference(fit, x)) for fit in self.fits.values()]
        if not len(self.replicates):
            return Prediction(fits[0], None, None)
        low, value, high = np.quantile(_difference(self.replicates, x), [0.025, 0.5, 0.975]).tolist()
        return Prediction(value, min(low, *fits), max(high, *fits))


def fit_scaling_law(values: Mapping[float, Sequence[float]], replicates: int = 300, seed: int = 0) -> ScalingLaw:
    """Fit by least squares of log L (so that small and large losses count alike), over the seeds' means of log L.

    The interval covers the noise over seeds. Where an F-test (at 5 %; against the noise over seeds) does not reject a
    law without a floor, it spans the intervals of both: at a floor of zero, the edge of what is fitted, the bootstrap
    alone is too narrow. It covers no other misspecification; extrapolation beyond the largest x should be read
    accordingly. Fewer than four points give a plain power law without intervals.

    Args:
        values: x -> losses over seeds, at least three distinct x
            (:func:`workbench.ablation.design.distinct_sizes`); positive.
        replicates: bootstrap draws of seeds within every x.
        seed: of the draws.

    Raises:
        ValueError: with fewer than three distinct x, or values that are not positive.
    """
    xs, logs = _logs({x: [losses] for x, losses in values.items()}, least=MIN_SIZES)
    has_floor = len(xs) >= MIN_POINTS
    best = _fit(xs, _means(logs), has_floor)[0, 0]
    table = np.empty((0, 0, 3))
    if has_floor and min(group.shape[1] for group in logs) > 1:
        drawn = _resampled(logs, replicates, np.random.default_rng(seed))
        models = (True,) if _shows_floor(xs, logs) else (True, False)
        table = np.stack([_fit(xs, drawn, model)[:, 0] for model in models])
    low, high = _interval(table[..., 2])
    return ScalingLaw(float(best[0]), math.exp(best[1]), float(best[2]), low, high, len(xs), table)


def fit_paired_law(
    values: Mapping[float, tuple[Sequence[float], Sequence[float]]], replicates: int = 600, seed: int = 0
) -> PairedLaw:
    """The law of a paired difference.

    Args:
        values: x -> losses of the arm and of the baseline over the same seeds in the same order; at least four x;
            positive.
        replicates: bootstrap draws in all, half of them on all points.
        seed: of the draws.

    Raises:
        ValueError: with fewer than four x, with seeds that are not paired, or with values that are not positive.
    """
    xs, logs = _logs(values, least=MIN_POINTS)
    fits = {model: _fit_pair(xs, _means(logs), model)[0] for model in MODELS}
    if min(group.shape[1] for group in logs) < 2:
        return PairedLaw(fits, len(xs), np.empty((0, 2, 3)))
    kept = [model for model in MODELS if _agrees(fits[model], xs, logs)] or list(MODELS)
    rng, tables, every = np.random.default_rng(seed), [], range(len(xs))
    for model in kept:
        # a floor each is three parameters for an arm's points: with one point less they may have no solution
        is_left_out = model != "a floor each" or len(xs) > MIN_POINTS
        count = replicates // len(kept)
        subsets = [(list(every), count // 2 if is_left_out else count)]
        if is_left_out:
            subsets += [([i for i in every if i != left], max(1, count // 2 // len(xs))) for left in every]
        for chosen, number in subsets:
            drawn = _resampled([logs[i] for i in chosen], number, rng)
            tables.append(_fit_pair(xs[chosen], drawn, model))
    return PairedLaw({model: fits[model] for model in kept}, len(xs), np.concatenate(tables))


MODELS = ("one floor", "a floor each", "no floor")
"""Models of a pair of laws."""


def _fit_pair(xs: Floats, y_RAP: Floats, model: str) -> Floats:
    """The fit of one model, (R, 2, 3)."""
    if model == "a floor each":
        return np.concatenate([_fit(xs, y_RAP[:, arm : arm + 1], True) for arm in (0, 1)], 1)
    return _fit(xs, y_RAP, model == "one floor")


def _agrees(fit: Floats, xs: Floats, logs: Sequence[Floats]) -> bool:
    """Whether the measured log ratios of arm and baseline, relative to their noise, do not reject a fit at 1 %."""
    ratios = [group[0] - group[1] for group in logs]
    values_AP = fit[:, :1] + np.exp(fit[:, 1:2] - fit[:, 2:] * np.log(xs))
    residuals = np.log(values_AP[0] / values_AP[1]) - [ratio.mean() for ratio in ratios]
    sd, df = pooled_sd(ratios)
    variance = sd**2 * float(np.mean([1 / ratio.size for ratio in ratios]))
    return float((residuals**2).mean()) <= variance * float(stats.f.ppf(0.99, len(xs), df))


def _logs(values: Mapping[float, Sequence[ArrayLike]], least: int) -> tuple[Floats, list[Floats]]:
    """x sorted, (P,), and log losses at each, (A, S): resampled as logarithms, no replicate is a negative loss."""
    xs = np.array(sorted(values), np.float64)
    number = {3: "three", 4: "four"}[least]
    if (found := len(distinct_sizes(xs.tolist()))) < least or xs[0] <= 0:
        raise ValueError(f"got {found} distinct size(s); expected at least {number}, positive.")
    if any(len({np.size(losses) for losses in values[x]}) > 1 for x in xs):
        raise ValueError("got other numbers of seeds for arm and baseline; expected pairs.")
    groups = [np.asarray(values[x], np.float64) for x in xs]
    if any(group.size == 0 or not ((group > 0) & np.isfinite(group)).all() for group in groups):
        raise ValueError("got no loss at some x, or one that is not positive; expected positive losses.")
    return xs, [np.log(group) for group in groups]


def _shows_floor(xs: Floats, logs: Sequence[Floats]) -> bool:
    """F-test of the law without a floor against the one with it: drop of the squared error of the mean logs, relative
    to their variance by the noise over seeds (pooled)."""
    means = _means(logs)
    errors = []
    for has_floor in (False, True):
        floor, log_scale, exponent = _fit(xs, means, has_floor)[0, 0]
        fitted = floor + np.exp(log_scale - exponent * np.log(xs))
        errors.append(float(((np.log(fitted) - np.log(means[0, 0])) ** 2).sum()))
    sd, df = pooled_sd([group[0] for group in logs])
    variance = sd**2 * float(np.mean([1 / group.shape[1] for group in logs]))
    return errors[0] - errors[1] > variance * float(stats.f.ppf(0.95, 1, df))


def _means(logs: Sequence[Floats]) -> Floats:
    """Geometric means over seeds, (1, A, P)."""
    return np.exp(np.stack([group.mean(1) for group in logs], -1))[None]


def _resampled(logs: Sequence[Floats], replicates: int, rng: np.random.Generator) -> Floats:
    """Geometric means over resampled seeds, the same of all arms, (R, A, P).

    Draws of few seeds are too narrow: deviations are widened by √(S/(S − 1)) · t(S − 1)/z, the length of a t-interval
    relative to that of the draws.
    """
    means = []
    for group in logs:
        seeds = group.shape[1]
        drawn = group[:, rng.integers(seeds, size=(replicates, seeds))].mean(-1).T  # (R, A)
        centre = group.mean(1)
        means.append(np.exp(centre + widening(seeds, 0.95) * (drawn - centre)))
    return np.stack(means, -1)


def _fit(x: Floats, y_RAP: Floats, has_floor: bool) -> Floats:
    """Floor (one for all arms), log A and exponent that fit each replicate, (R, A, 3).

    Given the floor, log(L − floor) is linear in log x: least squares with the weights that make its residuals those of
    log L. The floor itself is searched: candidates between 0 and the least loss, spaced by the logarithm of the
    distance to it, then closer around the best.
    """
    replicates, arms, _ = y_RAP.shape
    log_x = np.log(x)
    middle = log_x.mean()  # far from the data A and the exponent are hardly identifiable
    least_R = y_RAP.min((1, 2))

    def solve(distance_RG: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Squared error (R, G), floor (R, G), intercept and slope (R, G, A) at floors (1 − 10^−distance) · least."""
        floor_RG = least_R[:, None] * (1 - 10.0**-distance_RG)
        y = y_RAP[:, None]
        rest = y - floor_RG[..., None, None]
        u, weight, z = np.log(rest), (rest / y) ** 2, log_x - middle
        total = weight.sum(-1)
        z_mean, u_mean = (weight * z).sum(-1) / total, (weight * u).sum(-1) / total
        spread = (weight * (z - z_mean[..., None]) ** 2).sum(-1)
        slope = (weight * (z - z_mean[..., None]) * (u - u_mean[..., None])).sum(-1) / spread
        intercept = u_mean - slope * z_mean
        fitted = floor_RG[..., None, None] + np.exp(intercept[..., None] + slope[..., None] * z)
        return ((np.log(fitted) - np.log(y)) ** 2).sum((-1, -2)), floor_RG, intercept, slope

    best_R1, step = np.zeros((replicates, 1)), 0.0
    if has_floor:
        candidates = np.linspace(0, 3, 31)
        best_R1, step = np.broadcast_to(candidates, (replicates, 31)), candidates[1]
    error, floor, intercept, slope = solve(best_R1)
    for _ in range(4 if has_floor else 0):
        chosen = np.take_along_axis(best_R1, error.argmin(1)[:, None], 1)
        best_R1 = np.clip(chosen + np.linspace(-step, step, 11), 0, 3)
        step /= 5
        error, floor, intercept, slope = solve(best_R1)
    rows, chosen_R = np.arange(replicates), error.argmin(1)
    floor_RA = np.broadcast_to(floor[rows, chosen_R][:, None], (replicates, arms))
    exponent_RA = -slope[rows, chosen_R]
    return np.stack([floor_RA, intercept[rows, chosen_R] + exponent_RA * middle, exponent_RA], -1)


def _difference(fits: Floats, x: float) -> Floats:
    """Arm − baseline at x of fits (…, 2, 3)."""
    values = fits[..., 0] + np.exp(fits[..., 1] - fits[..., 2] * math.log(x))
    return values[..., 0] - values[..., 1]


def _interval(values_MR: Floats) -> tuple[float, float] | tuple[None, None]:
    """What spans the middle 95 % of bootstrap values of every model; None without values."""
    if not values_MR.size:
        return None, None
    low, high = np.quantile(values_MR, [0.025, 0.975], axis=1)
    return float(low.min()), float(high.max())
