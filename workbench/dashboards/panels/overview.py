"""Every ablation in the folder of results."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl

from workbench.config import ConfigError
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.progress import overall_progress
from workbench.dashboards.view import RunView


def overview_table(run: Snapshot) -> pl.DataFrame:
    """The ablations in the folder of results, the newest first.

    Columns: ablation, question, state, ended and planned (runs), arms, verdict (in short), created, folder.
    """
    schema: dict[str, Any] = {
        "ablation": pl.String,
        "question": pl.String,
        "state": pl.String,
        "ended": pl.Int64,
        "planned": pl.Int64,
        "arms": pl.Int64,
        "verdict": pl.String,
        "created": pl.String,
        "folder": pl.String,
    }
    rows = []
    for folder in run.neighbours.folders():
        try:
            ablation = run.neighbours.snapshot(folder)
            progress, verdict = overall_progress(ablation), ablation.verdict() if ablation.finished else None
        except (ConfigError, KeyError, OSError, TypeError) as error:  # of an earlier version, or deleted this moment
            state = f"cannot be read ({type(error).__name__})"
            rows.append((folder.name, "", state, 0, 0, 0, "", "", str(folder)))
            continue
        rows.append(
            (
                ablation.name,
                ablation.question,
                progress.state,
                progress.ended,
                progress.planned,
                len(ablation.arms),
                ", ".join(f"{ablation.names.get(row.arm, row.arm)} {row.verdict}" for row in verdict.rows[1:])
                if verdict
                else "",
                ablation.provenance().get("created", ""),
                str(ablation.folder),
            )
        )
    return pl.DataFrame(rows, schema=schema, orient="row").sort("created", descending=True)


@panels.register
class Overview(Panel):
    """Which ablations are there, how far are they, and what came out?"""

    class Config(PanelConfig):
        kind: Literal["overview"] = "overview"

    title = "Ablations"
    order = 0

    def applies(self, run: RunView) -> bool:
        return True

    def blocks(self, run: Snapshot) -> list[Block]:
        table = overview_table(run)
        columns = [
            Column("ablation"),
            Column("state"),
            Column("runs", numeric=True),
            Column("arms", numeric=True),
            Column("verdict"),
            Column("question"),
            Column("created", numeric=True),
        ]
        rows = [
            Row(
                row["folder"],
                "",
                [
                    row["ablation"],
                    row["state"],
                    Cell(f"{row['ended']} of {row['planned']}", row["ended"]),
                    Cell(str(row["arms"]), row["arms"]),
                    row["verdict"],
                    row["question"],
                    row["created"][:16],
                ],
            )
            for row in table.iter_rows(named=True)
        ]
        empty = f"No ablation in {run.results}. `workbench run sweeps/quickstart.yaml` creates the first."
        return [Grid("ablations", columns, rows, table, action="open", empty=empty)]
