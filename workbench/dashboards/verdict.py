"""The verdict as a table and in words."""

from __future__ import annotations

from typing import Any

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Row, Text
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.effects import effect_table
from workbench.dashboards.templates import note, render


def verdict_blocks(run: Snapshot, title: str = "") -> list[Block]:
    """The verdict as a table and as sentences."""
    table = effect_table(run)
    if not len(table):
        waiting = note("The verdict follows when the confirmation runs of every arm have ended.")
        return [Text("verdict", waiting, title)]
    styles = style.arm_styles(run)
    columns = [
        Column("arm"),
        Column("verdict"),
        Column(run.metric.unit, numeric=True),
        Column("difference", numeric=True),
        Column(f"{100 * (1 - run.alpha):g} % interval", numeric=True),
        Column("p (Holm)", numeric=True),
        Column("seeds", numeric=True),
    ]
    rows = [
        Row(
            f"arm {row['arm']}",
            styles[row["arm"]].colour,
            [
                row["arm"],
                Cell(row["verdict"], row["verdict"], row["verdict"]),
                Cell(formatting.metric(row["value"]), row["value"]),
                Cell(formatting.metric(row["difference"], signed=True), row["difference"]),
                Cell(_interval(row), row["low" if row["level"] is None else "repeated_low"]),
                Cell(_p_value(row["p_holm"]), row["p_holm"]),
                Cell(f"{row['seeds']} of {row['seeds'] + row['failed']}", row["seeds"]),
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    sentences = render("sentences.html", sentences=table["sentence"].to_list())
    return [Grid("verdict", columns, rows, table, title, sortable=False), Text("sentences", sentences)]


def _interval(row: dict[str, Any]) -> str:
    """The interval that agrees with the design: of a sequential one, the interval over all its looks."""
    low, high = ("low", "high") if row["level"] is None else ("repeated_low", "repeated_high")
    if row[low] is None:
        return formatting.UNKNOWN
    return f"{formatting.metric(row[low], signed=True)} to {formatting.metric(row[high], signed=True)}"


def _p_value(p: float | None) -> str:
    return formatting.UNKNOWN if p is None else "< 0.001" if p < 0.001 else f"{p:.3g}"
