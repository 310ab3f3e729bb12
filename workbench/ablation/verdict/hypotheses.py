"""Tests of one paired difference, and the decision over a family of them.

Every test is one-sided and is made in both directions, each at alpha / 2: "worse" and "better" are two families of
hypotheses, and Holm's procedure controls the errors of each. So a claim with the wrong sign is an error as well, and
simultaneous intervals exist that agree with every claim (:func:`compatible_bounds`).

Legend: S paired seeds, m tests of the family. A side is +1 (arm worse: the mean difference is positive) or −1 (better).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from workbench.ablation.verdict.statistics import MIN_SEEDS, ROUNDING, Floats, finite_array, holm

__all__ = [
    "SOLVED",
    "ExactTest",
    "PairedTest",
    "Side",
    "TTest",
    "compatible_bounds",
    "directional_holm",
    "fisher",
    "sampling_sd",
    "skewness",
    "skewness_limit",
]

Side = Literal[-1, 1]

SOLVED = 0.1
"""A seed solves a task when its error rate is at most this share of the largest possible (ours)."""

EXHAUSTIVE = 14
"""Up to so many seeds all 2^S sign patterns are counted, above as many random ones (16,384)."""


class PairedTest(Protocol):
    """Evidence about the mean of paired differences."""

    least: float
    """The least two-sided p-value that this number of seeds can reach; 1 where no outcome is decisive."""

    def p(self, side: Side) -> float:
        """One-sided p-value against "the mean difference is zero or on the other side"."""

    def bound(self, side: Side, level: float) -> float:
        """The end of the interval on ``side`` that the mean exceeds with an error of at most ``level``; infinite where
        that is unknown."""

    def p_within(self, margin: float) -> float:
        """p-value against "the mean difference is at least ``margin`` in size": the larger of two one-sided ones."""


class Bounded(Protocol):
    """Anything with one-sided intervals: a test, or a comparison of arms."""

    def bound(self, side: Side, level: float) -> float: ...


class TTest:
    """The paired t-test, for metrics without an upper bound. It decides nothing below ``MIN_SEEDS`` seeds, and nothing
    where the differences do not vary.

    Args:
        differences_S: (S,), arm − baseline.
    """

    def __init__(self, differences_S: ArrayLike):
        differences_S = finite_array(differences_S, "differences_S")
        self.n, self.mean = differences_S.size, float(differences_S.mean())
        self.df = self.n - 1
        self.varies = bool(np.ptp(differences_S) >= ROUNDING)
        self.error = float(differences_S.std(ddof=1)) / math.sqrt(self.n) if self.varies else math.nan
        self.decides = self.varies and self.n >= MIN_SEEDS
        self.least = 0.0 if self.decides else 1.0

    def p(self, side: Side) -> float:
        return self._tail(side * self.mean) if self.decides else 1.0

    def bound(self, side: Side, level: float) -> float:
        if not self.varies:
            return side * math.inf
        return self.mean + side * float(special.stdtrit(self.df, 1 - level)) * self.error

    def p_within(self, margin: float) -> float:
        return self._tail(margin - abs(self.mean)) if self.decides else 1.0

    def _tail(self, distance: float) -> float:
        """P(T ≥ distance / error), never exactly zero."""
        return max(float(special.stdtr(self.df, -distance / self.error)), float(np.finfo(np.float64).tiny))


class ExactTest:
    """Two exact tests for a metric in [0, ``upper``], such as an error rate, whose seeds often solve a task or do not:

    - sign flips of the paired differences: their mean against its 2^S sign patterns, exact where a pair is symmetric
      under exchange of arm and baseline (Fisher 1935); intervals from the means of all subsets (Hartigan 1969);
    - Fisher's exact test of the seeds that solve the task (error rate at most ``SOLVED · upper``).

    One claim suffices, each weighted by its least reachable p so that the weights sum to 1 (weighted Bonferroni, the
    weights ours): with S seeds 2^−S and 1 / C(2S, S). Where sign flips cannot reach ``level`` beside it, Fisher's test
    has the whole weight. The weights depend on S and ``level`` alone, never on what was measured.

    Where the differences do not vary, the mean must also exceed the sampling error of counts: the sd of both means,
    each p (1 − p) / N with p the rate over N examples with half an error added (Jeffreys).

    Args:
        arm_S: (S,), the arm's rates.
        baseline_S: (S,), the baseline's.
        upper: largest possible value.
        answers: N, examples per seed.
        level: the strictest one-sided level that the test is used at: alpha / (2 m).
    """

    def __init__(self, arm_S: ArrayLike, baseline_S: ArrayLike, upper: float, answers: float, level: float):
        arm_S, baseline_S = finite_array(arm_S, "arm_S"), finite_array(baseline_S, "baseline_S")
        self.differences_S = arm_S - baseline_S
        self.differences_S[np.abs(self.differences_S) < ROUNDING] = 0
        self.n, self.mean, self.upper, self.level = arm_S.size, float(self.differences_S.mean()), upper, level
        self.varies = bool(np.ptp(self.differences_S) >= ROUNDING)
        self.solved = int((arm_S <= SOLVED * upper).sum()), int((baseline_S <= SOLVED * upper).sum())
        self.sampling_error = math.hypot(*(sampling_sd(values_S, upper, answers) for values_S in (arm_S, baseline_S)))
        flips, shares = 2.0**-self.n, 1 / math.comb(2 * self.n, self.n)
        both = flips + shares <= level
        self.flip_weight = flips / (flips + shares) if both else 0.0 if shares <= level else 1.0
        self.decides = self.n >= MIN_SEEDS
        self.least = min(1.0, 2 * (flips + shares if both else shares if shares <= level else flips))
        self.least_flip = min(1.0, 2 * flips)

    def p(self, side: Side) -> float:
        if not self.decides or self.mean * side <= 0:
            return 1.0
        if not self.varies and abs(self.mean) <= -special.ndtri(self.level) * self.sampling_error:
            return 1.0
        weights = self.flip_weight, 1 - self.flip_weight
        candidates = zip((self.flip_p(side), self.share_p(side)), weights, strict=True)
        return min(1.0, *(p / weight for p, weight in candidates if weight > 0))

    def flip_p(self, side: Side) -> float:
        """One-sided p-value of the sign flips."""
        return _flip_p(side * self.differences_S)

    def share_p(self, side: Side) -> float:
        """One-sided p-value of Fisher's test: the arm solves the task less often (+1) or more often (−1)."""
        arm, baseline = self.solved if side < 0 else self.solved[::-1]
        return _more_often(arm, baseline, self.n)

    def bound(self, side: Side, level: float) -> float:
        if not self.varies:
            end = self.mean + side * -float(special.ndtri(level)) * self.sampling_error
        else:
            level *= self.flip_weight or 1.0
            means = _subset_means(side * self.differences_S)
            rank = math.floor(level * (means.size + 1) * (1 + ROUNDING))
            end = side * (float(np.partition(means, -rank)[-rank]) if rank else math.inf)
        return min(max(end, -self.upper), self.upper)

    def p_within(self, margin: float) -> float:
        if not self.decides:
            return 1.0
        p = max(_flip_p(margin + side * self.differences_S) for side in (-1, 1))
        if not self.varies:
            p = max(p, float(special.ndtr((abs(self.mean) - margin) / self.sampling_error)))
        return p


def sampling_sd(values_S: Floats, upper: float, answers: float) -> float:
    """Standard deviation of a rate over N examples that comes from counting alone, where seeds share the examples:
    √(p (1 − p) / N) · upper with p = (rate · N + ½) / (N + 1), the posterior mean under Jeffreys' prior."""
    rate = (float(values_S.mean()) / upper * answers + 0.5) / (answers + 1)
    return upper * math.sqrt(max(rate * (1 - rate), 0.0) / answers)


@lru_cache(maxsize=32)
def _subsets(n: int) -> Floats:
    """Non-empty subsets of n seeds as rows of 0 and 1: all of them, or random ones."""
    if n <= EXHAUSTIVE:
        return ((np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
    drawn = np.random.default_rng(n).integers(2, size=(2**EXHAUSTIVE - 1, n)).astype(np.float64)
    return drawn[drawn.any(1)]


def _flip_p(differences_S: Floats) -> float:
    """P(mean of the differences with random signs ≥ the mean): flipping a subset raises the mean where its sum is at
    most 0. The empty subset, which is the data, always counts."""
    sums = _subsets(differences_S.size) @ differences_S
    return float((np.count_nonzero(sums <= ROUNDING) + 1) / (sums.size + 1))


def _subset_means(differences_S: Floats) -> Floats:
    """The mean of every non-empty subset."""
    subsets = _subsets(differences_S.size)
    return (subsets @ differences_S) / subsets.sum(1)


def _more_often(first: int, second: int, n: int) -> float:
    """P(X ≥ first), X hypergeometric: successes of the first of two groups of n when both have first + second."""
    total = first + second
    ways = sum(math.comb(n, k) * math.comb(n, total - k) for k in range(first, min(n, total) + 1))
    return ways / math.comb(2 * n, total)


def fisher(first: int, of_first: int, second: int, of_second: int) -> float:
    """Two-sided p-value of Fisher's exact test of two shares: all tables that are at most as likely as the observed.

    >>> round(fisher(5, 5, 1, 5), 4)
    0.0476
    """
    total = first + second
    low, high = max(0, total - of_second), min(of_first, total)
    ways = [math.comb(of_first, k) * math.comb(of_second, total - k) for k in range(low, high + 1)]
    return sum(w for w in ways if w <= ways[first - low]) / sum(ways)


def directional_holm(p_worse: Sequence[float], p_better: Sequence[float]) -> tuple[Floats, Floats]:
    """Holm's adjusted p-values of a family in both directions, doubled: a difference is shown where one is ≤ alpha.

    Each direction is a family of m one-sided hypotheses at alpha / 2, so the probability of any false claim, a claim
    with the wrong sign included, is at most alpha (Holm 1979; Bonferroni over the two directions).
    """
    worse_m, better_m = (np.minimum(1.0, 2 * holm(p)) for p in (p_worse, p_better))
    return worse_m, better_m


def compatible_bounds(tests: Sequence[Bounded], adjusted_m: Floats, side: Side, alpha: float) -> list[float]:
    """Ends of simultaneous intervals, on the side of the baseline, that agree with Holm's claims (Strassburger and
    Bretz 2008; Guilbaud 2008). For claims of ``side`` +1 these are lower ends, for −1 upper ones.

    Where a claim is made, the end is zero (excluded): the difference is certainly on that side. If all m are claimed,
    it is the Bonferroni bound at alpha / (2 m), or zero if that is farther. Where none is made, it is the bound at
    alpha / (2 k), k the number of tests without a claim in this direction. Both directions together cover all m
    differences with probability 1 − alpha at least.

    Args:
        tests: the family.
        adjusted_m: (m,), from :func:`directional_holm` for this direction.
        side: of the claims.
        alpha: error rate of the family.
    """
    claimed = adjusted_m <= alpha
    left = int((~claimed).sum()) or len(tests)
    ends = []
    for test, is_claimed in zip(tests, claimed, strict=True):
        end = test.bound(-side, alpha / 2 / left)
        if is_claimed:
            end = (max if side > 0 else min)(0.0, end) if claimed.all() else 0.0
        else:
            end = (min if side > 0 else max)(0.0, end)
        ends.append(end)
    return ends


def skewness(differences_S: ArrayLike) -> float:
    """Sample skewness m₃ / m₂^1.5 (divisor n); NaN below three seeds or without spread."""
    differences_S = finite_array(differences_S, "differences_S")
    centred_S = differences_S - differences_S.mean()
    if centred_S.size < 3 or np.ptp(differences_S) < ROUNDING:
        return math.nan
    return float((centred_S**3).mean() / (centred_S**2).mean() ** 1.5)


@lru_cache(maxsize=64)
def skewness_limit(n: int, share: float = 0.05) -> float:
    """The size of :func:`skewness` that ``share`` of samples of n normal seeds exceed (20,000 draws)."""
    draws = np.random.default_rng(n).normal(size=(20_000, n))
    draws -= draws.mean(1, keepdims=True)
    values = (draws**3).mean(1) / (draws**2).mean(1) ** 1.5
    return float(np.quantile(np.abs(values), 1 - share))
