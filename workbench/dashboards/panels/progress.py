"""How far each arm is."""

from __future__ import annotations

from typing import Literal

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.progress import progress_table
from workbench.status import Stage

NOT_PLANNED: dict[str, str] = {Stage.TUNING: "nothing is tuned", Stage.CONFIRMATION: "no trial to confirm"}
"""Stage -> why none of its runs is planned."""


@panels.register
class ProgressPanel(Panel):
    """How far is each arm? Arms can be pinned to the top of tables, and hidden from every figure."""

    class Config(PanelConfig):
        kind: Literal["progress"] = "progress"

    title = "Progress"
    order = 10

    def blocks(self, run: Snapshot) -> list[Block]:
        run = run.unfiltered
        table, styles = progress_table(run), style.arm_styles(run)
        counts = ("done", "running", "failed", "pruned", "left")
        columns = [
            Column("arm"),
            Column("stage"),
            *(Column(name, numeric=True) for name in counts),
            Column("progress", numeric=True),
            Column("time left, one worker", numeric=True),
        ]
        rows = []
        for row in table.iter_rows(named=True):
            share = NOT_PLANNED[row["stage"]] if row["share"] is None else f"{100 * row['share']:.0f} %"
            left = formatting.duration(row["seconds_left"]) if row["left"] else formatting.UNKNOWN
            cells = [
                row["arm"],
                row["stage"],
                *(Cell(str(row[name]), row[name]) for name in counts),
                Cell(share, row["share"]),
                Cell(left, row["seconds_left"]),
            ]
            rows.append(Row(f"arm {row['arm']}", styles[row["arm"]].colour, cells))
        return [Grid("arms", columns, rows, table, marks=("pinned", "hidden"))]
