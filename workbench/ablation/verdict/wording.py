"""Verdicts in words: plain numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.statistics import (
    POWER,
    ROUNDING,
    Bootstrap,
    Floats,
    Interval,
    NoiseFloor,
    noise_floor,
    seeds_needed,
)

__all__ = ["Finding", "baseline_sentence", "failure_sentence", "sentence", "table"]

MANY_SEEDS = 1_000
"""Above this, a sentence says "more than" instead of a count that nobody would run."""


@dataclass(frozen=True)
class Finding:
    """The numbers behind the sentence about one arm, in the unit of the metric."""

    arm: str
    baseline: str
    word: str
    """better, worse, equivalent or undecided."""
    unit: str
    alpha: float
    family: int
    """Arms beside the baseline."""
    p_holm: float
    interval: Interval
    """Paired t-interval at level 1 − alpha; of a sequential design, over all its looks."""
    narrow: Interval
    """The same at level 1 − 2 alpha, which decides equivalence."""
    reading: Reading
    """The look of the declared design."""
    level: float
    """Level of the paired t-test at this look."""
    bootstrap: Bootstrap
    margin: float | None
    inside: bool
    """Whether the narrow interval lies inside the margin."""
    effect: float | None
    """Smallest difference of interest."""
    detectable: float | None
    constant: bool
    """Whether the difference is the same in all seeds."""


def sentence(finding: Finding) -> str:
    """The sentence about an arm that was judged."""
    interval, bootstrap, narrow, n = finding.interval, finding.bootstrap, finding.narrow, finding.interval.n
    word, unit = finding.word, finding.unit
    places = _places((interval.high - interval.low) / 2, interval.mean)
    sign = -1 if word == "better" else 1  # "better by 0.010 (0.008 to 0.012)", not by -0.010

    def span(ends: Interval | Bootstrap) -> str:
        low, high = sorted((sign * ends.low, sign * ends.high))
        return _span(low, high, places)

    level, narrow_level = _percent(1 - finding.alpha), _percent(1 - 2 * finding.alpha)
    margin = f"the margin of ±{finding.margin:g}" if finding.margin is not None else ""
    p = f"Holm-adjusted p {'' if finding.p_holm < 0.001 else '= '}{_p(finding.p_holm)}, {n} paired seeds"
    if finding.reading.is_sequential:
        p += f", {finding.reading} (level {finding.level:.2g} at this look)"
    evidence = f"{level} interval {span(interval)}, {p}" if n > 1 else "1 paired seed"
    difference = f"{interval.mean:+z.{places}f} {unit}"
    arm, baseline = finding.arm, finding.baseline
    clauses = []
    if word == "undecided":
        clauses += [f"{arm} against {baseline} is undecided, no difference shown: {difference} ({evidence})"]
    elif word == "equivalent":
        clauses += [
            f"{arm} is equivalent to {baseline}: the {narrow_level} interval of the difference, "
            f"{span(narrow)} {unit}, lies inside {margin} ({difference}, {p})"
        ]
    else:
        size = f"{abs(interval.mean):.{places}f} {unit}"
        clauses += [f"{arm} is {word} than {baseline} by {size} ({evidence})"]
        clauses += [f"its {narrow_level} interval lies inside {margin}"] * finding.inside
    clauses += _interest(finding)
    shown, confirmed = (ends.low > ROUNDING or ends.high < -ROUNDING for ends in (interval, bootstrap))
    if shown and word in ("undecided", "equivalent"):
        arms = f"{finding.family} arms"
        clauses += [f"its interval alone excludes zero, but p does not survive Holm's correction over {arms}"]
    if shown != confirmed:
        outcome = "alone excludes zero" if confirmed else "does not confirm it"
        clauses += [f"the document bootstrap {outcome} ({level} interval {span(bootstrap)})"]
    if word == "undecided" and finding.margin is not None and n > 1:
        clauses += [f"its {narrow_level} interval {span(narrow)} is not inside {margin}"]
    if finding.constant:
        clauses += [
            f"the difference is the same in all {n} seeds: check that change and seed reach the model, and that what "
            "is measured is not solved, or missed, by every run alike"
        ]
    elif word == "undecided":
        clauses += [_outlook(finding, places)]
    return "; ".join(clauses) + "."


def _interest(finding: Finding) -> list[str]:
    """How the difference compares with the smallest one of interest."""
    effect, interval = finding.effect, finding.interval
    if effect is None or interval.n < 2:
        return []
    least = f"the smallest difference of interest, {effect:g}"
    if finding.word in ("better", "worse"):
        if abs(interval.mean) < effect:
            return [f"that is less than {least}"]
        if min(abs(interval.low), abs(interval.high)) >= effect:
            return [f"the whole interval is at least {least}"]
        return [f"that is more than {least}, but the interval also holds less"]
    if finding.word == "undecided" and finding.detectable is not None and finding.detectable > effect:
        needed = seeds_needed(effect / interval.sd, finding.alpha / finding.family, POWER)
        count = f"{'more than ' if needed > MANY_SEEDS else ''}{min(needed, MANY_SEEDS):,}"
        return [f"showing {least}, would take {count} seeds"]
    return []


def _outlook(finding: Finding, places: int) -> str:
    """What an undecided ablation could have shown, and what it would take."""
    if finding.detectable is None:
        return "one seed can show no difference"
    able = f"this ablation could have shown {finding.detectable:.{places}f} {finding.unit} ({_percent(POWER)} power)"
    if not finding.interval.mean:
        return able
    effect_in_sd = finding.interval.mean / finding.interval.sd
    needed = seeds_needed(effect_in_sd, finding.alpha / finding.family, POWER)
    count = f"more than {MANY_SEEDS:,}" if needed > MANY_SEEDS else f"{needed:,}"
    return f"{able}, and showing the observed difference, if true, would take {count} seeds"


def baseline_sentence(baseline: str, values: Floats, unit: str) -> str:
    """The sentence about a baseline that finished on all seeds, with its noise floor.

    Args:
        values: (S,), one per seed.
    """
    if len(values) == 1:
        return f"{baseline}, the baseline, has {values[0]:.4f} {unit}; one seed gives no noise floor."
    floor: NoiseFloor = noise_floor(values)
    places = _places(floor.sd)
    return (
        f"{baseline}, the baseline, has {values.mean():.{places}f} {unit} over {len(values)} seeds; the noise "
        f"floor, its sd over seeds, is {floor.sd:.{places}f} (95 % interval {_span(floor.low, floor.high, places)})."
    )


def failure_sentence(
    arm: str, failures: Mapping[int, str], baseline: str, baseline_failures: Mapping[int, str], num_seeds: int
) -> str:
    """The sentence about an arm, the baseline included, that cannot be judged.

    Args:
        failures: of the arm, seed -> status.
        baseline_failures: of the baseline, seed -> status.
        num_seeds: declared seeds.
    """
    if arm == baseline:
        return f"{arm}, the baseline, failed: {_survival(failures, num_seeds)}, so no arm can be judged."
    if not failures:
        return f"{arm} cannot be judged: the baseline {baseline} failed, {_survival(baseline_failures, num_seeds)}."
    also = f"; the baseline {baseline} failed as well" if baseline_failures else ""
    return f"{arm} failed: {_survival(failures, num_seeds)}{also}."


def _survival(failures: Mapping[int, str], num_seeds: int) -> str:
    seeds_by_status: dict[str, list[str]] = {}
    for seed, status in failures.items():
        seeds_by_status.setdefault(status, []).append(str(seed))
    reasons = "; ".join(
        f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {status}" for status, seeds in seeds_by_status.items()
    )
    return f"{num_seeds - len(failures)} of {num_seeds} seeds finished ({reasons})"


def table(rows: Sequence[Any], *, alpha: float, unit: str, declared: Sequence[str]) -> str:
    """A whole verdict as text: what was declared, the noise floor, the table, the sentences.

    Args:
        rows: the baseline's first; with the fields of :class:`workbench.ablation.verdict.judge.ArmVerdict`.
    """
    lines = [
        [
            "arm",
            "verdict",
            unit.replace(" per ", "/"),
            "difference",
            f"{_percent(1 - alpha)} interval",
            "p (Holm)",
            "seeds",
        ]
    ]
    for row in rows:
        places = _places(row.value_sd) if row.difference is None else _places(_half(row), row.difference)
        lines.append(
            [
                row.arm,
                row.verdict,
                "" if row.value is None else f"{row.value:.{places}f}",
                "" if row.difference is None else f"{row.difference:+z.{places}f}",
                "" if row.low is None or row.high is None else _span(row.low, row.high, places),
                "" if row.p_holm is None else _p(row.p_holm),
                f"{row.seeds} of {row.seeds + row.failed}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    rule = "  ".join("-" * width for width in widths)
    floor, *sentences = (row.sentence for row in rows)  # the noise floor is read before any difference
    head = [*declared, ""] if declared else []
    return "\n".join([*head, floor, "", aligned[0], rule, *aligned[1:], *([""] if sentences else []), *sentences])


def _half(row: Any) -> float | None:
    return None if row.low is None or row.high is None else (row.high - row.low) / 2


def _places(*scales: float | None) -> int:
    """Decimals that show two significant digits of the first scale that is positive and finite, else four decimals."""
    for scale in scales:
        if scale is not None and 0 < abs(scale) < math.inf:
            return min(max(1 - math.floor(math.log10(abs(scale))), 0), 9)
    return 4


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"


def _span(low: float, high: float, places: int) -> str:
    return f"{low:z.{places}f} to {high:z.{places}f}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
