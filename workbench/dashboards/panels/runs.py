"""Every run."""

from __future__ import annotations

from typing import Literal

import polars as pl

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.cells import hyperparameters, seed_cell, status_text, step_cell
from workbench.dashboards.logs import log_blocks
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.status import Stage


@panels.register
class Runs(Panel):
    """Every run: sort, filter, pin, hide; "draw" adds a run to Curves as a line of its own."""

    class Config(PanelConfig):
        kind: Literal["runs"] = "runs"
        log: str = ""
        """Name of the run whose log is shown."""

    settings: Config
    title = "Runs"
    order = 100
    report = {"Every run": {}}

    def blocks(self, run: Snapshot) -> list[Block]:
        run = run.unfiltered
        styles = style.arm_styles(run)
        position = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
        stage = pl.col("stage") == Stage.CONFIRMATION
        table = run.runs().sort(position, stage, "seed", "hyperparameters", maintain_order=True)
        columns = [
            Column("arm"),
            Column("stage"),
            Column("seed", numeric=True),
            Column("status"),
            Column("step", numeric=True),
            Column("tokens", numeric=True),
            Column("time", numeric=True),
            Column("loss (nats/token)", numeric=True),
            Column(f"selection ({run.metric.short})", numeric=True),
            Column(f"report ({run.metric.short})", numeric=True),
            Column("tokens/s", numeric=True),
            Column("hyperparameters"),
        ]
        rows = [
            Row(
                row["run"],
                styles[row["arm"]].colour if row["arm"] in styles else "",
                [
                    row["arm"],
                    row["stage"] + (", chosen" if row["selected"] else ""),
                    seed_cell(row["seed"]),
                    status_text(row["status"]),
                    step_cell(row["step"], row["steps"]),
                    Cell(formatting.count(row["tokens"]), row["tokens"]),
                    Cell(formatting.duration(row["seconds"]), row["seconds"]),
                    *(
                        Cell(formatting.metric(row[name]), row[name])
                        for name in ("loss", "selection_value", "report_value")
                    ),
                    Cell(formatting.count(row["tokens_per_second"]), row["tokens_per_second"]),
                    hyperparameters(row["hyperparameters"]),
                ],
            )
            for row in table.iter_rows(named=True)
        ]
        marks = ("pinned", "hidden", "selected")
        grid = Grid("runs", columns, rows, table, marks=marks, action="log", empty="No run has started.")
        return [grid, *log_blocks(run, self.settings.log)]
