"""The page of one run: what it was, how it differs from the baseline, what it recorded, its events and its log."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.figures.parts import message
from workbench.dashboards.panel import Block, Cell, Column, Figure, Grid, Row, Text
from workbench.dashboards.series import SERIES, recorded, series_title
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.run import RunDetails, run_details, value_text
from workbench.dashboards.templates import render
from workbench.results.details import clock

COLUMNS = 3
"""Plots side by side."""
MAX_TITLE = 34
"""Longer titles would run into each other."""
MAX_POINTS = 500
"""At most so many points of a curve are drawn."""


def run_page(run: Snapshot, name: str) -> list[Block]:
    """The page of the run ``name``; nothing if there is no such run."""
    details = run_details(run, name)
    if details is None:  # a page may ask for any name
        return []
    look = style.arm_styles(run.unfiltered).get(details.row["arm"])
    head = render(
        "run_head.html",
        title=details.title,
        colour=look.colour if look else "",
        name=name,
        facts=details.facts,
        paths=details.paths,
    )
    blocks: list[Block] = [Text("run", head), _differences(details), _curves(run.unfiltered, details)]
    blocks += _measured(details)
    if details.record is not None:
        blocks += [_events(details), *_environment(details)]
    log = details.why_no_log if details.log is None else details.log or "The run has printed nothing."
    return [*blocks, Text("log", render("run_log.html", text=log), "Log")]


def _differences(details: RunDetails) -> Grid:
    """Fields in which its configuration differs from that of a run of the baseline."""
    rows = [(name, value_text(a), value_text(b)) for name, a, b in details.differences]
    names = ("field", "baseline", "run")
    table = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    columns = [Column("field"), Column(details.baseline), Column("this run")]
    cells = [Row(name, "", [name, a, b]) for name, a, b in rows]
    title = f"Configuration: what differs from the baseline {details.baseline}"
    note = details.compared if rows else ""
    return Grid("configuration", columns, cells, table, title, empty=details.compared, note=note, sortable=False)


def _curves(run: Snapshot, details: RunDetails) -> Block:
    """Everything that the run has recorded, over its tokens."""
    line = details.line
    names = recorded([line] if line else [])
    if line is None or not names:
        missing = "The archive keeps no curves of this run." if run.archived else "Nothing has been recorded yet."
        return Figure("recorded", message(missing), pl.DataFrame({"step": []}))
    rows = -(-len(names) // COLUMNS)
    titles = [title if len(title := series_title(run, name)) <= MAX_TITLE else SERIES[name].label for name in names]
    grid = make_subplots(rows, COLUMNS, subplot_titles=titles, vertical_spacing=0.3 / rows, horizontal_spacing=0.07)
    look = style.arm_styles(run).get(line.arm)
    for i, series in enumerate(names):
        x, y = line.points.line("tokens", series)
        every = max(1, len(x) // MAX_POINTS)
        is_sparse = len(x) <= 30
        grid.add_trace(
            go.Scatter(
                x=x[::every],
                y=y[::every],
                mode="lines+markers" if is_sparse else "lines",
                line={"color": look.colour if look else style.PALETTE[1], "width": 1.5},
                marker={"size": 4},
                hovertemplate="%{y:.4g} at %{x:.3s} tokens<extra></extra>",
                showlegend=False,
            ),
            row=i // COLUMNS + 1,
            col=i % COLUMNS + 1,
        )
    grid.update_layout(template=style.TEMPLATE, height=60 + 190 * rows, margin={"t": 40, "l": 48, "r": 12, "b": 44})
    grid.update_annotations(font={"size": 12})
    grid.update_yaxes(nticks=5)
    grid.update_xaxes(nticks=5)
    grid.update_xaxes(title_text="training tokens", row=rows)
    shown = line.points.frame.select("step", "tokens", *names)
    return Figure("recorded", grid, shown)


def _measured(details: RunDetails) -> list[Block]:
    """What was measured, where it is more than the metric, which the head has."""
    rows = [row for row in details.measured if row["value"] is not None]
    if len({(row["suite"], row["task"], row["metric"]) for row in rows}) < 2:
        return []
    names = ("split", "suite", "task", "metric", "value", "n", "step")
    columns = [Column(name, numeric=name in ("value", "n", "step")) for name in names]
    cells = [
        Row(str(i), "", [*(row[name] for name in names[:4]), Cell(f"{row['value']:.4g}", row["value"]), *_counts(row)])
        for i, row in enumerate(rows)
    ]
    table = pl.DataFrame(rows, infer_schema_length=None).select(names)
    return [Grid("measured", columns, cells, table, "Measured, last values")]


def _counts(row: dict[str, Any]) -> list[Cell]:
    return [Cell(formatting.count(row[name]), row[name]) for name in ("n", "step")]


def _events(details: RunDetails) -> Grid:
    rows = [(clock(at), name, text) for at, name, text in details.events]
    table = pl.DataFrame(rows, schema={"time": pl.String, "event": pl.String, "about": pl.String}, orient="row")
    cells = [Row(str(i), "", list(row)) for i, row in enumerate(rows)]
    columns = [Column("time"), Column("event"), Column("about")]
    return Grid("events", columns, cells, table, "Events", empty="Nothing has happened yet.", sortable=False)


def _environment(details: RunDetails) -> list[Block]:
    rows = [(name, value_text(value)) for name, value in details.environment.items()]
    if not rows:
        return []
    table = pl.DataFrame(rows, schema={"what": pl.String, "value": pl.String}, orient="row")
    cells = [Row(name, "", [name, value]) for name, value in rows]
    return [Grid("environment", [Column("what"), Column("value")], cells, table, "Environment", sortable=False)]
