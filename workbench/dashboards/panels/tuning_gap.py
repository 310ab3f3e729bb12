"""How well each arm was tuned."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.figures.parts import nothing_tuned
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import note


@panels.register
class TuningGap(Panel):
    """How far is each arm's setting from its own optimum, beside its difference to the baseline?"""

    class Config(PanelConfig):
        kind: Literal["tuning_gap"] = "tuning_gap"

    title = "gap"
    tab = "Tuning"
    order = 51
    report = {"Tuning gap": {}}

    def blocks(self, run: Snapshot) -> list[Block]:
        table, styles = gap_table(run), style.arm_styles(run)
        if not len(table):
            return [Text("gap", note(nothing_tuned(run, "No arm's tuning has ended yet.")))]
        columns = [
            Column("arm"),
            Column("setting"),
            Column("trials", numeric=True),
            Column("seeds", numeric=True),
            Column("at an edge"),
            Column(f"tuning gap ({run.metric.unit})", numeric=True),
            Column("difference", numeric=True),
        ]
        rows = [
            Row(
                f"arm {row['arm']}",
                styles[row["arm"]].colour,
                [
                    row["arm"],
                    row["setting"] + (", interpolated" if row["interpolated"] else ""),
                    Cell(str(row["trials"]), row["trials"]),
                    Cell(str(row["seeds"]), row["seeds"]),
                    row["edges"] or formatting.UNKNOWN,
                    Cell(_span(row), row["gap"]),
                    Cell(formatting.metric(row["difference"], signed=True), row["difference"]),
                ],
            )
            for row in table.iter_rows(named=True)
        ]
        return [Grid("gap", columns, rows, table)]


def gap_table(run: Snapshot) -> pl.DataFrame:
    """One row per arm that was tuned (:class:`workbench.ablation.verdict.effort.Effort`).

    Columns: arm; setting, in words; interpolated; trials (settings that finished); seeds (tuning seeds behind the
    choice); edges (fields whose chosen value lies at the edge of what was tried); gap (fitted value of the setting over
    the arm's fitted optimum, on the selection split), low, high (its 90 % interval, null without repeats); difference
    (to the baseline on the report split, null before the verdict).
    """
    schema = {
        "arm": pl.String,
        "setting": pl.String,
        "interpolated": pl.Boolean,
        "trials": pl.Int64,
        "seeds": pl.Int64,
        "edges": pl.String,
        "gap": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "difference": pl.Float64,
    }
    verdict = run.verdict()
    differences = {} if verdict is None else {row.arm: row.difference for row in verdict.rows}
    rows = [
        {
            "arm": arm,
            "setting": formatting.setting(effort.setting),
            "interpolated": effort.interpolated,
            "trials": effort.trials,
            "seeds": effort.seeds,
            "edges": ", ".join(map(str, effort.edges)),
            "gap": None if effort.gap is None else effort.gap.value,
            "low": None if effort.gap is None else effort.gap.low,
            "high": None if effort.gap is None else effort.gap.high,
            "difference": differences.get(arm),
        }
        for arm, effort in run.efforts().items()
        if effort.setting
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _span(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return formatting.metric(row["gap"])
    return f"{formatting.metric(row['gap'])} ({formatting.metric(row['low'])} to {formatting.metric(row['high'])})"
