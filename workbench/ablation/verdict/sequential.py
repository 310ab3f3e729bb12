"""Reading a verdict more than once: levels of a paired t-test at each look that keep alpha over all looks.

A declared design (:class:`workbench.ablation.spec.protocol.Stopping`) has looks at n_1 < … < n_K paired seeds. For
each it defines two inverse maps:

    nominal(alpha)   the level of the ordinary paired t-test at this look, such that under the null any look rejects
                     with probability at most alpha;
    adjusted(p)      the smallest alpha at which a test with p-value p rejects at this look: the repeated p-value
                     (Jennison & Turnbull 2000, chapter 9). Over all looks it is ≤ alpha with probability ≤ alpha.

The t-interval at level 1 − nominal(alpha) is the repeated confidence interval, or the confidence sequence: the
intervals of all looks hold together at level 1 − alpha.

*Several arms.* Holm's procedure on the repeated p-values of the arms, an arm that is decided keeping the one of its
look, controls the family-wise error rate over all looks (ours, short): each arm's smallest repeated p-value over all
looks is a valid p-value; Holm on these smallest ones controls the error rate; the p-values used are never smaller, so
nothing is rejected that they would not reject. An arm once rejected stays rejected: of any set of arms that contains
it, the first in Holm's order among those rejected with it is rejected by Bonferroni, whatever the later p-values of the
others are.
The same holds for equivalence, where the p-value is the larger one of two one-sided tests. Maurer & Bretz (2013)
reallocate alpha in the same way. Equivalence goes first in the verdict: an arm that stopped as better or worse is
called equivalent at the end if Holm's procedure rejects its equivalence p-value at a later look.

Legend: n paired seeds, K looks, R points of an integral.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special
from scipy.interpolate import PchipInterpolator
from scipy.stats import qmc

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.verdict.statistics import Floats

__all__ = [
    "Look",
    "Reading",
    "arm_readings",
    "crossing_probability",
    "decided",
    "log_e_value",
    "readings",
    "seeds_needed_now",
]

SHAPE = 0.25
"""Boundaries C · (n_k / n_K)^(SHAPE − ½) in units of z (Wang & Tsiatis 1987): 0.5 gives the same level at every look
(Pocock), 0 nearly nothing at the first (O'Brien & Fleming). Between them, large differences are found early and little
power is lost at the last look."""

DECISIONS = ("better", "worse", "equivalent")
"""Words after which an arm stops."""


@dataclass(frozen=True)
class Reading:
    """One look of a declared design.

    Attributes:
        number: of the look, from 1.
        looks: paired seeds at every look.
        scale: of an anytime-valid design, in units of the sd of the differences; None for the others.
    """

    number: int
    looks: tuple[int, ...]
    scale: float | None = None

    @property
    def seeds(self) -> int:
        """Paired seeds at this look."""
        return self.looks[self.number - 1]

    @property
    def is_sequential(self) -> bool:
        """Whether the design has several looks, or may be continued."""
        return self.scale is not None or len(self.looks) > 1

    def nominal(self, alpha: float, pairs: int | None = None) -> float:
        """Level of the two-sided paired t-test at this look for a level ``alpha`` over all looks; 0 where the design
        can reject nothing at this look.

        Args:
            alpha: between 0 and 1.
            pairs: seed pairs that finished. Default: all of this look.
        """
        n = pairs or self.seeds
        if self.scale is not None:
            return _confidence_sequence_level(n, alpha, self.scale)
        if len(self.looks) == 1:
            return alpha
        return float(2 * special.ndtr(-_boundary(self.looks, alpha / 2) * self._shape))

    def adjusted(self, p: float, pairs: int | None = None) -> float:
        """The repeated p-value: the level over all looks at which a two-sided p-value of this look rejects.

        Args:
            p: of the test at this look.
            pairs: seed pairs that finished. Default: all of this look.
        """
        n = pairs or self.seeds
        if n < 2 or not self.is_sequential:
            return p
        if self.scale is not None:  # bounded away from zero, as the e-value of n values is
            t = -float(special.stdtrit(n - 1, p / 2)) if p > 0 else math.inf
            return float(min(1.0, math.exp(-log_e_value(t, n, self.scale))))
        if p <= 0:
            return p
        boundary = -float(special.ndtri(p / 2)) / self._shape
        levels = [2 * float(special.ndtr(-boundary * shape)) for shape in _shapes(self.looks)]
        overall = 2 * _overall(self.looks, boundary)
        return min(1.0, max(overall, *levels), sum(levels))  # bounds that the integral keeps up to its accuracy

    @property
    def _shape(self) -> float:
        return _shapes(self.looks)[self.number - 1]

    def __str__(self) -> str:
        if self.scale is not None:
            return f"look {self.number} of an anytime-valid design, declared"
        return f"look {self.number} of {len(self.looks)}, declared"


# -- anytime-valid ---------------------------------------------------------------------------------------------------


def log_e_value(t: float, n: int, scale: float) -> float:
    """Logarithm of the e-value of "the mean is zero" after n normal values with unknown variance.

    The Gaussian-mixture t-test martingale of Wang & Ramdas (2024, arXiv 2310.03722, Theorem 4.9), with c = 1 / scale:

        M_n = √(c² / (n + c²)) · ((1 + t² / (n − 1)) / (1 + c² t² / ((n + c²) (n − 1))))^(n / 2)

    the likelihood ratio of the scale-invariant part of the data when mean / sd ~ N(0, scale²). By Ville's inequality
    M_n ≥ 1 / alpha happens at any n with probability at most alpha, under every variance.

    Args:
        t: statistic of the one-sample t-test.
        n: number of values, at least 2.
        scale: sd of mean / sd under the alternative.
    """
    ratio = 1 / (1 + n * scale**2)  # c² / (n + c²)
    square = t * t / (n - 1)
    if math.isinf(square):
        return 0.5 * (1 - n) * math.log(ratio)
    return 0.5 * (math.log(ratio) + n * (math.log1p(square) - math.log1p(ratio * square)))


def _confidence_sequence_level(n: int, alpha: float, scale: float) -> float:
    """Level of the t-test that rejects where M_n ≥ 1 / alpha; 0 where M_n cannot get so large."""
    if n < 2:
        return 0.0
    ratio = 1 / (1 + n * scale**2)
    growth = (ratio * alpha**2) ** (-1 / n)
    if growth * ratio >= 1:
        return 0.0
    t = math.sqrt((n - 1) * (growth - 1) / (1 - growth * ratio))
    return float(2 * special.stdtr(n - 1, -t))


# -- group-sequential ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _shapes(looks: tuple[int, ...]) -> tuple[float, ...]:
    return tuple((n / looks[-1]) ** (SHAPE - 0.5) for n in looks)


def crossing_probability(levels: Sequence[float], looks: Sequence[int], points: int = 2**13) -> float:
    """Probability that a one-sided t-test rejects at any look, for independent normal values of mean zero.

    The integral over the paths of sum and sum of squares, one look after the other: given the path so far and the new
    values' variation, the test rejects for sums of the new values in an interval, whose probability is exact; paths
    that do not reject are continued (separation of variables, Genz 1992), at scrambled Sobol points. Relative accuracy
    about 0.001.

    Args:
        levels: (K,), one-sided level at each look, below 0.5.
        looks: (K,), number of values at each look, increasing, at least 2.
        points: R, a power of two.
    """
    R, K = points, len(looks)
    uniform = np.clip(_sobol(2 * K, R), 1e-12, 1 - 1e-12)
    n = looks[0]
    total = levels[0]
    survival_R = np.full(R, 1 - levels[0])
    # The first look's statistic, given that it does not reject, is independent of the sum of squares.
    t_R = special.stdtrit(n - 1, uniform[:, 0] * (1 - levels[0]))
    squares_R = special.chdtri(n, uniform[:, 1])
    sums_R = np.sqrt(n * squares_R) * t_R / np.sqrt(t_R**2 + n - 1)
    for look in range(1, K):
        before, n = n, looks[look]
        new = n - before
        t = -special.stdtrit(n - 1, levels[look])
        least = n * t**2 / (t**2 + n - 1)  # rejects where the sum is positive and sum² > least · sum of squares
        within_R = special.chdtri(new - 1, uniform[:, 2 * look]) if new > 1 else np.zeros(R)
        # With y the new values' sum / √new: (sum + √new y)² > least (squares + within + y²), a quadratic in y.
        a, b_R = new - least, sums_R * math.sqrt(new)
        discriminant_R = b_R**2 - a * (sums_R**2 - least * (squares_R + within_R))
        root_R = np.sqrt(np.maximum(discriminant_R, 0))
        if a < 0:  # one large value raises the variance more than the mean: an interval, on the side of the sum
            rejects_R = (discriminant_R > 0) & (sums_R > 0)
            low_R = np.where(rejects_R, (-b_R + root_R) / a, np.inf)
            high_R = np.where(rejects_R, (-b_R - root_R) / a, np.inf)
        else:
            low_R, high_R = (-b_R + root_R) / a, np.full(R, np.inf)
        crossing_R = special.ndtr(-low_R) - special.ndtr(-high_R)
        total += float((survival_R * crossing_R).mean())
        survival_R = survival_R * (1 - crossing_R)
        position_R = uniform[:, 2 * look + 1] * (1 - crossing_R)
        position_R += np.where(position_R < special.ndtr(low_R), 0, crossing_R)
        y_R = special.ndtri(np.clip(position_R, 1e-300, 1 - 1e-16))
        sums_R, squares_R = sums_R + math.sqrt(new) * y_R, squares_R + within_R + y_R**2
    return total


@lru_cache(maxsize=4)
def _sobol(dimensions: int, points: int) -> Floats:
    return np.asarray(qmc.Sobol(dimensions, seed=0).random_base2(points.bit_length() - 1))


@lru_cache(maxsize=64)
def _curves(looks: tuple[int, ...]) -> tuple[PchipInterpolator, PchipInterpolator]:
    """Boundary constant C -> z of the one-sided probability to reject at any look, and its inverse."""
    boundaries = np.linspace(0, 8, 25)
    levels = [[float(special.ndtr(-boundary * shape)) for shape in _shapes(looks)] for boundary in boundaries]
    z = -special.ndtri([min(crossing_probability(row, looks), sum(row)) for row in levels])
    return PchipInterpolator(boundaries, z), PchipInterpolator(z, boundaries)


def _overall(looks: tuple[int, ...], boundary: float) -> float:
    forward, _ = _curves(looks)
    return float(special.ndtr(-forward(min(max(boundary, 0.0), 8.0))))


def _boundary(looks: tuple[int, ...], one_sided: float) -> float:
    """The constant C at which a one-sided test rejects at any look with this probability."""
    _, inverse = _curves(looks)
    low, high = inverse.x[0], inverse.x[-1]
    return float(inverse(min(max(-float(special.ndtri(one_sided)), low), high)))


# -- the state of an ablation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """A look that was taken."""

    seeds: int
    """Paired seeds at it."""
    words: Mapping[str, str]
    """Arm -> word of its verdict, every arm beside the baseline."""


def readings(config: AblationConfig, taken: Sequence[Look] = ()) -> tuple[Reading, ...]:
    """Every look of the declared design, at most; one if the verdict is read once.

    Args:
        taken: looks so far. An anytime-valid design that was given more seeds continues after them.
    """
    if not config.protocol.stopping.anytime:
        return tuple(Reading(number, config.looks) for number in range(1, len(config.looks) + 1))
    past = tuple(look.seeds for look in taken)
    looks = past + tuple(n for n in config.looks if n > max(past, default=0))
    return tuple(Reading(number, looks, config.protocol.stopping.scale) for number in range(1, len(looks) + 1))


def decided(taken: Sequence[Look]) -> dict[str, int]:
    """Arm -> number of the look at which it was decided: better, worse or equivalent. Open arms are missing."""
    numbers: dict[str, int] = {}
    for number, look in enumerate(taken, start=1):
        for arm, word in look.words.items():
            if word in DECISIONS:
                numbers.setdefault(arm, number)
    return numbers


def arm_readings(config: AblationConfig, taken: Sequence[Look]) -> dict[str, Reading]:
    """Arm -> the look at which its verdict is read: where it was decided, else the latest. Empty before the first look
    of a sequential design."""
    arms, declared = config.order[1:], readings(config, taken)
    if not config.protocol.stopping.is_sequential:
        return dict.fromkeys(arms, declared[0])
    latest = min(len(taken), len(declared))
    numbers = decided(taken[:latest])
    return {arm: declared[numbers.get(arm, latest) - 1] for arm in arms} if latest else {}


def seeds_needed_now(config: AblationConfig, taken: Sequence[Look], *, at_most: bool = False) -> dict[str, int]:
    """Arm -> the number of confirmation seeds it is run on by the next look. The baseline runs as long as any arm
    does.

    Args:
        taken: looks so far.
        at_most: count to the last look instead, for arms that are open.
    """
    declared = readings(config, taken)
    following = declared[-1 if at_most else min(len(taken), len(declared) - 1)].seeds
    stopped = {}
    if config.protocol.stopping.is_sequential:
        stopped = {arm: declared[number - 1].seeds for arm, number in decided(taken[: len(declared)]).items()}
    baseline, *arms = config.order
    needed = {arm: stopped.get(arm, following) for arm in arms}
    return {baseline: max(needed.values(), default=following), **needed}
