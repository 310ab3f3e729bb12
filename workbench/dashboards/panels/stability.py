"""Spikes, what guards did about them, and alarms of the layers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.cells import seed_cell
from workbench.dashboards.figures.parts import arm_trace, figure_of, legend
from workbench.dashboards.panel import Block, Cell, Column, FigurePanel, Grid, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.formatting import UNKNOWN
from workbench.results.alarms import alarm_table
from workbench.results.tables import KEY_SCHEMA
from workbench.status import Stage

BINS = 200
"""Points per line, at most: the largest value of every bin, so that no spike is lost."""
MARKS = {"skipped": "x", "rolled_back": "triangle-left"}
"""What guards did -> its marker."""
COUNTS = ("skipped", "rolled_back", "undone")
"""Columns of logged points that count it."""


@panels.register
class Stability(FigurePanel):
    """Did training spike, what did the guards do, and which layers are in danger?"""

    class Config(PanelConfig):
        kind: Literal["stability"] = "stability"
        y: Literal["gradient_norm", "loss"] = "gradient_norm"
        """``gradient_norm``: before clipping; ``loss``: nats per token on training data."""
        log_y: bool = Field(True, title="log y")

    settings: Config
    title = "Stability"
    order = 86
    labels = {"gradient_norm": "Gradient norm", "loss": "Training loss"}
    report = {"Stability": {}}
    report_switch = "y"
    note = (
        "One line per confirmation run; of an arm that has none, its tuning trials. Crosses: steps skipped by guards "
        "since the last point. Triangles: returns to earlier weights."
    )

    def table(self, run: Snapshot) -> pl.DataFrame:
        return stability_table(run, self.settings.y)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        traces: list[Any] = []
        for arm, look in style.arm_styles(run).items():
            rows, trace = table.filter(pl.col("arm") == arm), arm_trace(run, arm)
            for number, line in enumerate(rows.partition_by("run", maintain_order=True)):
                traces.append(
                    go.Scatter(
                        x=line["tokens"].to_list(),
                        y=line["value"].to_list(),
                        mode="lines",
                        line={"color": look.colour, "dash": look.dash, "width": 1.2},
                        showlegend=not number,
                        hovertemplate=f"%{{y:.4g}} at %{{x:.4s}} ({style.label(line['run'][0])})",
                        **trace,
                    )
                )
            for name, symbol in MARKS.items():
                marked = rows.filter(pl.col(name) > 0)
                if len(marked):
                    traces.append(
                        go.Scatter(
                            x=marked["tokens"].to_list(),
                            y=marked["value"].to_list(),
                            customdata=marked[name].to_list(),
                            mode="markers",
                            marker={"symbol": symbol, "size": 10, "color": look.colour, "line": {"width": 1}},
                            showlegend=False,
                            hovertemplate=f"{name.replace('_', ' ')}: %{{customdata}} at %{{x:.4s}}",
                            **trace,
                        )
                    )
        missing = "This ablation has no training curves." if run.finished else "No training step has been logged yet."
        figure = figure_of(traces, "" if len(table) else missing)
        figure.update_xaxes(title_text="training tokens")
        title = (
            "gradient norm before clipping" if self.settings.y == "gradient_norm" else "training loss (nats per token)"
        )
        figure.update_yaxes(title_text=title, type="log" if self.settings.log_y else "linear")
        return figure.update_layout(legend=legend(run.arms))

    def blocks(self, run: Snapshot) -> list[Block]:
        return [*super().blocks(run), interventions(run), alarms(run)]


def stability_table(run: Snapshot, y: str) -> pl.DataFrame:
    """Logged points of every confirmation run, or tuning trial of an arm without one.

    Columns: arm, stage, run, seed, tokens, value (of ``y``, the largest of a bin of points), skipped (steps since the
    last row), rolled_back (returns to earlier weights since the last row).
    """
    schema = {**KEY_SCHEMA, "tokens": pl.Float64, "value": pl.Float64, "skipped": pl.Int64, "rolled_back": pl.Int64}
    confirmed = {line.arm for line in run.lines() if line.stage == Stage.CONFIRMATION and len(line.points.frame)}
    frames = []
    for line in run.lines():
        points = line.points.frame
        if not len(points) or (line.arm in confirmed and line.stage != Stage.CONFIRMATION):
            continue
        bins = np.arange(len(points)) * min(BINS, len(points)) // len(points)
        since = {name: pl.col(name).fill_null(0).diff().fill_null(pl.col(name).fill_null(0)) for name in MARKS}
        frames.append(
            points.select("tokens", pl.col(y).alias("value"), **since, bin=pl.Series(bins))
            .group_by("bin", maintain_order=True)
            .agg(pl.col("tokens").last(), pl.col("value").max(), *(pl.col(name).sum() for name in MARKS))
            .select(
                *(pl.lit(getattr(line, name), kind).alias(name) for name, kind in KEY_SCHEMA.items()), *list(schema)[4:]
            )
            .cast(schema)  # type: ignore[arg-type]
        )
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def interventions(run: Snapshot) -> Grid:
    """Runs in which guards skipped steps or rolled back."""
    schema = {**KEY_SCHEMA, "steps": pl.Int64, **dict.fromkeys(COUNTS, pl.Int64)}
    intervened = [
        line for line in run.lines() if line.points.last.get("skipped") or line.points.last.get("rolled_back")
    ]
    last = [
        (
            *(getattr(line, name) for name in KEY_SCHEMA),
            line.points.last["step"],
            *(line.points.last[n] for n in COUNTS),
        )
        for line in intervened
    ]
    table, styles = pl.DataFrame(last, schema=schema, orient="row"), style.arm_styles(run)
    rows = [
        Row(
            row["run"],
            styles[row["arm"]].colour if row["arm"] in styles else "",
            [
                row["arm"],
                row["stage"],
                seed_cell(row["seed"]),
                *(_count(row[name]) for name in ("steps", *COUNTS)),
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    numbers = ("steps", "skipped", "rolled back", "steps undone")
    columns = [
        Column("arm"),
        Column("stage"),
        Column("seed", numeric=True),
        *(Column(n, numeric=True) for n in numbers),
    ]
    return Grid("interventions", columns, rows, table, title="Guards", empty="No guard has intervened.")


def alarms(run: Snapshot) -> Grid:
    """Layers with a diagnostic beyond its limit."""
    table, styles = alarm_table(run.diagnostics()), style.arm_styles(run)
    rows = [
        Row(
            f"{row['run']} {row['name']} {row['layer']}",
            styles[row["arm"]].colour if row["arm"] in styles else "",
            [
                row["arm"],
                seed_cell(row["seed"]),
                row["name"].replace("_", " "),
                Cell(str(row["layer"]), row["layer"]),
                Cell(str(row["step"]), row["step"]),
                Cell("not finite" if row["value"] is None else f"{row['value']:.4g}", row["value"]),
                Cell(f"{row['limit']:g}", row["limit"]),
                row["meaning"] or UNKNOWN,
            ],
        )
        for row in table.iter_rows(named=True)
    ]
    columns = [
        Column("arm"),
        Column("seed", numeric=True),
        Column("diagnostic"),
        Column("layer", numeric=True),
        Column("from step", numeric=True),
        Column("largest", numeric=True),
        Column("limit", numeric=True),
        Column("meaning"),
    ]
    return Grid("alarms", columns, rows, table, title="Alarms", empty="No diagnostic is beyond its limit.")


def _count(value: int | None) -> Cell:
    return Cell(UNKNOWN if value is None else str(value), value)
