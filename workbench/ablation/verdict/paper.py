"""A verdict as the table of a paper."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from workbench.ablation.verdict import wording
from workbench.ablation.verdict.ranking import best_arms
from workbench.ablation.verdict.verdict import ArmVerdict, Verdict
from workbench.metric import Metric
from workbench.paper import PaperCell, PaperColumn, PaperTable

__all__ = ["verdict_table"]


def verdict_table(
    verdict: Verdict,
    name: str,
    metric: Metric,
    arms: Collection[str] | None = None,
    names: Mapping[str, str] | None = None,
) -> PaperTable:
    """Every arm with its mean, its difference to the baseline with the interval, p, the word and the seeds.

    Numbers have the digits that the noise supports: two of the standard deviation, or of half the interval. The best
    arm is bold where the verdict shows an order, together with the arms that it does not show to differ from it.

    Args:
        verdict: the verdict.
        name: of the ablation.
        metric: that the verdict is about.
        arms: to print; default all.
        names: arm -> display name; the numbers behind the table keep the arms' own.
    """
    names = names or {}
    shown = [row for row in verdict.rows if arms is None or row.arm in arms]
    best = best_arms(verdict)
    level = f"{100 * (1 - verdict.alpha):g} % CI"
    columns = [
        PaperColumn("arm"),
        PaperColumn(f"{metric.short} ↓", numeric=True),
        PaperColumn(f"Δ [{level}]", numeric=True),
        PaperColumn("p (Holm)", numeric=True),
        PaperColumn("verdict"),
        PaperColumn("n", numeric=True),
    ]
    data = verdict.table()
    data = data.filter(data["arm"].is_in([row.arm for row in shown]))
    rows = [_row(row, row.arm in best, names.get(row.arm, row.arm)) for row in shown]
    caption = _caption(verdict, name, metric, shown, best, names.get(verdict.baseline, verdict.baseline))
    return PaperTable(columns, rows, data, caption, name)


def _row(row: ArmVerdict, is_best: bool, name: str) -> list[PaperCell]:
    low, high = (row.low, row.high) if row.level is None else (row.repeated_low, row.repeated_high)
    half = None if low is None or high is None else (high - low) / 2
    digits = wording.decimals(row.value_sd, half)
    value = _number(row.value, digits)
    if row.value is not None and row.value_sd is not None:
        value += f" ± {_number(row.value_sd, digits)}"
    places = wording.decimals(half, row.difference)
    difference = _number(row.difference, places, signed=True)
    if low is not None and high is not None:
        difference += f" [{_number(low, places)}, {_number(high, places)}]"
    return [
        PaperCell(name, is_best),
        PaperCell(value, is_best),
        PaperCell(difference),
        PaperCell("–" if row.p_holm is None or row.difference is None else wording.p_value(row.p_holm)),
        PaperCell(f"{row.verdict}{'*' if row.reservations else ''}"),
        PaperCell(str(row.seeds) if not row.failed else f"{row.seeds} of {row.seeds + row.failed}"),
    ]


def _number(value: float | None, places: int, *, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}z.{places}f}".replace("-", "−")


def _caption(verdict: Verdict, name: str, metric: Metric, rows: list[ArmVerdict], best: set[str], baseline: str) -> str:
    interval = "over all looks of the declared design" if any(row.level is not None for row in rows) else "over seeds"
    sentences = [
        f"Ablation {name}: {metric.name} in {metric.unit} (lower is better), mean ± standard deviation over n seeds.",
        f"Δ: paired difference to {baseline} with its {100 * (1 - verdict.alpha):g} % confidence interval "
        f"{interval}, not adjusted for the number of arms; p: adjusted (Holm).",
    ]
    if any(row.verdict == "equivalent" for row in rows) and verdict.margin is not None:
        sentences.append(f"Equivalent: within ±{verdict.margin:g} {metric.unit}.")
    if best:
        others = " and those that are not shown to differ from it" if len(best) > 1 else ""
        sentences.append(f"Bold: the best arm{others}.")
    elif len(rows) > 1:
        sentences.append("No arm is shown to be better than another.")
    if reserved := [row.reservations for row in rows if row.reservations]:
        common = [text.rstrip(".") for text in reserved[0] if all(text in texts for texts in reserved)]
        sentences.append(f"*: {'; '.join(common) or 'the claim has reservations, which the verdict lists'}.")
    if verdict.exploratory:
        sentences.append(f"Exploratory: {verdict.exploratory.rstrip('.')}.")
    return " ".join(sentences)
