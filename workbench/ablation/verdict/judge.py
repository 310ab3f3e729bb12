"""From the measured report runs of an ablation to its verdict: who is better, by how much, with what certainty.

Legend: S report seeds, D report documents. Lower is better; a difference is arm − baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from workbench.ablation.verdict import wording
from workbench.ablation.verdict.comparison import ArmMeasurements, Claim, Comparison, Rules
from workbench.ablation.verdict.hypotheses import SOLVED, compatible_bounds, directional_holm
from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.statistics import holm, holm_in_order, noise_floor
from workbench.ablation.verdict.subject import Subject
from workbench.ablation.verdict.verdict import ArmVerdict, PairVerdict, Verdict
from workbench.metric import BITS_PER_BYTE

__all__ = ["Score", "claims", "claims_in_order", "judge", "judge_in_order"]


def judge(
    baseline: ArmMeasurements,
    arms: Sequence[ArmMeasurements],
    *,
    alpha: float = 0.05,
    margin: float | None = None,
    exploratory: str | None = None,
    seeds: Sequence[int],
    replicates: int = 10_000,
    unit: str = BITS_PER_BYTE.unit,
    effect: float | None = None,
    declared: tuple[str, ...] = (),
    subject: Subject | None = None,
    upper: float | None = None,
    reservations: Mapping[str, Sequence[str]] | None = None,
    comparisons: Literal["baseline", "all_pairs"] = "baseline",
    readings: Mapping[str, Reading] | None = None,
) -> Verdict:
    """The verdict on ``arms`` against ``baseline``, or on all pairs.

    1. Pairs are the seeds that both arms finished. A metric without an upper bound is tested by paired t, an error rate
       by exact tests (:class:`workbench.ablation.verdict.hypotheses.ExactTest`); below four pairs nothing is claimed.
    2. If a margin was declared, ``equivalent`` where the p-value of two one-sided tests, adjusted by Holm over the
       family, is at most alpha: also where the difference is not zero, since it was declared not to matter.
    3. Otherwise ``better`` or ``worse`` where p, adjusted by Holm over the family in each direction, is at most alpha.
    4. A run of the arm that failed leaves a claim only if it holds the sign with the missing run at its best and at its
       worst; otherwise the arm is ``failed``. A failed run of the baseline removes its pair, and the bound is stated.
       Where runs are missing, claims also need the p-value of all seeds, with every missing run at the less favourable
       end of what its arm measured (:meth:`workbench.ablation.verdict.comparison.Comparison.p`). A test that cannot be
       made stays in the family with p = 1.
    5. Otherwise ``undecided``, with the reason: too few seeds, no spread, or the difference that would have been shown
       with 80 % power at alpha / family (ours: Holm's strictest threshold, which suffices whatever the other arms do).

    So alpha bounds two rates: of any false ``better`` or ``worse``, and of any false ``equivalent``, in one verdict.
    They hold for noise over seeds that is symmetric between arm and baseline; t also needs it to be about normal.

    The crossed bootstrap over seeds and clusters of documents decides nothing; if it disagrees with the interval about
    excluding zero, the sentence says so.

    Args:
        baseline: measurements of the arm that all others are compared with.
        arms: the other arms, all of those declared.
        alpha: bound of each of the two error rates.
        margin: the largest difference that would not matter; None claims no equivalence.
        exploratory: the reason, if the ablation deviated from what was declared.
        seeds: the declared report seeds. Runs of other seeds are ignored: a failed seed has no substitute.
        replicates: of the bootstrap; 0 leaves it out.
        unit: of the metric, used in the sentences.
        effect: the smallest difference of interest; sentences say how a difference compares with it.
        declared: what was declared before launch, to be quoted.
        subject: what was compared, on which documents.
        upper: largest value of the metric (:attr:`workbench.metric.Metric.upper`).
        reservations: arm -> sentences that limit the claim about it.
        comparisons: "baseline" compares each arm with the baseline; "all_pairs" compares every two arms, and the claims
            of all pairs are one family.
        readings: arm -> the look of a sequential design at which it is read, on the first of ``seeds``. Default: all
            of ``seeds``, once. p-values are adjusted over looks before they are adjusted over the family
            (:mod:`workbench.ablation.verdict.sequential`). Two arms are compared at the earlier of their looks.

    Raises:
        ValueError: when arms were measured on different documents, or names or seeds repeat.

    >>> noise, sizes = np.random.default_rng(0), np.array([900, 1200])
    >>> full = {seed: sizes * noise.normal(1.0, 5e-4, 2) for seed in range(5)}
    >>> gdn = {seed: bits + sizes * noise.normal(0.01, 5e-4, 2) for seed, bits in full.items()}
    >>> verdict = judge(ArmMeasurements("full", full, sizes), [ArmMeasurements("gdn", gdn, sizes)], seeds=range(5))
    >>> [row.verdict for row in verdict.rows]
    ['baseline', 'worse']
    """
    score = Score([baseline, *arms], unit, upper, margin, effect)
    case = _Case(score, alpha, seeds, replicates, comparisons, readings)
    verdict = case.verdict(claims(case.compared, alpha), exploratory, subject, reservations or {})
    return replace(verdict, declared=declared, subject=subject)


@dataclass(frozen=True)
class Score:
    """What arms measured in one metric, in which lower is better."""

    arms: Sequence[ArmMeasurements]
    """The baseline first; empty if nobody measured it."""
    unit: str
    """Of the metric: "bits per byte", "1 − accuracy"."""
    upper: float | None = None
    """Largest value of a rate, whose least is 0; None for a metric without bound."""
    margin: float | None = None
    effect: float | None = None
    label: str = ""
    """The metric in words, beside others."""


def judge_in_order(
    scores: Sequence[Score],
    *,
    baseline: str,
    alpha: float = 0.05,
    exploratory: str | None = None,
    seeds: Sequence[int],
    replicates: int = 10_000,
    comparisons: Literal["baseline", "all_pairs"] = "baseline",
    readings: Mapping[str, Reading] | None = None,
) -> tuple[Verdict, ...]:
    """A verdict for every score, which are one family in the order of their importance (:func:`claims_in_order`).

    Each is judged by the tests of :func:`judge`. A score that nobody measured stays in the order with p = 1, so that no
    later one is claimed.

    Args:
        scores: most important first, all of the same arms.
        baseline: name of the baseline.
        alpha, exploratory, seeds, replicates, comparisons, readings: as in :func:`judge`.
    """
    cases = [
        _Case(score, alpha, seeds, replicates, comparisons, readings, ordered=True) if score.arms else None
        for score in scores
    ]
    judged = iter(claims_in_order([case.compared if case else None for case in cases], alpha))
    verdicts = []
    for score, case in zip(scores, cases, strict=True):
        verdict = Verdict(baseline, (), None, alpha, score.margin, exploratory, score.unit)
        if case is not None:
            verdict = case.verdict(next(judged), exploratory, None, {})
        verdicts.append(replace(verdict, label=score.label))
    return tuple(verdicts)


class _Case:
    """The comparisons of a verdict, before there are claims about them.

    Args:
        score: what was measured.
        alpha, seeds, replicates, comparisons, readings: as in :func:`judge`.
        ordered: whether the score is one of several that are tested in an order.
    """

    def __init__(
        self,
        score: Score,
        alpha: float,
        seeds: Sequence[int],
        replicates: int,
        comparisons: Literal["baseline", "all_pairs"],
        readings: Mapping[str, Reading] | None,
        ordered: bool = False,
    ):
        self.baseline, *self.arms = score.arms
        self.unit = score.unit
        _check(self.baseline, self.arms, alpha, score.margin, seeds)
        couples = [(self.baseline, arm) for arm in self.arms]
        self.all_pairs = comparisons == "all_pairs"
        if self.all_pairs:
            couples += list(combinations(self.arms, 2))
        values, upper = np.concatenate([part.values(seeds) for part in score.arms]), score.upper
        least, most = (0.0, upper) if upper is not None else (min(values, default=0.0), max(values, default=math.inf))
        self.rules = Rules(
            alpha=alpha,
            family=max(1, len(couples)),
            margin=score.margin,
            effect=score.effect,
            unit=score.unit if " per " in score.unit else f"in {score.unit}",  # it follows a number in sentences
            upper=upper,
            replicates=replicates,
            least=float(least),
            most=float(most),
            ordered=ordered,
        )
        once = Reading(1, (len(seeds),))
        at = {part.arm: once if readings is None else readings[part.arm] for part in self.arms}
        latest = max(at.values(), key=lambda reading: reading.seeds, default=once)
        at[self.baseline.arm] = latest
        self.seeds = seeds[: latest.seeds]
        self.compared = [
            Comparison(one, two, seeds, self.rules, min(at[one.arm], at[two.arm], key=lambda reading: reading.seeds))
            for one, two in couples
        ]

    def verdict(
        self,
        judged: Sequence[Claim],
        exploratory: str | None,
        subject: Subject | None,
        reservations: Mapping[str, Sequence[str]],
    ) -> Verdict:
        """The verdict that claims about the comparisons make."""
        about = subject or Subject()
        rows = [_baseline_row(self.baseline, self.seeds, self.rules)]
        for comparison, claim in zip(self.compared[: len(self.arms)], judged, strict=False):
            rows.append(_arm_row(comparison, claim, about, tuple(reservations.get(comparison.arm.arm, ()))))
        if exploratory is not None:
            rows = [_relabelled(row, exploratory) for row in rows]
        pairs = [_pair(*both, about) for both in zip(self.compared, judged, strict=True)] if self.all_pairs else []
        value_S, rules = self.baseline.values(self.seeds), self.rules
        floor = noise_floor(value_S) if len(value_S) > 1 else None
        return Verdict(
            self.baseline.arm,
            tuple(rows),
            floor,
            rules.alpha,
            rules.margin,
            exploratory,
            self.unit,
            pairs=tuple(pairs),
        )


def claims(compared: Sequence[Comparison], alpha: float) -> list[Claim]:
    """The words of a family of comparisons: Holm in each direction, Holm over equivalences, compatible intervals.

    Args:
        compared: the family, with the same rules.
        alpha: bound of the error rate of differences, and of that of equivalences.
    """
    p_worse, p_better = ([comparison.repeated_p(side) for comparison in compared] for side in (1, -1))
    worse_m, better_m = directional_holm(p_worse, p_better)
    raw = [comparison.p_equivalence for comparison in compared]
    within_m = [None if p is None else float(q) for p, q in zip(raw, holm([p or 0.0 for p in raw]), strict=True)]
    low_m = compatible_bounds(compared, worse_m, 1, alpha)
    high_m = compatible_bounds(compared, better_m, -1, alpha)
    judged = []
    for i, comparison in enumerate(compared):
        p_adjusted = float(min(worse_m[i], better_m[i]))
        word = _word(comparison, p_adjusted, "worse" if worse_m[i] < better_m[i] else "better", within_m[i], alpha)
        low, high = (None if comparison.n < 2 or math.isinf(end) else end for end in (low_m[i], high_m[i]))
        judged.append(Claim(word, _p(comparison), p_adjusted, within_m[i], low, high))
    return judged


def claims_in_order(compared_k: Sequence[Sequence[Comparison] | None], alpha: float) -> list[list[Claim]]:
    """The words of several metrics in their declared order, one family: the metrics of a comparison are tested one
    after the other (:func:`workbench.ablation.verdict.statistics.holm_in_order`).

    The probability of any claim of a difference where there is none is at most alpha over all metrics and comparisons,
    whatever their dependence, and so is that of any false equivalence, whose order skips metrics without margin. A test
    is two-sided: of claims with the wrong sign, a fixed order keeps alpha for independent and for positively dependent
    metrics (Grandhi, Guo & Romano 2016, arXiv 1602.02345). There are no simultaneous intervals.

    Args:
        compared_k: the comparisons of each metric, the same ones; None for a metric that nobody measured.
        alpha: bound of the error rate of differences, and of that of equivalences.

    Returns:
        the claims about the metrics that were measured.
    """
    measured = [compared for compared in compared_k if compared is not None]
    if not measured or not measured[0]:
        return [[] for _ in measured]
    missing = [1.0] * len(measured[0])
    p_km = [_two_sided(compared) if compared is not None else missing for compared in compared_k]
    adjusted_km = holm_in_order(np.array(p_km).T).T[[compared is not None for compared in compared_k]]
    within_km: list[list[float | None]] = [[None] * len(missing) for _ in measured]
    with_margin = [k for k, compared in enumerate(measured) if compared[0].rules.margin is not None]
    if with_margin:
        raw_mk = [[_within(comparison) for comparison in measured[k]] for k in with_margin]
        for k, within_m in zip(with_margin, holm_in_order(np.array(raw_mk).T).T.tolist()):
            within_km[k] = within_m
    return [
        [
            Claim(_word(comparison, p, _side(comparison), within, alpha), _p(comparison), p, within, None, None)
            for comparison, p, within in zip(compared, adjusted_m, within_m, strict=True)
        ]
        for compared, adjusted_m, within_m in zip(measured, adjusted_km.tolist(), within_km, strict=True)
    ]


def _within(comparison: Comparison) -> float:
    """p-value of equivalence; 1 where there is none."""
    return 1.0 if comparison.p_equivalence is None else comparison.p_equivalence


def _two_sided(compared: Sequence[Comparison]) -> list[float]:
    """Two-sided p-values, adjusted over looks."""
    return [min(1.0, 2 * min(comparison.repeated_p(1), comparison.repeated_p(-1))) for comparison in compared]


def _side(comparison: Comparison) -> str:
    return "worse" if comparison.repeated_p(1) < comparison.repeated_p(-1) else "better"


def _p(comparison: Comparison) -> float:
    """Two-sided p-value of one comparison at its look."""
    return min(1.0, 2 * min(comparison.p(1), comparison.p(-1)))


def _word(comparison: Comparison, p_adjusted: float, side: str, within: float | None, alpha: float) -> str:
    """The word about a comparison, from its adjusted p-values of a difference and of equivalence."""
    if within is not None and within <= alpha:  # declared not to matter, whatever its sign
        return "equivalent"
    if p_adjusted <= alpha:
        return side
    return "failed" if comparison.n == 0 or comparison.arm.unfinished(comparison.seeds) else "undecided"


def _check(
    baseline: ArmMeasurements,
    arms: Sequence[ArmMeasurements],
    alpha: float,
    margin: float | None,
    seeds: Sequence[int],
) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: got {alpha}; expected a number between 0 and 0.5.")
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"margin: got {margin}; expected a positive number in the metric's unit, or None.")
    if len(seeds) == 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {list(seeds)}; expected at least one, each once: a repeat is no second unit.")
    names = [baseline.arm, *(arm.arm for arm in arms)]
    if len(set(names)) < len(names):
        raise ValueError(f"arms: got the names {names}; expected each once, the baseline not among the arms.")
    for arm in arms:
        if not np.array_equal(arm.sizes_D, baseline.sizes_D):
            raise ValueError(
                f"arm {arm.arm!r}: its documents are not those of {baseline.arm!r} (their sizes differ). "
                "Evaluate both on the same report documents, in the same order."
            )


def _counts(arm: ArmMeasurements, seeds: Sequence[int], upper: float | None) -> dict[str, Any]:
    """What every row has: the metric and counts of the runs that finished."""
    value_S = arm.values(seeds)
    return {
        "arm": arm.arm,
        "value": float(value_S.mean()) if len(value_S) else None,
        "value_sd": float(value_S.std(ddof=1)) if len(value_S) > 1 else None,
        "seeds": len(value_S),
        "failed": len(seeds) - len(value_S),
        "solved": None if upper is None else int((value_S <= SOLVED * upper).sum()),
    }


def _baseline_row(baseline: ArmMeasurements, seeds: Sequence[int], rules: Rules) -> ArmVerdict:
    counts = _counts(baseline, seeds, rules.upper)
    word = "baseline" if counts["seeds"] else "failed"
    return ArmVerdict(**counts, verdict=word, sentence=wording.baseline(baseline, seeds, rules))


def _arm_row(comparison: Comparison, claim: Claim, subject: Subject, reservations: tuple[str, ...]) -> ArmVerdict:
    bootstrap, imputation, reading = comparison.bootstrap, comparison.imputation, comparison.reading
    repeated_low, repeated_high = comparison.repeated_interval
    return ArmVerdict(
        **_counts(comparison.arm, comparison.seeds, comparison.rules.upper),
        **_judged(comparison, claim),
        bootstrap_low=None if bootstrap is None else bootstrap.low,
        bootstrap_high=None if bootstrap is None else bootstrap.high,
        rho=comparison.rho,
        detectable=comparison.detectable,
        sentence=" ".join([wording.sentence(comparison, claim, subject), *reservations]),
        reservations=reservations,
        least_p=comparison.least,
        skewness=comparison.skewness,
        imputed_low=None if imputation is None or math.isinf(imputation.low) else imputation.low,
        imputed_high=None if imputation is None or math.isinf(imputation.high) else imputation.high,
        survival_p=comparison.survival_p,
        repeated_low=repeated_low,
        repeated_high=repeated_high,
        level=reading.nominal(comparison.rules.alpha) if reading.is_sequential else None,
    )


def _judged(comparison: Comparison, claim: Claim) -> dict[str, Any]:
    """What the rows of arms and of pairs have in common."""
    low, high = comparison.interval
    return {
        "verdict": claim.word,
        "difference": comparison.mean if comparison.n else None,
        "low": low,
        "high": high,
        "simultaneous_low": claim.simultaneous_low,
        "simultaneous_high": claim.simultaneous_high,
        "p": claim.p,
        "p_holm": claim.p_holm,
        "p_equivalence": claim.p_equivalence,
    }


def _relabelled(row: ArmVerdict, exploratory: str) -> ArmVerdict:
    return replace(row, sentence=f"Exploratory ({exploratory}): {row.sentence}")


def _pair(comparison: Comparison, claim: Claim, subject: Subject) -> PairVerdict:
    return PairVerdict(
        arm=comparison.arm.arm,
        reference=comparison.reference.arm,
        **_judged(comparison, claim),
        seeds=comparison.n,
        sentence=wording.sentence(comparison, claim, subject),
    )
