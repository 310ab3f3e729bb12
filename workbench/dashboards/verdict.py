"""The verdict as a table and in words."""

from __future__ import annotations

from typing import Any

import polars as pl

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Row, Text
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.effects import effect_table, secondary_table
from workbench.dashboards.templates import note, render


def verdict_blocks(run: Snapshot, title: str = "") -> list[Block]:
    """The verdict as a table."""
    from workbench.ablation.verdict.paper import verdict_table

    table = effect_table(run)
    if not len(table):
        waiting = note("The verdict follows when the confirmation runs of every arm have ended.")
        return [Text("verdict", waiting, title)]
    verdict = run.verdict()
    paper = None if verdict is None else verdict_table(verdict, run.name, run.metric, run.arms)
    columns = [Column("arm"), Column("verdict"), *_columns(run, run.metric.unit, "p (Holm)")]
    rows = [_row(row, f"arm {row['arm']}", [row["arm"]], run) for row in table.iter_rows(named=True)]
    return [Grid("verdict", columns, rows, table, title, sortable=False, paper=paper)]


def secondary_blocks(run: Snapshot) -> list[Block]:
    """The verdict by secondary metrics as a table, with how it is made; empty where none is declared."""
    from workbench.ablation.verdict.verdict import CLAIMS, IN_ORDER

    verdict, table = run.verdict(), secondary_table(run)
    if verdict is None or not verdict.secondary:
        return []
    columns = [Column("metric"), Column("arm"), Column("verdict"), *_columns(run, "value", "p (adjusted)")]
    rows = [
        _row(row, f"{row['metric']} {row['arm']}", [row["metric"], row["arm"]], run)
        for row in table.iter_rows(named=True)
    ]
    missing = [f"{part.label} was not measured." for part in verdict.secondary if not part.rows]
    claims = table.filter(pl.col("verdict").is_in(CLAIMS))
    sentences = [f"{metric}: {text}" for metric, text in claims.select("metric", "sentence").rows()]
    return [
        Text("secondary", note(IN_ORDER), "Secondary metrics"),
        Grid("secondary-verdict", columns, rows, table, sortable=False, empty="No secondary metric was measured."),
        Text("secondary-sentences", render("sentences.html", sentences=[*missing, *sentences])),
    ]


def _columns(run: Snapshot, value: str, p: str) -> list[Column]:
    """The numeric columns of a verdict."""
    titles = (value, "difference", f"{100 * (1 - run.alpha):g} % interval", p, "seeds")
    return [Column(title, numeric=True) for title in titles]


def _row(row: dict[str, Any], key: str, heads: list[str], run: Snapshot) -> Row:
    """A row of a verdict.

    Args:
        row: fields of :class:`workbench.ablation.verdict.verdict.ArmVerdict`.
        key: of the row.
        heads: what it is about.
        run: the run.
    """
    p = None if row["difference"] is None else row["p_holm"]  # nothing was tested of an arm that failed
    return Row(
        key,
        style.arm_styles(run)[row["arm"]].colour,
        [
            *heads,
            Cell(row["verdict"], row["verdict"], row["verdict"]),
            Cell(formatting.metric(row["value"]), row["value"]),
            Cell(formatting.metric(row["difference"], signed=True), row["difference"]),
            Cell(_interval(row), row["low" if row["level"] is None else "repeated_low"]),
            Cell(_p_value(p), p),
            Cell(f"{row['seeds']} of {row['seeds'] + row['failed']}", row["seeds"]),
        ],
    )


def _interval(row: dict[str, Any]) -> str:
    """The interval that agrees with the design: of a sequential one, the interval over all its looks."""
    low, high = ("low", "high") if row["level"] is None else ("repeated_low", "repeated_high")
    if row[low] is None:
        return formatting.UNKNOWN
    return f"{formatting.metric(row[low], signed=True)} to {formatting.metric(row[high], signed=True)}"


def _p_value(p: float | None) -> str:
    return formatting.UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.3g}"
