"""Verdicts in words: comparisons in, text out. One clause states one fact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from workbench.ablation.verdict.comparison import ArmMeasurements, Claim, Comparison, Rules
from workbench.ablation.verdict.hypotheses import SOLVED, ExactTest, fisher, sampling_sd, skewness_limit
from workbench.ablation.verdict.statistics import MIN_SEEDS, POWER, ROUNDING, noise_floor, seeds_needed
from workbench.ablation.verdict.subject import Subject

__all__ = ["baseline", "decimals", "equals", "interval_text", "p_value", "percent", "sentence"]

MANY_SEEDS = 1_000
"""Above this, a sentence says "more than" instead of a count that nobody would run."""


def sentence(comparison: Comparison, claim: Claim, subject: Subject) -> str:
    """The sentence about an arm that is compared with another."""
    arm, reference = comparison.arm.arm, comparison.reference.arm
    if not comparison.n:
        seeds = comparison.seeds
        if not len(comparison.reference.values(seeds)):  # its sentence lists why
            lost = f"; of {arm}, {_survival(comparison.arm, seeds)}" if comparison.arm.unfinished(seeds) else ""
            return f"{arm} cannot be compared with {reference}, which has no finished seed{lost}."
        parts = [part for part in (comparison.arm, comparison.reference) if part.unfinished(seeds)]
        survival = "; ".join(f"{part.arm}: {_survival(part, seeds)}" for part in parts)
        return f"{arm} cannot be compared with {reference}, no seed finished in both ({survival})."
    clauses = [_head(comparison, claim, subject)]
    if claim.word in ("better", "worse", "undecided"):
        clauses += _interest(comparison, claim)
    if claim.word == "equivalent" and claim.p_holm <= comparison.rules.alpha:
        clauses.append("there is a difference, too small to matter by the declared margin")
    clauses += _shares(comparison)
    clauses += _missing(comparison, claim)
    clauses += _disagreements(comparison, claim)
    if claim.word in ("undecided", "failed"):
        clauses += _reasons(comparison, claim)
    if comparison.is_constant:
        clauses.append(
            f"the difference is the same in all {comparison.n} seeds: check that change and seed reach the model, and "
            "that what is measured is not solved, or missed, by every run alike"
        )
    clauses += _skew(comparison)
    return "; ".join(clauses) + "."


def _head(comparison: Comparison, claim: Claim, subject: Subject) -> str:
    rules, n, mean = comparison.rules, comparison.n, comparison.mean
    reading = comparison.reading
    low, high = comparison.repeated_interval if reading.is_sequential else comparison.interval
    places = decimals(None if low is None or high is None else (high - low) / 2, mean)
    arm, reference = subject.named(comparison.arm.arm), subject.named(comparison.reference.arm)
    sign = -1 if claim.word == "better" else 1  # "better by 0.010 (0.008 to 0.012)", not by -0.010
    evidence = []
    if low is not None and high is not None:
        approximate = rules.upper is not None and not comparison.has_exact_interval
        kind = "approximate " if approximate and not comparison.is_constant else ""
        span = interval_text(min(sign * low, sign * high), max(sign * low, sign * high), places)
        evidence.append(f"{kind}{percent(1 - rules.alpha)} interval {span}")
    if comparison.least < 1:
        exact = " of exact tests" if isinstance(comparison.test, ExactTest) else ""
        least = f", least reachable {p_value(min(1.0, comparison.least * rules.family))}" if exact else ""
        evidence.append(f"{_adjusted(rules)} p {equals(claim.p_holm)}{exact}{least}")
    evidence.append(f"{n} paired seed{'s' * (n > 1)}")
    if reading.is_sequential:
        evidence.append(f"{reading} (level {reading.nominal(rules.alpha):.2g} at this look)")
    details = ", ".join(evidence)
    if claim.word in ("better", "worse"):
        return f"{arm} is {claim.word} than {reference} by {abs(mean):.{places}f} {rules.unit} ({details})"
    difference = f"{mean:+z.{places}f} {rules.unit}"
    if claim.word == "equivalent":
        return (
            f"{arm} is equivalent to {reference}: the difference lies within ±{rules.margin:g} {rules.unit} "
            f"({_adjusted(rules)} p {equals(claim.p_equivalence)} of two one-sided tests); it is {difference} "
            f"({details})"
        )
    if claim.word == "failed":
        survival = _survival(comparison.arm, comparison.seeds)
        return f"{arm} failed: {survival}; the {n} pairs left differ from {reference} by {difference}"
    return f"{arm} against {reference} is undecided, no difference shown: {difference} ({details})"


def _adjusted(rules: Rules) -> str:
    """What p-values are called."""
    return "adjusted" if rules.ordered else "Holm-adjusted"


def _interest(comparison: Comparison, claim: Claim) -> list[str]:
    """How the difference compares with the smallest one of interest."""
    rules = comparison.rules
    low, high = comparison.interval
    if rules.effect is None or low is None or high is None:
        return []
    least = f"the smallest difference of interest, {rules.effect:g}"
    if claim.word in ("better", "worse"):
        if abs(comparison.mean) < rules.effect:
            return [f"that is less than {least}"]
        if min(abs(low), abs(high)) >= rules.effect and low * high > 0:
            return [f"the whole interval is at least {least}"]
        return [f"that is more than {least}, but the interval also holds less"]
    if comparison.raw_detectable is not None and comparison.raw_detectable > rules.effect:
        needed = seeds_needed(rules.effect / comparison.sd, rules.alpha / rules.family, POWER)
        count = f"{'more than ' if needed > MANY_SEEDS else ''}{min(needed, MANY_SEEDS):,}"
        return [f"showing {least}, would take {count} seeds if the noise is as measured"]
    return []


def _shares(comparison: Comparison) -> list[str]:
    """How many seeds solve a task."""
    test = comparison.test
    if not isinstance(test, ExactTest):
        return []
    (arm, reference), n = test.solved, comparison.n
    names = comparison.arm.arm, comparison.reference.arm
    if arm == reference:
        return [f"{names[0]} and {names[1]} solve the task on {arm} of {n} seeds each"] if 0 < arm < n else []
    p = fisher(arm, n, reference, n)
    return [
        f"{names[0]} solves the task (error at most {SOLVED * test.upper:g}) on {arm} of {n} seeds, {names[1]} on "
        f"{reference} (Fisher's exact p {equals(p)})"
    ]


def _missing(comparison: Comparison, claim: Claim) -> list[str]:
    """What failed runs could change."""
    bound, seeds = comparison.imputation, comparison.seeds
    if bound is None:
        return []
    clauses = []
    lost = [part for part in (comparison.arm, comparison.reference) if part.unfinished(seeds)]
    named = [part for part in lost if claim.word != "failed" or part is not comparison.arm]
    clauses += [f"{part.arm}: {_survival(part, seeds)}" for part in named]
    if math.isfinite(bound.low) and math.isfinite(bound.high):
        places = decimals((bound.high - bound.low) / 2)
        span = interval_text(bound.low, bound.high, places)
        clauses.append(f"with missing runs at their best and worst the difference is {span}")
    if comparison.survival_p is not None:
        clauses.append(f"survival differs with p {equals(comparison.survival_p)} (Fisher's exact test)")
    return clauses


def _disagreements(comparison: Comparison, claim: Claim) -> list[str]:
    """Where intervals and bootstrap do not agree with the word about excluding zero."""
    rules = comparison.rules
    low, high = comparison.interval
    if low is None or high is None:
        return []
    clauses = []
    shown = low > ROUNDING or high < -ROUNDING
    if shown and claim.p_holm > rules.alpha and comparison.n >= MIN_SEEDS:
        by = f"Holm's correction over {rules.family} comparisons" if claim.p <= rules.alpha else "the exact tests"
        by = "the correction over looks and comparisons" if comparison.reading.is_sequential else by
        by = "the declared order of metrics" if rules.ordered and claim.p * rules.family <= rules.alpha else by
        by = "missing runs at the least favourable value of their arm" if comparison.rests_on_missing else by
        clauses.append(f"its interval alone excludes zero, but p does not survive {by}")
    if claim.word in ("better", "worse") and not shown:
        clauses.append("the claim rests on the share of seeds that solve the task; the interval of the mean holds zero")
    if bootstrap := comparison.bootstrap:
        confirmed = bootstrap.low > ROUNDING or bootstrap.high < -ROUNDING
        if confirmed != shown:
            sign = -1 if claim.word == "better" else 1
            one, other = sign * bootstrap.low, sign * bootstrap.high
            outcome = "alone excludes zero" if confirmed else "does not confirm it"
            span = interval_text(min(one, other), max(one, other), decimals((high - low) / 2, comparison.mean))
            what = f"{percent(1 - rules.alpha)} interval {span}"
            clauses.append(f"the document bootstrap {outcome} ({what})")
    return clauses


def _reasons(comparison: Comparison, claim: Claim) -> list[str]:
    """Why nothing is claimed, and what the ablation could have shown."""
    rules, n = comparison.rules, comparison.n
    if n < MIN_SEEDS:
        return [f"fewer than {MIN_SEEDS} paired seeds show no difference and no equivalence"]
    clauses = []
    if claim.word == "undecided" and claim.p_equivalence is not None:
        clauses.append(
            f"nor is it shown to lie within ±{rules.margin:g} ({_adjusted(rules)} p {equals(claim.p_equivalence)})"
        )
    if comparison.is_constant or not comparison.may_claim:
        return clauses
    if comparison.least * rules.family > rules.alpha:
        of = f" over {rules.family} comparisons" if rules.family > 1 else ""
        return [*clauses, f"no outcome of {n} seeds is decisive{of}: more seeds are needed"]
    places = decimals(comparison.sd)
    if comparison.detectable is not None:
        able = f"{comparison.detectable:.{places}f} {rules.unit} ({percent(POWER)} power)"
        clauses.append(f"this ablation could have shown {able}")
    elif comparison.raw_detectable is not None:
        clauses.append(f"{percent(POWER)} power would need a larger difference than can exist")
    return clauses


def _skew(comparison: Comparison) -> list[str]:
    value = comparison.skewness
    if value is None or comparison.n < MIN_SEEDS or isinstance(comparison.test, ExactTest):
        return []
    limit = skewness_limit(comparison.n)
    if abs(value) <= limit:
        return []
    return [
        f"the differences are skewed ({value:+.1f}; normal seeds stay within ±{limit:.1f} in 95 %), so that interval "
        "and p are less certain"
    ]


def baseline(arm: ArmMeasurements, seeds: Sequence[int], rules: Rules) -> str:
    """The sentence about the baseline, with its noise floor."""
    value_S, unit = arm.values(seeds), rules.unit
    if not len(value_S):
        return f"{arm.arm}, the baseline, failed: {_survival(arm, seeds)}, so no arm can be judged."
    lost = f"; {_survival(arm, seeds)}" if arm.unfinished(seeds) else ""
    if len(value_S) == 1:
        return f"{arm.arm}, the baseline, has {value_S[0]:.4f} {unit}; one seed gives no noise floor{lost}."
    floor = noise_floor(value_S)
    places = decimals(floor.sd)
    counting = ""
    if rules.upper is not None:
        sampling = sampling_sd(value_S, rules.upper, float(arm.sizes_D.sum()))
        counting = f"; counting {arm.sizes_D.sum():,.0f} answers alone has an sd of {sampling:.1g}"
    return (
        f"{arm.arm}, the baseline, has {value_S.mean():.{places}f} {unit} over {len(value_S)} seeds; the noise "
        f"floor, its sd over seeds, is {floor.sd:.{places}f} "
        f"(95 % interval {interval_text(floor.low, floor.high, places)}){counting}{lost}."
    )


def _survival(arm: ArmMeasurements, seeds: Sequence[int]) -> str:
    seeds_by_status: dict[str, list[str]] = {}
    failures: Mapping[int, str] = arm.unfinished(seeds)
    for seed, status in failures.items():
        seeds_by_status.setdefault(status, []).append(str(seed))
    reasons = "; ".join(
        f"seed{'s' * (len(group) > 1)} {', '.join(group)}: {why}" for why, group in seeds_by_status.items()
    )
    return f"{len(seeds) - len(failures)} of {len(seeds)} seeds finished ({reasons})"


def decimals(*scales: float | None) -> int:
    """Decimals that show two significant digits of the first scale that is positive and finite, else four decimals."""
    for scale in scales:
        if scale is not None and 0 < abs(scale) < math.inf:
            return min(max(1 - math.floor(math.log10(abs(scale))), 0), 9)
    return 4


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3g}"


def equals(p: float | None) -> str:
    """ "= 0.03", or "< 0.001"."""
    return "unknown" if p is None else p_value(p) if p < 0.001 else f"= {p_value(p)}"


def interval_text(low: float, high: float, places: int) -> str:
    return f"{low:z.{places}f} to {high:z.{places}f}"


def percent(share: float) -> str:
    return f"{100 * share:g} %"
