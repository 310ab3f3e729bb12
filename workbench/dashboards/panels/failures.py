"""Runs that failed."""

from __future__ import annotations

from typing import Literal

import polars as pl

from workbench.dashboards import style
from workbench.dashboards.cells import hyperparameters, seed_cell, status_text, step_cell
from workbench.dashboards.panel import Block, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.run_page import run_page
from workbench.dashboards.snapshot import Snapshot
from workbench.formatting import UNKNOWN
from workbench.status import FAILED, Stage


def failure_table(run: Snapshot) -> pl.DataFrame:
    """Runs that failed, with the reason, and arms that therefore could not be confirmed.

    Columns: arm, stage, run, seed, status, step, steps, reason, hyperparameters.
    """
    columns = ["arm", "stage", "run", "seed", "status", "step", "steps", "reason", "hyperparameters"]
    failed = run.runs().filter(pl.col("status").is_in(FAILED)).select(columns)
    arms = [
        {"arm": arm, "stage": Stage.CONFIRMATION, "status": "not confirmed", "reason": reason}
        for arm, reason in run.failures().items()
    ]
    return pl.concat([failed, pl.DataFrame(arms, schema=failed.schema, orient="row")])


@panels.register
class Failures(Panel):
    """What failed, and why? "details" opens the page of a run, with its log."""

    class Config(PanelConfig):
        kind: Literal["failures"] = "failures"
        run: str = ""
        """Name of the run whose page is open."""

    settings: Config
    title = "Failures"
    order = 90
    report = {"Failures": {}}

    def blocks(self, run: Snapshot) -> list[Block]:
        if page := run_page(run, self.settings.run):
            return page
        table, styles = failure_table(run), style.arm_styles(run)
        columns = [
            Column("arm"),
            Column("stage"),
            Column("seed", numeric=True),
            Column("status"),
            Column("step", numeric=True),
            Column("hyperparameters"),
            Column("reason"),
        ]
        rows = [
            Row(
                row["run"] or "",
                styles[row["arm"]].colour if row["arm"] in styles else "",
                [
                    row["arm"],
                    row["stage"],
                    seed_cell(row["seed"]),
                    status_text(row["status"]),
                    step_cell(row["step"]),
                    hyperparameters(row["hyperparameters"]),
                    row["reason"] or UNKNOWN,
                ],
            )
            for row in table.iter_rows(named=True)
        ]
        return [Grid("failures", columns, rows, table, action="details", empty="No run has failed.")]
