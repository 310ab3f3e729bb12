"""Statistics of an ablation: plain functions of arrays, each with its formula and its source.

Legend: S seeds, D documents. A seed is one unit: arm and baseline trained with the same seeds
(init, data order, noise) form one pair, and a repeat with the same seeds is no second unit. The metric is a ratio of
sums over documents, Σ amounts / Σ sizes (bits over bytes, errors over answers); lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

__all__ = [
    "MIN_SEEDS",
    "POWER",
    "ROUNDING",
    "Interval",
    "NoiseFloor",
    "detectable_difference",
    "equivalence_power",
    "equivalent",
    "exchange_p",
    "expected_best_of",
    "holm",
    "holm_in_order",
    "noise_floor",
    "paired_correlation",
    "paired_interval",
    "pooled_sd",
    "power_of",
    "ratio_of_sums",
    "seeds_for_equivalence",
    "seeds_needed",
    "welch",
    "widening",
]

Floats = NDArray[np.float64]

POWER = 0.8
"""Power at which detectable differences and needed seeds are stated."""

MIN_SEEDS = 4
"""With fewer paired seeds no difference and no equivalence is claimed: t rests on a normality that three values
cannot show, and ties make its variance zero."""

ROUNDING = 1e-12
"""Differences below this are rounding of the sums over documents, and count as zero."""


@dataclass(frozen=True)
class Interval:
    """Mean of n paired differences with its two-sided t-interval, in the unit of the differences."""

    mean: float
    sd: float
    """Standard deviation of the differences (divisor n − 1); NaN for n = 1."""
    n: int
    low: float
    high: float
    p: float
    """Two-sided p-value of "the mean difference is zero"."""


class NoiseFloor(NamedTuple):
    """Standard deviation over seeds with its interval, in the unit of the values."""

    sd: float
    low: float
    high: float


def finite_array(values: ArrayLike, name: str, dimensions: int = 1) -> Floats:
    """``values`` as a non-empty float64 array of so many dimensions, without NaN or infinity."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}; expected {dimensions} non-empty dimension(s).")
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise ValueError(f"{name}: got {bad} NaN or infinite value(s). A failed run is a failure row, not a number.")
    return array


def require_between(value: float, name: str, low: float = 0.0, high: float = 1.0) -> None:
    if not low < value < high:
        raise ValueError(f"{name}: got {value}; expected a number between {low:g} and {high:g}, ends excluded.")


def _sd(values_S: Floats) -> float:
    """Standard deviation, divisor n − 1; exactly 0 for equal values, whose mean may be off by a rounding."""
    return float(values_S.std(ddof=1)) if np.ptp(values_S) else 0.0


def ratio_of_sums(amounts_SD: ArrayLike, sizes_D: ArrayLike) -> Floats:
    """The metric of each seed, (S,): Σ amounts / Σ sizes over documents, not a mean of ratios.

    Args:
        amounts_SD: (S, D), bits (or errors) per seed and document.
        sizes_D: (D,), bytes (or answers) per document, positive.
    """
    amounts_SD, sizes_D = finite_array(amounts_SD, "amounts_SD", 2), finite_array(sizes_D, "sizes_D")
    if amounts_SD.shape[1] != sizes_D.size or not (sizes_D > 0).all():
        got = f"shape {sizes_D.shape}, smallest {sizes_D.min():g}"
        raise ValueError(f"sizes_D: got {got}; expected ({amounts_SD.shape[1]},), one positive size per document.")
    return amounts_SD.sum(1) / sizes_D.sum()


def paired_interval(differences_S: ArrayLike, alpha: float = 0.05) -> Interval:
    """The two-sided paired t-interval: mean ± t(1 − α/2; n − 1) · sd / √n, with p from t = mean · √n / sd.

    Two edges are decided rather than left to NaN:

    - n = 1: nothing is known about the noise, so the interval is infinite and p = 1.
    - sd = 0 (up to rounding), n ≥ 2: the interval has no width and p = 1, never 0. Equal differences are no sign of a
      noise of zero: the seed never reached the runs, or the metric has too few values to show it.

    Args:
        differences_S: (S,), arm − baseline, one per seed pair, any unit.
        alpha: error rate; the level of the interval is 1 − alpha. At 0 the interval is infinite.

    >>> paired_interval([0.011, 0.014, 0.009, 0.012, 0.014]).p < 0.05
    True
    """
    differences_S = finite_array(differences_S, "differences_S")
    if alpha:
        require_between(alpha, "alpha")
    n, mean = differences_S.size, float(differences_S.mean())
    if n == 1:
        return Interval(mean, math.nan, 1, -math.inf, math.inf, 1.0)
    if np.ptp(differences_S) < ROUNDING:
        return Interval(mean, 0.0, n, mean, mean, 1.0)
    sd = _sd(differences_S)
    error = sd / math.sqrt(n)
    half = float(special.stdtrit(n - 1, 1 - alpha / 2)) * error if alpha else math.inf
    p = max(float(2 * special.stdtr(n - 1, -abs(mean) / error)), float(np.finfo(np.float64).tiny))
    return Interval(mean, sd, n, mean - half, mean + half, p)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values, (m,), in the order given (Holm 1979): strong control of the family-wise error rate.

    With p sorted upwards, adjusted_(i) = max over j ≤ i of min(1, (m − j + 1) · p_(j)). A test that could not be made
    stays in the family with p = 1.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p_m = np.asarray(p_values, dtype=np.float64)
    if p_m.ndim != 1 or not ((p_m >= 0) & (p_m <= 1)).all():
        raise ValueError(f"p_values: got {p_m}; expected a list of numbers from 0 to 1 (a failed arm's p is 1).")
    order = np.argsort(p_m, kind="stable")
    adjusted_m = np.empty_like(p_m)
    adjusted_m[order] = np.maximum.accumulate(np.minimum(1.0, p_m[order] * np.arange(p_m.size, 0, -1)))
    return adjusted_m


def holm_in_order(p_values: ArrayLike) -> Floats:
    """Adjusted p-values of m comparisons on K metrics that have an order, (m, K): strong control of the family-wise
    error rate over all of them, whatever the dependence (Bretz, Maurer, Brannath & Posch 2009, algorithm 2).

    Each comparison has 1 / m of alpha for its first metric. A rejection passes the alpha of a metric on to the next
    metric of the same comparison; the last one passes it on to the other comparisons, in equal parts. With one metric
    this is :func:`holm`, with one comparison the fixed sequence: every metric at alpha, until one is not rejected.

    >>> holm_in_order([[0.01, 0.04], [0.02, 0.001]]).tolist()
    [[0.02, 0.04], [0.04, 0.04]]
    """
    p_mk = finite_array(p_values, "p_values", 2)
    if not ((p_mk >= 0) & (p_mk <= 1)).all():
        raise ValueError(f"p_values: got {p_mk}; expected numbers from 0 to 1 (a metric that nobody measured has 1).")
    comparisons, metrics = p_mk.shape
    adjusted_mk, adjusted = np.ones_like(p_mk), 0.0
    share_m, next_m = np.full(comparisons, 1 / comparisons), np.zeros(comparisons, int)
    while open_m := [m for m in range(comparisons) if next_m[m] < metrics]:
        first = min(open_m, key=lambda m: p_mk[m, next_m[m]] / share_m[m])
        adjusted = max(adjusted, min(1.0, float(p_mk[first, next_m[first]] / share_m[first])))
        adjusted_mk[first, next_m[first]] = adjusted
        next_m[first] += 1
        if next_m[first] == metrics:
            others = [m for m in open_m if m != first]
            share_m[others] += share_m[first] / max(1, len(others))
    return adjusted_mk


def equivalent(differences_S: ArrayLike, margin: float, alpha: float = 0.05) -> bool:
    """Whether the mean difference is shown to lie within ± ``margin``: two one-sided t-tests at ``alpha``.

    Equivalent to the (1 − 2 alpha) interval lying strictly inside the margin (Schuirmann 1987). One seed, or
    differences without any spread, show nothing.

    Args:
        differences_S: (S,), arm − baseline, one per seed pair.
        margin: positive, in the unit of the differences.
    """
    require_between(margin, "margin", high=math.inf)
    if alpha:
        require_between(alpha, "alpha", high=0.5)
    interval = paired_interval(differences_S, 2 * alpha)
    return interval.sd > 0 and -margin < interval.low and interval.high < margin


def noise_floor(values_S: ArrayLike, level: float = 0.95) -> NoiseFloor:
    """Standard deviation over seeds with its chi-square interval: sd · √((n − 1) / χ²(n − 1)) at both quantiles.

    Assumes normal noise. With n = 3 the interval reaches from 0.52 to 6.28 times the estimate, with n = 8 from 0.66 to
    2.04. One seed gives NaN, from 0 to infinity.

    Args:
        values_S: (S,), one value a seed, any unit.
    """
    values_S = finite_array(values_S, "values_S")
    require_between(level, "level")
    df = values_S.size - 1
    if df == 0:
        return NoiseFloor(math.nan, 0.0, math.inf)
    sd = _sd(values_S)
    low, high = (sd * math.sqrt(df / special.chdtri(df, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
    return NoiseFloor(sd, low, high)


def power_of(n: int, effect_in_sd: float, alpha: float) -> float:
    """Power of the two-sided paired t-test: P(|T| > t(1 − α/2; n − 1)), T noncentral about effect · √n."""
    df, centre = n - 1, abs(effect_in_sd) * math.sqrt(n)
    critical = special.stdtrit(df, 1 - alpha / 2)
    below, far_below = special.nctdtr(df, centre, critical), special.nctdtr(df, centre, -critical)
    # SciPy gives NaN where these probabilities underflow; there they are zero.
    return 1 - (0.0 if math.isnan(below) else float(below)) + (0.0 if math.isnan(far_below) else float(far_below))


def _check_rates(alpha: float, power: float) -> None:
    require_between(alpha, "alpha")
    require_between(power, "power", low=alpha)


def welch(first_S: ArrayLike, second_S: ArrayLike, alpha: float = 0.05) -> Interval:
    """Welch's two-sample t-interval for the difference of two means, first − second, of unequal variances: seeds that
    are no pairs (Welch 1947, Biometrika 34, 28–35; degrees of freedom by Satterthwaite 1946).

    ``n`` of the result is the smaller number of seeds, ``sd`` the standard error of the difference times √n. As in
    :func:`paired_interval`, one seed in a group makes the interval infinite and p = 1, and so does no spread in both.

    Args:
        first_S: (S,), one value per seed.
        second_S: (S',), the other group's.
        alpha: error rate; the level of the interval is 1 − alpha.

    >>> round(welch([1.0, 1.1, 1.2, 1.3], [1.4, 1.6, 1.5, 1.9, 1.6]).p, 4)
    0.0039
    """
    groups = finite_array(first_S, "first_S"), finite_array(second_S, "second_S")
    require_between(alpha, "alpha")
    mean, n = float(groups[0].mean() - groups[1].mean()), min(group.size for group in groups)
    if n < 2:
        return Interval(mean, math.nan, n, -math.inf, math.inf, 1.0)
    shares = [_sd(group) ** 2 / group.size for group in groups]
    error = math.sqrt(sum(shares))
    if error < ROUNDING:
        return Interval(mean, 0.0, n, -math.inf, math.inf, 1.0)
    df = sum(shares) ** 2 / sum(share**2 / (group.size - 1) for share, group in zip(shares, groups))
    half = float(special.stdtrit(df, 1 - alpha / 2)) * error
    p = 2 * float(special.stdtr(df, -abs(mean) / error))
    return Interval(mean, error * math.sqrt(n), n, mean - half, mean + half, p)


def exchange_p(first_S: ArrayLike, second_S: ArrayLike, draws: int = 20_000) -> float:
    """Two-sided p-value of the difference of two means by exchanging seeds between the groups: the share of all
    splits into groups of these sizes whose means differ at least as much (Pitman 1937). Exact where one distribution
    gave both groups; of more than ``draws`` splits, a random sample with the observed one added.

    >>> round(exchange_p([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]), 4)
    0.0286
    """
    first_S, second_S = finite_array(first_S, "first_S"), finite_array(second_S, "second_S")
    pooled, size = np.concatenate([first_S, second_S]), first_S.size
    observed = abs(float(first_S.mean() - second_S.mean()))
    count = math.comb(pooled.size, size)
    if count <= draws:
        sums = np.array([pooled[list(chosen)].sum() for chosen in combinations(range(pooled.size), size)])
    else:
        order = np.random.default_rng(count).permuted(np.tile(pooled, (draws, 1)), axis=1)
        sums = np.append(order[:, :size].sum(1), first_S.sum())
    differences = np.abs(sums / size - (pooled.sum() - sums) / second_S.size)
    return float((differences >= observed - ROUNDING).mean())


@lru_cache(maxsize=1024)
def detectable_difference(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that n seed pairs show with this power, in units of the sd of the differences.

    Solves the power of the two-sided paired t-test (noncentral t) for the difference. One seed: infinite.

    >>> round(detectable_difference(8), 2)
    1.16
    """
    _check_rates(alpha, power)
    if n < 2:
        return math.inf
    upper = 1.0
    while power_of(n, upper, alpha) < power:
        upper *= 2
    return float(optimize.brentq(lambda effect: power_of(n, effect, alpha) - power, 0.0, upper))


def seeds_needed(effect_in_sd: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """The fewest seed pairs, at least 2, that show a true difference with this power (noncentral t).

    Beyond a million seeds the normal approximation is returned.

    Args:
        effect_in_sd: true difference divided by the sd of the differences; its sign does not matter.

    >>> seeds_needed(1.0)
    10
    """
    _check_rates(alpha, power)
    require_between(abs(effect_in_sd), "effect_in_sd", high=math.inf)
    rough = ((special.ndtri(1 - alpha / 2) + special.ndtri(power)) / effect_in_sd) ** 2
    if rough > 1e6:
        return math.ceil(rough)
    n = max(2, round(rough))  # a few too small where n is; the power rises with n
    while n > 2 and power_of(n - 1, effect_in_sd, alpha) >= power:
        n -= 1
    while power_of(n, effect_in_sd, alpha) < power:
        n += 1
    return n


def equivalence_power(n: int, margin_in_sd: float, alpha: float = 0.05) -> float:
    """Power of two one-sided t-tests at ``alpha`` to show equivalence when the true difference is zero.

    With u = s / σ, u² · (n − 1) chi-square: E over u of max(0, 2 Φ(m √n − t(1 − α; n − 1) u) − 1), m the margin in
    units of the sd of the differences; the integral over u's quantiles by the midpoint rule (2,000 points).
    """
    if n < 2:
        return 0.0
    quantiles = (np.arange(2_000) + 0.5) / 2_000
    u = np.sqrt(special.chdtri(n - 1, 1 - quantiles) / (n - 1))
    reach = margin_in_sd * math.sqrt(n) - special.stdtrit(n - 1, 1 - alpha) * u
    return float(np.maximum(0.0, 2 * special.ndtr(reach) - 1).mean())


def seeds_for_equivalence(margin_in_sd: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """The fewest seed pairs, at least 2, that show equivalence within ± margin when the true difference is zero.

    Args:
        margin_in_sd: the margin divided by the sd of the differences.

    >>> [seeds_for_equivalence(margin) for margin in (1, 1.5, 2, 3)]
    [11, 6, 4, 3]
    """
    _check_rates(alpha, power)
    require_between(margin_in_sd, "margin_in_sd", high=math.inf)
    # both sides share the error
    rough = ((special.ndtri(1 - alpha) + special.ndtri((1 + power) / 2)) / margin_in_sd) ** 2
    if rough > 1e5:
        return math.ceil(rough)
    n = max(2, math.floor(0.9 * rough))
    while n > 2 and equivalence_power(n - 1, margin_in_sd, alpha) >= power:
        n -= 1
    while equivalence_power(n, margin_in_sd, alpha) < power:
        n += 1
    return n


def pooled_sd(groups: Sequence[ArrayLike]) -> tuple[float, int]:
    """Standard deviation within groups (arms) of values over seeds, and its degrees of freedom Σ (n − 1).

    NaN and 0 where no group has two values.
    """
    arrays = [finite_array(group, "groups") for group in groups]
    df = sum(array.size - 1 for array in arrays)
    if df == 0:
        return math.nan, 0
    return math.sqrt(sum(float(((array - array.mean()) ** 2).sum()) for array in arrays) / df), df


def widening(n: int, level: float) -> float:
    """√(n/(n − 1)) · t(n − 1) / z: the length of a t-interval for the mean of ``n`` normal values, relative to that of
    their percentile bootstrap."""
    upper = (1 + level) / 2
    return float(math.sqrt(n / (n - 1)) * special.stdtrit(n - 1, upper) / special.ndtri(upper))


def expected_best_of(values: ArrayLike, k: int, minimise: bool = True) -> float:
    """Expected best of k trials drawn without replacement from the n observed ones, for any k from 1 to n.

    With values sorted best first y_(1..n): Σ_i y_(i) · C(n − i, k − 1) / C(n, k) (Tang et al. 2020, arXiv 2004.13705,
    without the bias of drawing with replacement; i is the best of the k when the
    other k − 1 come from the n − i behind it). Exact where trials are exchangeable, as in random search; the order of
    an adaptive sampler is not. A failed trial belongs in with its worst value, +inf when minimising: the expectation
    is infinite until k is large enough that one of the k must have finished.

    Args:
        values: (n,), one per trial.

    >>> expected_best_of([3.0, 1.0, 2.0], 2)
    1.3333333333333333
    """
    y_n = np.asarray(values, dtype=np.float64) * (1 if minimise else -1)
    if y_n.ndim != 1 or np.isnan(y_n).any() or (y_n == -math.inf).any():
        raise ValueError("values: expected one number per trial, at worst infinitely bad (a failed trial), never NaN.")
    n = y_n.size
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}; expected 1 to {n}, the number of trials.")
    behind = n - np.arange(1, n - k + 1)  # n − i; the weights by their ratios, as binomials overflow near n = 1,000
    weights = np.cumprod(np.concatenate([[k / n], (behind - k + 1) / behind]))
    considered = np.sort(y_n)[: n - k + 1]
    best = math.inf if considered[-1] == math.inf else float(considered @ weights)
    return best if minimise else -best


def paired_correlation(arm_S: ArrayLike, baseline_S: ArrayLike) -> float:
    """Pearson correlation over seed pairs: sd of the differences = sd · √(2 (1 − rho)) where both sd are equal.

    NaN below three seeds (two points always lie on a line) or where one side does not vary.

    Args:
        arm_S: (S,), one value per seed.
        baseline_S: (S,), the same seeds in the same order.
    """
    arm_S, baseline_S = finite_array(arm_S, "arm_S"), finite_array(baseline_S, "baseline_S")
    if arm_S.size != baseline_S.size:
        raise ValueError(f"arm_S: got {arm_S.size} seeds; expected the baseline's {baseline_S.size}.")
    if arm_S.size < 3 or np.ptp(arm_S) == 0 or np.ptp(baseline_S) == 0:
        return math.nan
    return float(np.corrcoef(arm_S, baseline_S)[0, 1])
