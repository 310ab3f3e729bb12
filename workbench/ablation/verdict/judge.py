"""From the measured report runs of an ablation to its verdict: who is better, by how much, with what certainty.

Legend: S report seeds, D report documents. Lower is better; a difference is arm − baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import polars as pl

from workbench.ablation.verdict import wording
from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.statistics import (
    POWER,
    ROUNDING,
    Floats,
    NoiseFloor,
    crossed_bootstrap,
    detectable_difference,
    equivalent,
    holm,
    noise_floor,
    paired_correlation,
    paired_interval,
    ratio_of_sums,
)
from workbench.ablation.verdict.subject import Subject
from workbench.metric import BITS_PER_BYTE

__all__ = ["WORDS", "ArmMeasurements", "ArmVerdict", "Verdict", "judge"]

WORDS = ("baseline", "better", "worse", "equivalent", "undecided", "failed")
"""Every verdict that a row can have."""


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

    def finished(self, seeds: Sequence[int]) -> Floats:
        """Amounts of those of ``seeds`` that finished, (S, D)."""
        rows = [np.asarray(self.amounts[seed], np.float64) for seed in seeds if seed in self.amounts]
        return np.array(rows).reshape(len(rows), np.size(self.sizes_D))

    def values(self, seeds: Sequence[int]) -> Floats:
        """The metric of those of ``seeds`` that finished, (S,)."""
        amounts_SD = self.finished(seeds)
        return ratio_of_sums(amounts_SD, self.sizes_D) if len(amounts_SD) else np.empty(0)


@dataclass(frozen=True)
class ArmVerdict:
    """One row of a verdict, in the unit of the metric; None if a number does not apply or cannot be known."""

    arm: str
    verdict: str
    """One of ``WORDS``."""
    value: float | None
    """Mean over the finished report seeds."""
    value_sd: float | None
    """Standard deviation over them; from two seeds on."""
    difference: float | None
    """Mean paired difference, arm − baseline; None for an arm that cannot be judged."""
    low: float | None
    """Paired t-interval at level 1 − alpha, not corrected for the number of arms; from two seeds on."""
    high: float | None
    bootstrap_low: float | None
    """Crossed bootstrap over seeds and documents, at the same level; from two seeds on."""
    bootstrap_high: float | None
    simultaneous_low: float | None
    """Paired t-interval at level 1 − alpha / arms: all arms' intervals hold together at level 1 − alpha
    (Bonferroni)."""
    simultaneous_high: float | None
    p: float | None
    """Two-sided paired t-test; 1 for an arm that cannot be judged."""
    p_holm: float | None
    """The same, adjusted over the looks of a sequential design and over all arms: this one decides."""
    repeated_low: float | None
    """Interval of a sequential design at this look: repeated confidence interval or confidence sequence, at level
    1 − alpha over all looks, not corrected for the number of arms; None for a fixed design, and where it is
    infinite."""
    repeated_high: float | None
    level: float | None
    """Level of the paired t-test at this look that keeps alpha over all looks, for one arm; None for a fixed design."""
    seeds: int
    """Report seeds that finished."""
    failed: int
    """Report seeds that did not."""
    rho: float | None
    """Correlation with the baseline over paired seeds; from three seeds on."""
    detectable: float | None
    """The true difference shown with 80 % power at alpha / arms, given the sd of the differences; None if that is
    unknown (one seed) or zero."""
    sentence: str
    """The row in words."""
    reservations: tuple[str, ...] = ()
    """What limits the claim, in sentences: "the optimum lies at the edge of the grid"."""


@dataclass(frozen=True)
class Verdict:
    """The conclusion of an ablation. Two verdicts with the same content are equal."""

    baseline: str
    rows: tuple[ArmVerdict, ...]
    """The baseline first, then the arms in the order given."""
    noise_floor: NoiseFloor | None
    """Standard deviation of the baseline over seeds with its 95 % interval; from two seeds on."""
    alpha: float
    """Family-wise error rate."""
    margin: float | None
    """Equivalence margin, if one was declared."""
    exploratory: str | None
    """Why the ablation is exploratory, if it is."""
    unit: str = BITS_PER_BYTE.unit
    """Unit of the metric, of every number here."""
    declared: tuple[str, ...] = ()
    """What was declared before launch, and what was changed since, in sentences."""
    subject: Subject | None = None
    """What was compared, on which documents; None for archives of earlier versions."""

    def table(self) -> pl.DataFrame:
        """One row per arm; the columns are the fields of :class:`ArmVerdict`."""
        kinds = {"str": pl.String, "int": pl.Int64, "float | None": pl.Float64, "tuple[str, ...]": pl.List(pl.String)}
        schema = {item.name: kinds[str(item.type)] for item in fields(ArmVerdict)}
        return pl.DataFrame([asdict(row) for row in self.rows], schema=schema, orient="row")

    def plain(self) -> dict[str, Any]:
        """The verdict as plain data, fit for JSON: finite numbers, strings, lists and None."""
        floor = self.noise_floor
        return {
            **asdict(self),
            "rows": [asdict(row) | {"reservations": list(row.reservations)} for row in self.rows],
            "declared": list(self.declared),
            "noise_floor": None if floor is None else list(floor),
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Self:
        """The verdict whose :meth:`plain` is ``data``; numbers that an earlier version did not compute are None."""
        floor = data["noise_floor"]
        unknown = {item.name: None for item in fields(ArmVerdict) if item.type == "float | None"}
        rows = tuple(
            ArmVerdict(**{**unknown, **row, "reservations": tuple(row.get("reservations", ()))}) for row in data["rows"]
        )
        subject = data.get("subject")
        changes = {
            "rows": rows,
            "declared": tuple(data.get("declared", ())),
            "noise_floor": None if floor is None else NoiseFloor(*floor),
            "subject": None if subject is None else Subject(**subject),
        }
        return cls(**{**data, **changes})

    def __str__(self) -> str:
        return wording.table(self.rows, alpha=self.alpha, unit=self.unit, declared=self.declared)


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
    readings: Mapping[str, Reading] | None = None,
) -> Verdict:
    """The verdict on ``arms`` against ``baseline``.

    1. An arm with a report seed that did not finish is ``failed``, and so is every arm when the baseline is. It stays
       in the family with p = 1; its value is the mean of the runs that survived.
    2. Otherwise a paired t-test over seeds, adjusted by Holm over all arms, decides: ``better`` or ``worse`` where the
       adjusted p < alpha.
    3. Otherwise, if a margin was declared, ``equivalent`` if the 1 − 2 alpha interval lies inside it.
    4. Otherwise ``undecided``, with the difference that would have been shown with 80 % power at alpha / arms (ours:
       Holm's strictest threshold, which suffices whatever the other arms do) and the seeds needed to show the
       observed difference.

    The crossed bootstrap over seeds and documents decides nothing; if it disagrees with the t-interval about
    excluding zero, the sentence says so.

    Args:
        baseline: measurements of the arm that all others are compared with.
        arms: the other arms, all of those declared.
        alpha: family-wise error rate.
        margin: the largest difference that would not matter; None claims no equivalence.
        exploratory: the reason, if the ablation deviated from what was declared.
        seeds: the declared report seeds. Runs of other seeds are ignored: a failed seed has no substitute.
        replicates: of the bootstrap.
        unit: of the metric, used in the sentences.
        effect: the smallest difference of interest; sentences say how a difference compares with it.
        declared: what was declared before launch, to be quoted.
        subject: what was compared, on which documents.
        upper: largest value of the metric (:attr:`workbench.metric.Metric.upper`).
        reservations: arm -> sentences that limit the claim about it.
        readings: arm -> the look of a sequential design at which it is read, on the first of ``seeds``. Default: all
            of ``seeds``, once. p-values are adjusted over looks before they are adjusted over arms
            (:mod:`workbench.ablation.verdict.sequential`).

    Raises:
        ValueError: when arms were measured on different documents, or names or seeds repeat.

    >>> noise, sizes = np.random.default_rng(0), np.array([900, 1200])
    >>> full = {seed: sizes * noise.normal(1.0, 5e-4, 2) for seed in range(5)}
    >>> gdn = {seed: bits + sizes * noise.normal(0.01, 5e-4, 2) for seed, bits in full.items()}
    >>> verdict = judge(ArmMeasurements("full", full, sizes), [ArmMeasurements("gdn", gdn, sizes)], seeds=range(5))
    >>> [row.verdict for row in verdict.rows]
    ['baseline', 'worse']
    """
    _check(baseline, arms, alpha, margin, seeds)
    once = Reading(1, (len(seeds),))
    at = {arm.arm: once if readings is None else readings[arm.arm] for arm in arms}
    read = {arm: seeds[: reading.seeds] for arm, reading in at.items()}
    judged: dict[str, _Comparison] = {}
    for arm in arms:
        if not (baseline.unfinished(read[arm.arm]) or arm.unfinished(read[arm.arm])):
            judged[arm.arm] = _Comparison(
                baseline, arm, read[arm.arm], len(arms), alpha, margin, replicates, at[arm.arm]
            )
    p_values = [judged[arm.arm].interval.p if arm.arm in judged else 1.0 for arm in arms]
    repeated_p = [judged[arm.arm].repeated_p if arm.arm in judged else 1.0 for arm in arms]
    baseline_seeds = max(read.values(), key=len, default=seeds)
    rows = [_baseline_row(baseline, baseline_seeds, exploratory, unit)]
    for arm, p, p_holm in zip(arms, p_values, holm(repeated_p).tolist(), strict=True):
        if comparison := judged.get(arm.arm):
            finding = comparison.finding(p_holm, unit, effect)
            word, text, numbers = finding.word, wording.sentence(finding), comparison.numbers()
        else:
            word, numbers = "failed", {}
            text = _failure(arm, baseline, read[arm.arm])
        rows.append(_row(arm, read[arm.arm], word, text, exploratory, p=p, p_holm=p_holm, **numbers))
    value_S = baseline.values(baseline_seeds)
    floor = noise_floor(value_S) if len(value_S) > 1 else None
    limits = reservations or {}
    rows = [replace(row, reservations=tuple(limits.get(row.arm, ()))) for row in rows]
    return Verdict(baseline.arm, tuple(rows), floor, alpha, margin, exploratory, unit, declared, subject)


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


class _Comparison:
    """An arm against its baseline, both with all report seeds finished."""

    def __init__(
        self,
        baseline: ArmMeasurements,
        arm: ArmMeasurements,
        seeds: Sequence[int],
        family: int,
        alpha: float,
        margin: float | None,
        replicates: int,
        reading: Reading,
    ):
        differences_S = arm.values(seeds) - baseline.values(seeds)
        differences_S[np.abs(differences_S) < ROUNDING] = 0
        amounts = arm.finished(seeds), baseline.finished(seeds)
        self.arm, self.baseline, self.family, self.alpha, self.margin = arm.arm, baseline.arm, family, alpha, margin
        self.rho = paired_correlation(arm.values(seeds), baseline.values(seeds))
        self.reading, self.level = reading, reading.nominal(alpha / family)
        self.interval = paired_interval(differences_S, alpha)
        self.simultaneous = paired_interval(differences_S, self.level)
        self.repeated = paired_interval(differences_S, reading.nominal(alpha))
        self.narrow = paired_interval(differences_S, reading.nominal(2 * alpha))
        self.inside = margin is not None and equivalent(differences_S, margin, reading.nominal(2 * alpha) / 2)
        self.repeated_p = reading.adjusted(self.interval.p)
        self.bootstrap = crossed_bootstrap(*amounts, arm.sizes_D, replicates=replicates, level=1 - alpha)
        # The same in all seeds: the change or the seed never reached the model, or a task has no room between the runs.
        self.constant = len(seeds) > 1 and bool(np.ptp(differences_S) < ROUNDING)

    @property
    def detectable(self) -> float | None:
        if self.interval.n < 2 or self.constant:
            return None
        return self.interval.sd * detectable_difference(self.interval.n, self.level, POWER) if self.level else None

    def numbers(self) -> dict[str, float | None]:
        """What the arm's row shows of it."""
        several, looks = self.interval.n > 1, self.reading.is_sequential
        return {
            "difference": self.interval.mean,
            "low": self.interval.low if several else None,
            "high": self.interval.high if several else None,
            "bootstrap_low": self.bootstrap.low if several else None,
            "bootstrap_high": self.bootstrap.high if several else None,
            "simultaneous_low": _known(self.simultaneous.low),
            "simultaneous_high": _known(self.simultaneous.high),
            "repeated_low": _known(self.repeated.low) if looks else None,
            "repeated_high": _known(self.repeated.high) if looks else None,
            "level": self.reading.nominal(self.alpha) if looks else None,
            "rho": None if math.isnan(self.rho) else self.rho,
            "detectable": self.detectable,
        }

    def finding(self, p_holm: float, unit: str, effect: float | None) -> wording.Finding:
        """What the arm's sentence is made from."""
        word = "equivalent" if self.inside else "undecided"
        if p_holm < self.alpha:
            word = "better" if self.interval.mean < 0 else "worse"
        return wording.Finding(
            arm=self.arm,
            baseline=self.baseline,
            word=word,
            unit=unit,
            alpha=self.alpha,
            family=self.family,
            p_holm=p_holm,
            interval=self.repeated,
            narrow=self.narrow,
            reading=self.reading,
            level=self.reading.nominal(self.alpha),
            bootstrap=self.bootstrap,
            margin=self.margin,
            inside=self.inside,
            effect=effect,
            detectable=self.detectable,
            constant=self.constant,
        )


def _row(
    arm: ArmMeasurements,
    seeds: Sequence[int],
    word: str,
    sentence: str,
    exploratory: str | None,
    **numbers: float | None,
) -> ArmVerdict:
    """A row with what every arm has: the metric and counts of the runs that finished."""
    value_S = arm.values(seeds)
    unknown = dict.fromkeys(
        [
            "difference",
            "low",
            "high",
            "bootstrap_low",
            "bootstrap_high",
            "simultaneous_low",
            "simultaneous_high",
            "repeated_low",
            "repeated_high",
            "level",
            "p",
            "p_holm",
            "rho",
            "detectable",
        ]
    )
    return ArmVerdict(
        arm=arm.arm,
        verdict=word,
        value=float(value_S.mean()) if len(value_S) else None,
        value_sd=float(value_S.std(ddof=1)) if len(value_S) > 1 else None,
        seeds=len(value_S),
        failed=len(seeds) - len(value_S),
        sentence=sentence if exploratory is None else f"Exploratory ({exploratory}): {sentence}",
        **{**unknown, **numbers},
    )


def _known(end: float) -> float | None:
    return end if math.isfinite(end) else None


def _baseline_row(baseline: ArmMeasurements, seeds: Sequence[int], exploratory: str | None, unit: str) -> ArmVerdict:
    if baseline.unfinished(seeds):
        return _row(baseline, seeds, "failed", _failure(baseline, baseline, seeds), exploratory)
    text = wording.baseline_sentence(baseline.arm, baseline.values(seeds), unit)
    return _row(baseline, seeds, "baseline", text, exploratory)


def _failure(arm: ArmMeasurements, baseline: ArmMeasurements, seeds: Sequence[int]) -> str:
    return wording.failure_sentence(
        arm.arm, arm.unfinished(seeds), baseline.arm, baseline.unfinished(seeds), len(seeds)
    )
