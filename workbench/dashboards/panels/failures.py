"""Runs that failed."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import polars as pl

from workbench.dashboards import style
from workbench.dashboards.cells import hyperparameters, seed_cell, status_text, step_cell
from workbench.dashboards.panel import Block, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.run_page import run_page
from workbench.dashboards.snapshot import Snapshot
from workbench.formatting import UNKNOWN
from workbench.status import FAILED, Stage, Status

NOT_CONFIRMED = "not confirmed"


AT_STEP = re.compile(r"at step ([\d,]+)")
"""The step in the reason of a run that diverged; its last logged step is an earlier one."""


def failure_step(row: dict[str, Any]) -> int | None:
    """The step at which a run failed."""
    found = AT_STEP.search(row["reason"] or "")
    return int(found[1].replace(",", "")) if found else row["step"]


def advice(row: dict[str, Any]) -> str:
    """What to change in the description so that a run does not fail again, with the value it had."""
    tuned = json.loads(row["hyperparameters"] or "{}")

    def field(name: str) -> str:
        return f"{name} ({tuned[name]:.3g})" if isinstance(tuned.get(name), float) else name

    match row["status"]:
        case Status.DIVERGED:
            return f"Lower {field('training.learning_rate')} or training.clip, or lengthen training.warmup."
        case Status.OUT_OF_MEMORY:
            return f"Lower {field('training.batch_size')} and raise training.accumulate as much, or launch.workers: 1."
        case Status.HUNG:
            return "Raise launch.hung_after if its steps are slow; the log has its last line."
        case Status.CRASHED | Status.KILLED:
            return "See the log; the same launch runs it again."
    return "See its tuning trials above." if row["status"] == NOT_CONFIRMED else ""


def failure_table(run: Snapshot) -> pl.DataFrame:
    """Runs that failed, with the reason, and arms that therefore could not be confirmed.

    Columns: arm, stage, run, seed, status, step, steps, reason, hyperparameters.
    """
    columns = ["arm", "stage", "run", "seed", "status", "step", "steps", "reason", "hyperparameters"]
    failed = run.runs().filter(pl.col("status").is_in(FAILED)).select(columns)
    arms = [
        {"arm": arm, "stage": Stage.CONFIRMATION, "status": NOT_CONFIRMED, "reason": reason}
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

    def count(self, run: Snapshot) -> int:
        return len(failure_table(run))

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
            Column("what to do"),
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
                    step_cell(failure_step(row)),
                    hyperparameters(row["hyperparameters"]),
                    row["reason"] or UNKNOWN,
                    advice(row),
                ],
            )
            for row in table.iter_rows(named=True)
        ]
        return [Grid("failures", columns, rows, table, action="details", empty="No run has failed.")]
