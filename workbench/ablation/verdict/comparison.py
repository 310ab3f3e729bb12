"""An arm against another over paired seeds: what was measured, what is missing, and the tests of the difference.

Legend: S report seeds, D report documents. Lower is better; a difference is arm − reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from workbench.ablation.verdict.bootstrap import Bootstrap, crossed_bootstrap
from workbench.ablation.verdict.control import AdjustedTTest, ControlVariate
from workbench.ablation.verdict.hypotheses import ExactTest, PairedTest, Side, TTest, fisher, skewness
from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.statistics import (
    MIN_SEEDS,
    POWER,
    ROUNDING,
    Floats,
    detectable_difference,
    paired_correlation,
    paired_interval,
    ratio_of_sums,
)

__all__ = ["ArmMeasurements", "Claim", "Comparison", "Imputation", "Rules"]


@dataclass(frozen=True, eq=False)
class ArmMeasurements:
    """What the report runs of one arm measured on the sealed report documents.

    A run that did not finish is a failure with its status, never a row of NaN.
    """

    arm: str
    amounts: Mapping[int, np.ndarray]
    """Seed -> (D,), the metric's numerator for each report document: bits, errors."""
    sizes_D: np.ndarray
    """(D,), its denominator: bytes, answers."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Seed -> status of a run that did not finish, such as "diverged at step 1,200"."""
    clusters_D: np.ndarray | None = None
    """(D,), documents of one number are alike and are resampled together; None if every document is its own cluster."""
    control: ControlVariate | None = None
    """What adjusts its difference to the baseline, declared as ``protocol.control_variate``."""

    def __post_init__(self) -> None:
        sizes_D = np.asarray(self.sizes_D)
        if sizes_D.ndim != 1 or sizes_D.size == 0 or not (np.isfinite(sizes_D) & (sizes_D > 0)).all():
            raise ValueError(f"arm {self.arm!r}: sizes_D: got {sizes_D}; expected one positive size per document.")
        if self.clusters_D is not None and np.shape(self.clusters_D) != sizes_D.shape:
            got = np.shape(self.clusters_D)
            raise ValueError(f"arm {self.arm!r}: clusters_D: got shape {got}; expected {sizes_D.shape}.")
        for seed, amounts_D in self.amounts.items():
            where = f"arm {self.arm!r}, seed {seed}"
            if seed in self.failures:
                raise ValueError(f"{where}: both measured and failed ({self.failures[seed]}). Keep one of the two.")
            if np.shape(amounts_D) != sizes_D.shape:
                raise ValueError(f"{where}: got amounts of shape {np.shape(amounts_D)}; expected {sizes_D.shape}.")
            if not np.isfinite(amounts_D).all():
                raise ValueError(f"{where}: got NaN or infinite amounts. Record the run in failures, as diverged.")

    def unfinished(self, seeds: Sequence[int]) -> dict[int, str]:
        """Those of ``seeds`` without a measurement -> status. A run that nobody recorded counts as failed."""
        return {seed: self.failures.get(seed, "no result") for seed in seeds if seed not in self.amounts}

    @property
    def num_clusters(self) -> int:
        """Clusters that the documents belong to."""
        return np.size(self.sizes_D) if self.clusters_D is None else np.unique(self.clusters_D).size

    def finished(self, seeds: Sequence[int]) -> Floats:
        """Amounts of those of ``seeds`` that finished, (S, D)."""
        rows = [np.asarray(self.amounts[seed], np.float64) for seed in seeds if seed in self.amounts]
        return np.array(rows).reshape(len(rows), np.size(self.sizes_D))

    def values(self, seeds: Sequence[int]) -> Floats:
        """The metric of those of ``seeds`` that finished, (S,)."""
        return np.array([self._metric[seed] for seed in seeds if seed in self._metric])

    @cached_property
    def _metric(self) -> dict[int, float]:
        """Seed -> the metric."""
        seeds = list(self.amounts)
        return dict(zip(seeds, ratio_of_sums(self.finished(seeds), self.sizes_D).tolist())) if seeds else {}

    def imputed(self, seeds: Sequence[int], value: float) -> Floats:
        """The metric of all ``seeds``, (S,), with ``value`` for a run that did not finish."""
        value_S = np.full(len(seeds), value)
        value_S[[seed in self.amounts for seed in seeds]] = self.values(seeds)
        return value_S


@dataclass(frozen=True)
class Rules:
    """What all comparisons of a verdict share."""

    alpha: float
    family: int
    """Comparisons that the claims are adjusted over."""
    margin: float | None = None
    effect: float | None = None
    """Smallest difference of interest."""
    unit: str = ""
    upper: float | None = None
    """Largest value of the metric; None if it has no bound."""
    replicates: int = 10_000
    """Of the bootstrap; 0 leaves it out."""
    least: float = 0.0
    """Best value that a missing run could have had."""
    most: float = math.inf
    """Worst value that a missing run could have had."""
    ordered: bool = False
    """Whether the metric is one of several that are tested in a declared order."""


@dataclass(frozen=True)
class Imputation:
    """Mean difference over all declared seeds, with missing runs replaced: the bound on what failures could change."""

    low: float
    """The arm's missing runs count as the best possible value, the reference's as the worst."""
    high: float
    """The other way round."""

    @property
    def keeps_sign(self) -> bool:
        """Whether the difference has one sign whatever the missing runs would have measured."""
        return self.low > 0 or self.high < 0


class Comparison:
    """An arm against a reference, over the seeds that both finished.

    At a look of a sequential design, p-values and bounds of tests are the repeated ones
    (:mod:`workbench.ablation.verdict.sequential`), which are made for t. Exact tests are adjusted over declared looks
    by Bonferroni; under an anytime-valid design, whose looks have no number, they claim nothing.

    Args:
        reference: the arm that it is compared with.
        arm: the arm.
        seeds: declared seeds, of which the first of ``reading`` are read.
        rules: of the verdict.
        reading: the look at which the arm is read. Default: all seeds, once.
    """

    def __init__(
        self,
        reference: ArmMeasurements,
        arm: ArmMeasurements,
        seeds: Sequence[int],
        rules: Rules,
        reading: Reading | None = None,
    ):
        self.reading = reading or Reading(1, (len(seeds),))
        seeds = seeds[: self.reading.seeds]
        self.reference, self.arm, self.rules, self.seeds = reference, arm, rules, seeds
        self.paired = [seed for seed in seeds if seed in arm.amounts and seed in reference.amounts]
        self.n = len(self.paired)
        self.arm_S, self.reference_S = arm.values(self.paired), reference.values(self.paired)
        self.differences_S: Floats = self.arm_S - self.reference_S
        self.differences_S[np.abs(self.differences_S) < ROUNDING] = 0
        self.test: PairedTest | None = None
        if self.n:
            self.test = self._t_test() if rules.upper is None else self._exact_test(self.arm_S, self.reference_S)

    @property
    def mean(self) -> float:
        """Mean paired difference."""
        return self.test.mean if isinstance(self.test, AdjustedTTest) else float(self.differences_S.mean())

    def _t_test(self) -> TTest:
        if self.arm.control is None or not set(self.paired) <= set(self.arm.control.selection):
            return TTest(self.differences_S)
        return AdjustedTTest(dict(zip(self.paired, self.differences_S.tolist())), self.arm.control)

    def _exact_test(self, arm_S: Floats, reference_S: Floats) -> ExactTest:
        rules, answers = self.rules, float(np.sum(self.arm.sizes_D))
        assert rules.upper is not None
        level = rules.alpha / (2 * rules.family * len(self.reading.looks))
        return ExactTest(arm_S, reference_S, rules.upper, answers, level)

    @cached_property
    def is_constant(self) -> bool:
        """Whether the difference is the same in all seeds: the change or the seed never reached the model, or the task
        has no room between the runs."""
        return self.n > 1 and bool(np.ptp(self.differences_S) < ROUNDING)

    @cached_property
    def imputation(self) -> Imputation | None:
        """The bound on what missing runs could change; None if none is missing."""
        if self.n == len(self.seeds):
            return None
        best, worst = self.rules.least, self.rules.most

        def mean(arm_value: float, reference_value: float) -> float:
            arm_S = self.arm.imputed(self.seeds, arm_value)
            return float((arm_S - self.reference.imputed(self.seeds, reference_value)).mean())

        return Imputation(mean(best, worst), mean(worst, best))

    @property
    def may_claim(self) -> bool:
        """Whether a difference may be claimed. Runs of the arm that failed are no random sample of its runs, so the
        sign must not depend on them."""
        return not self.arm.unfinished(self.seeds) or (self.imputation is not None and self.imputation.keeps_sign)

    @property
    def may_be_equivalent(self) -> bool:
        """Whether equivalence may be claimed: missing runs must not leave the margin."""
        bound, margin = self.imputation, self.rules.margin
        return margin is not None and (bound is None or max(-bound.low, bound.high) < margin)

    def p(self, side: Side) -> float:
        """One-sided p-value of the claim at this look; 1 where none may be made.

        Where runs are missing, it is the larger one of that of the pairs and of that of all seeds with every missing
        run at the less favourable end of what its arm measured (ours): runs that failed because they were bad would
        otherwise make claims too often.
        """
        if self.test is None or not self.may_claim:
            return 1.0
        p = self.test.p(side)
        return p if self.n == len(self.seeds) or p == 1 else max(p, self._imputed_test(side).p(side))

    @property
    def rests_on_missing(self) -> bool:
        """Whether the pairs alone show a difference, and missing runs are why none may be claimed."""
        sides: tuple[Side, Side] = (1, -1)
        if self.test is None or self.n == len(self.seeds):
            return False
        return any(2 * self.test.p(side) <= self.rules.alpha < 2 * self.p(side) for side in sides)

    def _imputed_test(self, side: Side) -> PairedTest:
        """The test of all seeds, with missing runs where they are least favourable to the claim of ``side``."""
        best, worst = (np.min, np.max) if side > 0 else (np.max, np.min)
        arm_S = self.arm.imputed(self.seeds, float(best(self.arm.values(self.seeds))))
        reference_S = self.reference.imputed(self.seeds, float(worst(self.reference.values(self.seeds))))
        return TTest(arm_S - reference_S) if self.rules.upper is None else self._exact_test(arm_S, reference_S)

    def repeated_p(self, side: Side) -> float:
        """The same, adjusted over looks."""
        return self._over_looks(self.p(side))

    def _over_looks(self, p: float) -> float:
        """A one-sided p-value of this look, adjusted over all looks."""
        if not self.reading.is_sequential or p > 0.5:
            return p
        if isinstance(self.test, ExactTest):
            return 1.0 if self.reading.scale is not None else min(1.0, p * len(self.reading.looks))
        return self.reading.adjusted(2 * p, self.n) / 2

    def _at_look(self, level: float) -> float:
        """The one-sided level of a test at this look that keeps ``level`` over all looks; 0 where there is none."""
        if isinstance(self.test, ExactTest) and self.reading.is_sequential:
            return 0.0 if self.reading.scale is not None else level / len(self.reading.looks)
        return self.reading.nominal(2 * level, self.n) / 2 if self.n else level

    @cached_property
    def p_equivalence(self) -> float | None:
        """p-value of equivalence, adjusted over looks; None without a margin, 1 where it may not be claimed."""
        if self.rules.margin is None:
            return None
        may_claim = self.test is not None and self.may_be_equivalent
        return self._over_looks(self.test.p_within(self.rules.margin)) if may_claim and self.test is not None else 1.0

    def bound(self, side: Side, level: float) -> float:
        """End of a one-sided interval (:meth:`PairedTest.bound`) that holds over all looks; infinite where nothing was
        measured."""
        at_look = self._at_look(level)
        return self.test.bound(side, at_look) if self.test is not None and at_look else side * math.inf

    @property
    def repeated_interval(self) -> tuple[float | None, float | None]:
        """The two-sided interval at level 1 − alpha over all looks of a sequential design; None where it is infinite,
        and for a fixed design."""
        if not self.reading.is_sequential:
            return None, None
        low, high = self.bound(-1, self.rules.alpha / 2), self.bound(1, self.rules.alpha / 2)
        return (None if math.isinf(low) else low, None if math.isinf(high) else high)

    @property
    def least(self) -> float:
        """The least two-sided p-value that the test can reach over all looks."""
        return 1.0 if self.test is None else min(1.0, 2 * self._over_looks(self.test.least / 2))

    @cached_property
    def interval(self) -> tuple[float | None, float | None]:
        """The two-sided interval at level 1 − alpha, inside the range of the metric; None where it is unknown.

        Exact tests with too few seeds for such an interval have the t-interval, which is approximate.
        """
        if self.test is None:
            return None, None
        alpha = self.rules.alpha
        low, high = self.test.bound(-1, alpha / 2), self.test.bound(1, alpha / 2)
        upper = self.rules.upper
        if upper is not None and not self.has_exact_interval and not self.is_constant:
            interval = paired_interval(self.differences_S, alpha)
            low, high = max(interval.low, -upper), min(interval.high, upper)
        return (None if self.n < 2 or math.isinf(low) else low, None if self.n < 2 or math.isinf(high) else high)

    @property
    def has_exact_interval(self) -> bool:
        """Whether sign flips can give an interval at level 1 − alpha."""
        return isinstance(self.test, ExactTest) and self.test.least_flip <= self.rules.alpha * self.test.flip_weight

    @cached_property
    def bootstrap(self) -> Bootstrap | None:
        """The crossed bootstrap; None where it was left out or one pair is all there is."""
        if self.n < 2 or not self.rules.replicates:
            return None
        return crossed_bootstrap(
            self.arm.finished(self.paired),
            self.reference.finished(self.paired),
            self.arm.sizes_D,
            self.arm.clusters_D,
            replicates=self.rules.replicates,
            level=1 - self.rules.alpha,
        )

    @cached_property
    def rho(self) -> float | None:
        """Correlation over paired seeds; None if it is unknown."""
        rho = paired_correlation(self.arm_S, self.reference_S) if self.n else math.nan
        return None if math.isnan(rho) else rho

    @cached_property
    def sd(self) -> float:
        """Standard deviation of the differences; NaN below two seeds."""
        return float(self.differences_S.std(ddof=1)) if self.n > 1 else math.nan

    @cached_property
    def raw_detectable(self) -> float | None:
        """The true difference that t shows with 80 % power at alpha / family; None if that is unknown."""
        if self.n < MIN_SEEDS or self.is_constant:
            return None
        level = 2 * self._at_look(self.rules.alpha / self.rules.family / 2)
        return self.sd * detectable_difference(self.n, level, POWER) if level else None

    @property
    def detectable(self) -> float | None:
        """The same, where it is possible: within the metric's range and with a decisive outcome."""
        value, upper = self.raw_detectable, self.rules.upper
        possible = value is not None and (upper is None or value <= upper)
        return value if possible and self.least * self.rules.family <= self.rules.alpha else None

    @cached_property
    def skewness(self) -> float | None:
        """Sample skewness of the differences; None if it is unknown."""
        value = skewness(self.differences_S) if self.n else math.nan
        return None if math.isnan(value) else value

    @cached_property
    def survival_p(self) -> float | None:
        """Fisher's exact test of how many runs finished, two-sided; None if as many did."""
        lost, others = (len(part.unfinished(self.seeds)) for part in (self.arm, self.reference))
        total = len(self.seeds)
        return None if lost == others else fisher(total - lost, total, total - others, total)


@dataclass(frozen=True)
class Claim:
    """The word about one comparison and the numbers that it follows from, adjusted over the family."""

    word: str
    p: float
    p_holm: float
    p_equivalence: float | None
    simultaneous_low: float | None
    simultaneous_high: float | None
