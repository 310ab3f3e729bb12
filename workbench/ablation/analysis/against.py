"""An ablation against one of somebody else: other seeds, another machine, so nothing is paired. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from workbench.ablation.analysis.power import values_of
from workbench.ablation.verdict.statistics import MIN_SEEDS, Interval, exchange_p, holm, pooled_sd, welch
from workbench.config import ConfigError, deep_merge, difference, expand_dotted, nearest, require
from workbench.formatting import UNKNOWN, metric
from workbench.metric import ANSWER_ERRORS
from workbench.status import FAILED, Stage

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["LABEL", "Against", "UnpairedRow", "against", "description"]

LABEL = "unpaired: seeds are not matched"
SHOWN = 6
"""Differing fields that are printed for an arm."""
RUN_ONLY = ("seed", "seeds", "evaluation")
"""Fields in which runs differ whatever is compared."""


@dataclass(frozen=True)
class UnpairedRow:
    """One arm against the reference; every number in the unit of the metric."""

    arm: str
    value: float
    """Mean over seeds."""
    sd: float | None
    """Over seeds; None for one seed."""
    seeds: int
    failed: int
    """Seeds that were planned and not measured; with any, nothing is decided."""
    difference: float
    """Arm − reference; negative is better."""
    low: float | None
    """Welch's interval at level 1 − alpha, inside the range of the metric; None where it is infinite."""
    high: float | None
    p: float
    p_holm: float
    """Adjusted over all arms."""
    word: str
    """better, worse or undecided; undecided wherever a seed failed."""
    differs: tuple[str, ...]
    """What differs between the two arms beside the seeds: "training.tokens 320000, not 640000"."""


@dataclass(frozen=True)
class Against:
    """Arms of one ablation against an arm of another one."""

    name: str
    other: str
    """Name of the other ablation."""
    reference: str
    """Its arm."""
    value: float
    sd: float | None
    seeds: int
    failed: int
    """Seeds of the reference that were planned and not measured."""
    unit: str
    alpha: float
    rows: tuple[UnpairedRow, ...]
    code: tuple[str, str]
    """Versions of the code of both."""
    device: tuple[str, str]
    bounded: bool = False
    """Whether p is that of an exchange of seeds, since the metric is bounded."""

    label = LABEL

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "label": self.label}

    def __str__(self) -> str:
        level = f"{100 * (1 - self.alpha):g} %"
        lines = [
            f"{self.name} against {self.other}, arm {self.reference} ({LABEL}; {self.unit}, lower is better)",
            f"{self.reference} of {self.other}: {_value(self.value, self.sd, self.seeds, self.failed)}",
            "",
        ]
        for row in self.rows:
            interval = UNKNOWN
            if row.low is not None:
                interval = f"{metric(row.low, signed=True)} to {metric(row.high, signed=True)}"
            gap = metric(row.difference, signed=True)
            lines.append(
                f"{row.arm}: {row.word}, difference {gap} ({level} interval {interval}, "
                f"p = {row.p_holm:.2g} over {len(self.rows)} arm{'s' * (len(self.rows) != 1)}); "
                f"{_value(row.value, row.sd, row.seeds, row.failed)}"
            )
            shown = "; ".join(row.differs[:SHOWN]) or "nothing but the seeds"
            left = len(row.differs) - SHOWN
            more = f"; {left} further field{'s' * (left > 1)}" if left > 0 else ""
            lines.append(f"  differs in: {shown}{more}")
        test = "Welch's t-test over seeds"
        if self.bounded:
            test = "an exchange of seeds between the ablations (intervals are Welch's)"
        lines += [
            "",
            f"p by {test}, Holm over arms. Seeds are not paired: noise that pairs would share counts in full, and a "
            "difference of code, libraries or device counts as one of the arm. No protocol declared this comparison: "
            "it is exploratory.",
        ]
        for what, (ours, theirs) in (("Code", self.code), ("Device", self.device)):
            if ours != theirs:
                lines.append(f"{what}: {ours} in {self.name}, {theirs} in {self.other}.")
        return "\n".join(lines)


def against(run: AblationRun, other: AblationRun, arm: str | None = None) -> Against:
    """Every arm of an ablation against one arm of another ablation, over seeds that are no pairs.

    Args:
        run: a finished ablation.
        other: another one, usually an archive of somebody else's.
        arm: the arm of ``other``; default its baseline.

    Raises:
        ConfigError: if one of them is not finished, or they do not measure the same quantity: another metric, task,
            split, data fingerprint or other report documents.
    """
    for part in (run, other):
        require(part.finished, str(part.folder), got="an ablation that is not finished", expected="a finished one")
    reference = arm or other.baseline
    known = reference in other.arms
    do = "" if known else nearest(reference, other.arms)
    require(known, "arm", got=reference, expected=f"an arm of {other.name}", do=do)
    for name in run.arms:
        if unlike := run.design.unlike(name, other.design, reference):
            raise _refused(
                other, f"{reference}: {unlike}", f"the quantity that arm {name} of {run.name} was measured in"
            )
    documents = _documents(run), _documents(other)
    if documents[0] != documents[1]:
        got = f"{len(documents[1])} report documents" if documents[1] else "no report documents"
        raise _refused(other, got, f"the {len(documents[0])} report documents of {run.name}, of the same sizes")
    theirs = list(values_of([other]).get(reference, {}).values())
    ours = {name: list(values.values()) for name, values in values_of([run]).items() if name in run.arms}
    for part, measured in ((run, ours), (other, theirs)):
        require(measured, str(part.folder), got="no finished confirmation run", expected="measured arms")
    upper = run.metric.upper
    if upper is None and run.metric == ANSWER_ERRORS:  # archives of earlier versions do not name the bound
        upper = ANSWER_ERRORS.upper
    alpha = run.alpha
    intervals = {name: welch(values, theirs, alpha) for name, values in ours.items()}
    p = {name: found.p if upper is None else exchange_p(ours[name], theirs) for name, found in intervals.items()}
    adjusted = dict(zip(p, holm(list(p.values())).tolist()))
    lost = _failed(other, reference)
    rows = tuple(
        _row(
            name,
            ours[name],
            intervals[name],
            p[name],
            adjusted[name],
            len(theirs),
            lost,
            alpha,
            upper,
            run,
            other,
            reference,
        )
        for name in run.arms
        if name in ours
    )
    about = [part.provenance() for part in (run, other)]
    return Against(
        name=run.name,
        other=other.name,
        reference=reference,
        value=sum(theirs) / len(theirs),
        sd=_sd(theirs),
        seeds=len(theirs),
        failed=lost,
        unit=run.metric.unit,
        alpha=alpha,
        rows=rows,
        code=(about[0].get("code", "unknown"), about[1].get("code", "unknown")),
        device=(about[0].get("device", "unknown"), about[1].get("device", "unknown")),
        bounded=upper is not None,
    )


def _row(
    name: str,
    values: Sequence[float],
    interval: Interval,
    p: float,
    p_holm: float,
    others: int,
    lost: int,
    alpha: float,
    upper: float | None,
    run: AblationRun,
    other: AblationRun,
    reference: str,
) -> UnpairedRow:
    low, high = interval.low, interval.high
    if upper is not None:
        low, high = max(low, -upper), min(high, upper)
    failed = _failed(run, name)
    decides = p_holm <= alpha and min(len(values), others) >= MIN_SEEDS and not failed and not lost
    word = "undecided" if not decides else "better" if interval.mean < 0 else "worse"
    return UnpairedRow(
        arm=name,
        value=sum(values) / len(values),
        sd=_sd(values),
        seeds=len(values),
        failed=failed,
        difference=interval.mean,
        low=None if math.isinf(low) else low,
        high=None if math.isinf(high) else high,
        p=p,
        p_holm=p_holm,
        word=word,
        differs=_differences(run, name, other, reference),
    )


def _differences(run: AblationRun, arm: str, other: AblationRun, reference: str) -> tuple[str, ...]:
    """Fields of the descriptions, with the chosen settings, in which two arms differ."""
    ours, theirs = description(run, arm), description(other, reference)
    changed = {path: pair for path, pair in difference(theirs, ours).items() if path and not path.startswith(RUN_ONLY)}
    return tuple(f"{path} {_shown(new)}, not {_shown(old)}" for path, (old, new) in changed.items())


def description(run: AblationRun, arm: str) -> dict[str, Any]:
    """The fields of a run that the ablation's description, the budget's solver and tuning set in an arm."""
    config = run.record.config
    chosen = run.selection().get(arm, {}).get("hyperparameters") or {}
    fields = deep_merge(expand_dotted(config.base), expand_dotted(config.arms[arm]))
    for change in (run.record.solved.get(arm, {}), chosen):
        fields = deep_merge(fields, expand_dotted(change))
    return fields


def _documents(run: AblationRun) -> dict[int, float]:
    """Document -> its size, of the first confirmation run that was measured."""
    for _, _, report in run.reports():
        return dict(zip(report["document"].to_list(), report[run.metric.denominator].cast(float).to_list()))
    return {}


def _refused(other: AblationRun, got: str, expected: str) -> ConfigError:
    do = "Values of different quantities are not compared."
    return ConfigError.at(str(other.folder), got=got, expected=expected, do=do)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _sd(values: Sequence[float]) -> float | None:
    return pooled_sd([values])[0] if len(values) > 1 else None


def _value(value: float, sd: float | None, seeds: int, failed: int) -> str:
    spread = "" if sd is None else f" ± {metric(sd)}"
    lost = f" of {seeds + failed}; {failed} failed" if failed else ""
    return f"{metric(value)}{spread} ({seeds} seed{'s' * (seeds != 1)}{lost})"


def _failed(run: AblationRun, arm: str) -> int:
    """Confirmation runs of an arm that failed."""
    lost = (pl.col("arm") == arm) & (pl.col("stage") == Stage.CONFIRMATION) & pl.col("status").is_in(list(FAILED))
    return len(run.runs().filter(lost))
