"""Every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import polars as pl

from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.run_page import run_page
from workbench.dashboards.snapshot import Snapshot
from workbench.results.listing import arm_rows, cell_text, constants, run_rows, setting_names
from workbench.status import Stage

KEPT = ("arm", "report", "selection", "runs", "seed")
"""Columns that are shown even where all rows are equal."""
COUNTS = ("failed", "unfinished", "trials")
"""Columns of arms alone."""
TEXTS = ("arm", "stage", "status", "reason", "run", "chosen")
"""Columns that are not numbers."""
SHORT = {"tokens_per_second": "tokens/s", "seconds": "time", "loss": "loss (nats/token)"}
"""Column -> its title, where that is not its name."""


@panels.register
class Runs(Panel):
    """Every run, by arm or one by one: unfold an arm, sort, filter (gdn lr>0.002), pin, hide; "draw" adds a run to
    Curves as a line; "details" opens its page."""

    class Config(PanelConfig):
        kind: Literal["runs"] = "runs"
        rows: Literal["arms", "runs"] = "arms"
        """One row per arm, with its runs below it; or one per run."""
        run: str = ""
        """Name of the run whose page is open."""

    settings: Config
    title = "Runs"
    order = 100
    labels = {"arms": "By arm", "runs": "Every run"}
    report = {"Every run": {"rows": "runs"}}

    def blocks(self, run: Snapshot) -> list[Block]:
        if page := run_page(run, self.settings.run):
            return page
        run = run.unfiltered
        runs = run_rows(run.runs(), run.arms)
        by_arm = self.settings.rows == "arms"
        listed = arm_rows(run.runs(), run.arms) if by_arm else runs
        settings = list(setting_names(run.runs()).values())
        names = _columns(by_arm, settings)
        # a column that tells no run from another tells no arm from another either
        same = constants(runs if len(runs) > 1 else listed, KEPT)
        same |= {name: None for name in names if all(row.get(name) is None for row in [*runs, *listed])}
        if by_arm:
            same |= {
                name: value for name, value in constants(listed).items() if name in ("failed", "unfinished", "trials")
            }
        units = {name: f"{name} ({run.metric.short})" for name in ("report", "selection")}
        titles = {name: {**SHORT, **units}.get(name, name.replace("_", " ")) for name in names}
        columns = [Column(titles[name], name not in TEXTS, hidden=name in same) for name in names]
        rows = (
            [_arm_row(run, arm, names, runs) for arm in listed]
            if by_arm
            else [_run_row(run, row, names) for row in runs]
        )
        known = {name: same[name] for name in names if same.get(name) not in (None, 0, False)}
        note = ", ".join(f"{titles[name]} {cell_text(name, known)}" for name in known)
        return [
            Grid(
                "runs" if by_arm else "every-run",
                columns,
                rows,
                pl.DataFrame(listed, infer_schema_length=None, strict=False),
                marks=("pinned", "hidden", "selected"),
                action="details",
                empty="No run has started.",
                frozen=2,
                note=f"The same everywhere: {note}." if note else "",
            )
        ]


def _columns(by_arm: bool, settings: Sequence[str]) -> list[str]:
    values = ("report", "selection")
    head = ["arm", *values, *(["runs"] if by_arm else ["stage", "seed"])]
    tail = ["status", *COUNTS] if by_arm else ["chosen", "status"]
    measured = ("loss", "tokens", "seconds", "tokens_per_second", "parameters" if by_arm else "step")
    return [*head, *settings, *tail, *measured, *(() if by_arm else ("reason", "run"))]


def _cells(row: Mapping[str, Any], names: Sequence[str], **texts: str) -> list[Cell]:
    return [Cell(texts.get(name) or (cell_text(name, row) if name in row else ""), row.get(name)) for name in names]


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a filter compares: columns by their names and by the titles that are shown."""
    return {**row, **{title: row[name] for name, title in SHORT.items() if name in row}}


def _colour(run: Snapshot, arm: str) -> str:
    styles = style.arm_styles(run)
    return styles[arm].colour if arm in styles else ""


def _run_row(run: Snapshot, row: Mapping[str, Any], names: Sequence[str]) -> Row:
    return Row(row["run"], _colour(run, row["arm"]), _cells(row, names), values=_values(row))


def _arm_row(run: Snapshot, arm: Mapping[str, Any], names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Row:
    """An arm with its runs below it."""
    below = []
    for row in runs:
        if row["arm"] == arm["arm"]:
            seed = "" if row["stage"] == Stage.TUNING else f", seed {row['seed']}"
            label = f"{row['stage']}{seed}{', chosen' if row['chosen'] else ''}"
            below.append(Row(row["run"], "", _cells(row, names, arm=label), values=_values(row)))
    missing = arm["stage"] == Stage.TUNING
    cells = _cells(arm, names, runs="none confirmed" if missing else "")
    return Row(
        f"arm {arm['arm']}", _colour(run, arm["arm"]), cells, below, values=_values(arm), marks=("pinned", "hidden")
    )
