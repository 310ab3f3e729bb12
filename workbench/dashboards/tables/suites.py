"""Scores of evaluation suites, by task and arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from workbench.ablation.spec.protocol import ScoreMetric
from workbench.dashboards.snapshot import Snapshot
from workbench.formatting import UNKNOWN
from workbench.results.scores import READS

SUITE_SCHEMA: dict[str, Any] = {
    "suite": pl.String,
    "task": pl.String,
    "metric": pl.String,
    "length": pl.Int64,
    "arm": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "seeds": pl.Int64,
    "documents": pl.Int64,
    "higher_is_better": pl.Boolean,
    "upper": pl.Float64,
}
"""Columns of :func:`suite_table`."""


NO_SCORES = "No suite has measured a run at its end."


def suite_table(run: Snapshot, *, by_length: bool = False) -> pl.DataFrame:
    """One row per score and arm, from the ends of confirmation runs or of runs of their own, in the published unit and
    direction.

    Columns: suite; task (null for the mean over all tasks of a suite that have one metric); metric; length (tokens;
    null for all documents of the task); arm; value (mean over seeds), low and high (t-interval of that mean at level
    1 − alpha, inside the range of a rate); difference to the baseline over paired seeds, difference_low and
    difference_high (the interval of the verdict's tests for such a metric, not corrected for the number of scores);
    seeds; documents (of one run); higher_is_better; upper (of a rate).

    Args:
        run: the run.
        by_length: a row for every value of the label ``length`` instead, of tasks whose documents have one.
    """
    from workbench.ablation.verdict.scores import final_scores

    scores, runs = run.scores().filter(pl.col("suite") != READS), run.unfiltered.runs()
    if len(runs):
        scores = final_scores(scores, runs)
    else:  # runs of their own
        scores = scores.filter(pl.col("step") == pl.col("step").max().over("run"))
    rows: list[dict[str, Any]] = []
    for part in scores.partition_by("suite", maintain_order=True):
        tasks, metrics = (list(part[name].unique(maintain_order=True)) for name in ("task", "metric"))
        for task in [*tasks, None] if len(tasks) > 1 else tasks:
            for metric in metrics:
                measured = part.filter(pl.col("metric") == metric)
                if task is not None:
                    measured = measured.filter(pl.col("task") == task)
                if not len(measured) or (task is None and measured["task"].n_unique() < len(tasks)):
                    continue
                lengths: list[int | None] = [*_lengths(measured)] if by_length else []
                for length in lengths or [None]:
                    rows += _rows(run, measured, part["suite"][0], task, metric, length)
    return pl.DataFrame(rows, schema=SUITE_SCHEMA, orient="row")


def _rows(
    run: Snapshot, scores: pl.DataFrame, suite: str, task: str | None, metric: str, length: int | None
) -> list[dict[str, Any]]:
    """The rows of one score, an arm each."""
    from workbench.ablation.verdict.comparison import Comparison, Rules
    from workbench.ablation.verdict.scores import measured_score
    from workbench.ablation.verdict.statistics import paired_interval

    where = {} if length is None else {"length": length}
    seeds, arms = sorted(scores["seed"].unique()), list(dict.fromkeys([run.baseline, *run.arms]))
    score = measured_score(scores, ScoreMetric(suite=suite, task=task, metric=metric, where=where), arms, seeds)
    is_better, upper = bool(scores["higher_is_better"][0]), score.upper
    rules = Rules(run.alpha, max(1, len(run.all_arms) - 1), upper=upper, replicates=0)
    rows: list[dict[str, Any]] = []
    for part in score.arms:
        if part.arm not in run.arms or not part.amounts:
            continue
        value_S = part.values(seeds)
        mean = paired_interval(value_S, run.alpha)
        ends = (mean.low, mean.high) if upper is None else (max(mean.low, 0.0), min(mean.high, upper))
        low, high = sorted(_published(end, is_better, upper) for end in ends)
        row: dict[str, Any] = {"suite": suite, "task": task, "metric": metric, "length": length, "arm": part.arm}
        row |= {"value": _published(mean.mean, is_better, upper), "seeds": mean.n, "higher_is_better": is_better}
        row |= {"upper": upper, "documents": len(part.sizes_D) if len(part.sizes_D) > 1 else None}
        row |= {"low": low, "high": high} if mean.n > 1 else {}
        pair = Comparison(score.arms[0], part, seeds, rules)
        if part.arm != run.baseline and pair.n:
            low_gap, high_gap = pair.interval
            gaps: tuple[float | None, ...] = (pair.mean, low_gap, high_gap)
            if is_better:
                gaps = (-pair.mean, None if high_gap is None else -high_gap, None if low_gap is None else -low_gap)
            row |= dict(zip(("difference", "difference_low", "difference_high"), gaps))
        rows.append(row)
    return rows


def main_scores(table: pl.DataFrame) -> pl.DataFrame:
    """The first metric of every task: the one that its suite names first."""
    return table.filter(pl.col("metric") == pl.col("metric").first().over("suite", "task"))


def with_names(table: pl.DataFrame) -> pl.DataFrame:
    """The table with two further columns: ``name``, the task with its suite and the length where it is one of several;
    ``places``, decimals of all numbers of a task and metric, which show two digits of the widest interval."""
    suite, task = pl.col("suite"), pl.col("task")
    named = pl.when(suite == task).then(suite).otherwise(pl.format("{} {}", suite, task))
    named = pl.when(task.is_null()).then(pl.format("{}, mean", suite)).otherwise(named)
    length = pl.format(", {} tokens", pl.col("length")).fill_null("")
    half = (pl.max_horizontal(pl.col("high") - pl.col("value"), pl.col("value") - pl.col("low"))).max()
    digits = pl.when(half > 0).then(1 - half.log10().floor()).fill_null(3).clip(0, 6).cast(pl.Int64)
    return table.with_columns(name=pl.concat_str(named, length)).with_columns(
        places=digits.over("name", "metric") if len(table) else pl.lit(3, pl.Int64)
    )


def number(value: float | None, places: int, *, signed: bool = False) -> str:
    """A score with so many decimals."""
    return UNKNOWN if value is None else f"{value:{'+' if signed else ''}z,.{places}f}"


def plus_minus(row: Mapping[str, Any]) -> str:
    """A mean with half its interval, the longer half: ``0.62 ± 0.03``.

    Args:
        row: of :func:`with_names`.
    """
    value, places = row["value"], row["places"]
    if row["low"] is None:
        return number(value, places)
    return f"{number(value, places)} ± {number(max(row['high'] - value, value - row['low']), places)}"


def best_cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best arms of one score, with those that are not shown to differ from them; none where no difference to the
    baseline is shown.

    Args:
        rows: of :func:`suite_table`, an arm each.
    """

    def tier(row: dict[str, Any]) -> int:
        """0 better than the baseline, 2 worse, 1 not shown."""
        low, high = row["difference_low"], row["difference_high"]
        if low is None or high is None or low <= 0 <= high:
            return 1
        return 0 if (low > 0) == row["higher_is_better"] else 2

    best = min(map(tier, rows), default=1)
    found = [row for row in rows if tier(row) == best]
    return found if len(found) < len(rows) else []


def _lengths(scores: pl.DataFrame) -> list[int]:
    """Values of the label ``length`` of documents, a number of tokens."""
    if "length" not in scores.columns or not scores["length"].dtype.is_numeric():
        return []
    values = scores.filter(pl.col("document").is_not_null())["length"].drop_nulls().unique().sort()
    return [int(value) for value in values if value > 0]


def _published(loss: float, is_better: bool, upper: float | None) -> float:
    """A loss as the suite names it."""
    return (upper or 0.0) - loss if is_better else loss
