"""The page of one run: what it was, how it differs from the baseline, what it recorded, its events and its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench import formatting
from workbench.ablation.folder import AblationFolder
from workbench.config import flatten
from workbench.dashboards import style
from workbench.dashboards.cells import hyperparameters, status_text, step_cell
from workbench.dashboards.figures.parts import message
from workbench.dashboards.panel import Block, Column, Figure, Grid, Row, Text
from workbench.dashboards.series import SERIES, recorded, series_title
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import render
from workbench.results.details import RunFiles, baseline_run, clock, differences, event_rows, log_end
from workbench.results.record import RunRecord
from workbench.results.store import RunFolder

COLUMNS = 3
"""Plots side by side."""
MAX_TITLE = 34
"""Longer titles would run into each other."""
MAX_POINTS = 500
"""At most so many points of a curve are drawn."""


def run_page(run: Snapshot, name: str) -> list[Block]:
    """The page of the run ``name``; nothing if there is no such run."""
    run = run.unfiltered
    found = run.runs().filter(pl.col("run") == name)
    if not len(found):  # a page may ask for any name
        return []
    row = found.row(0, named=True)
    folder = RunFolder(run.folder / "runs" / name)
    blocks: list[Block] = [Text("run", _head(run, row, folder))]
    blocks += [_differences(run, row, folder), _curves(run, name)]
    if folder.exists():
        blocks += [_events(folder), *_environment(folder)]
    return [*blocks, Text("log", render("run_log.html", text=_log(run, folder)), "Log")]


def _head(run: Snapshot, row: dict[str, Any], folder: RunFolder) -> Any:
    """What the run is and what came out."""
    look = style.arm_styles(run).get(row["arm"])
    settings = hyperparameters(row["hyperparameters"])
    facts = {
        "status": status_text(row["status"]) + (f": {row['reason']}" if row["reason"] else ""),
        f"report ({run.metric.unit})": formatting.metric(row["report_value"]),
        f"selection ({run.metric.unit})": formatting.metric(row["selection_value"]),
        "training loss (nats per token)": formatting.metric(row["loss"]),
        "tuned settings": settings or formatting.UNKNOWN,
        "step": step_cell(row["step"], row["steps"]).text,
        "tokens": formatting.count(row["tokens"]),
        "training time": formatting.duration(row["seconds"]),
        "speed": f"{formatting.count(row['tokens_per_second'])} tokens/s"
        if row["tokens_per_second"]
        else formatting.UNKNOWN,
        "parameters": formatting.count(row["parameters"]),
        "trained by": " · ".join(part for part in (row["code"], row["machine"]) if part) or formatting.UNKNOWN,
        "ended before as": row["earlier_outcomes"] or "",
    }
    files = RunFiles.of(folder.path) if folder.exists() else None
    paths: dict[str, Path | None] = {} if files is None else {"folder": files.folder, "checkpoint": files.checkpoint}
    return render(
        "run_head.html",
        title=f"{row['arm']} · {row['stage']}{', chosen' if row['selected'] else ''} · seed {row['seed']}",
        colour=look.colour if look else "",
        name=row["run"],
        facts={what: value for what, value in facts.items() if value},
        paths={what: str(path) for what, path in paths.items() if path},
    )


def _differences(run: Snapshot, row: dict[str, Any], folder: RunFolder) -> Grid:
    """Fields in which its configuration differs from that of a run of the baseline."""
    other = baseline_run(run.runs(), run.baseline, row["seed"])
    rows: list[tuple[str, Any, Any]] = []
    note, title = "", f"Configuration: what differs from the baseline {run.baseline}"
    if other is None or other["run"] == row["run"]:
        empty = (
            "This is the run of the baseline that others are compared with." if other else "The baseline has no run."
        )
    else:
        empty = "Nothing differs but the seed."
        record, theirs = _record(folder), _record(RunFolder(run.folder / "runs" / other["run"]))
        if record is not None and theirs is not None:
            rows = differences(record.config, theirs.config)
            note = f"Compared with the {other['stage']} run of seed {other['seed']}."
        else:
            rows = differences(_declared(run, row), _declared(run, other))
            note = "An archive keeps no configuration of single runs: declared fields of the arms, and tuned settings."
    table = pl.DataFrame(
        [(field, _text(a), _text(b)) for field, a, b in rows],
        schema={"field": pl.String, "baseline": pl.String, "run": pl.String},
        orient="row",
    )
    columns = [Column("field"), Column(run.baseline), Column("this run")]
    cells = [Row(field, "", [field, a, b]) for field, a, b in table.iter_rows()]
    return Grid("configuration", columns, cells, table, title, empty=empty, note=note if rows else "", sortable=False)


def _declared(run: Snapshot, row: dict[str, Any]) -> dict[str, Any]:
    """Fields of an archived run as far as they are known: those of its arm, and tuned ones."""
    launched = AblationFolder(run.folder)
    arm = dict(launched.record().config.arms.get(row["arm"], {})) if launched.has_record() else {}
    return {**flatten(arm), **json.loads(row["hyperparameters"] or "{}")}


def _record(folder: RunFolder) -> RunRecord | None:
    return folder.record() if folder.exists() else None


def _text(value: Any) -> str:
    return formatting.UNKNOWN if value is None else value if isinstance(value, str) else json.dumps(value)


def _curves(run: Snapshot, name: str) -> Block:
    """Everything that the run has recorded, over its tokens."""
    line = next((line for line in run.lines() if line.run == name), None)
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


def _events(folder: RunFolder) -> Grid:
    rows = [(clock(at), name, text) for at, name, text in event_rows(folder)]
    table = pl.DataFrame(rows, schema={"time": pl.String, "event": pl.String, "about": pl.String}, orient="row")
    cells = [Row(str(i), "", list(row)) for i, row in enumerate(rows)]
    columns = [Column("time"), Column("event"), Column("about")]
    return Grid("events", columns, cells, table, "Events", empty="Nothing has happened yet.", sortable=False)


def _environment(folder: RunFolder) -> list[Block]:
    rows = [
        (name, _text(value)) for name, value in flatten(folder.environment()).items() if value not in ({}, [], None)
    ]
    if not rows:
        return []
    table = pl.DataFrame(rows, schema={"what": pl.String, "value": pl.String}, orient="row")
    cells = [Row(name, "", [name, value]) for name, value in rows]
    return [Grid("environment", [Column("what"), Column("value")], cells, table, "Environment", sortable=False)]


def _log(run: Snapshot, folder: RunFolder) -> str:
    if run.archived:
        return "An archive keeps no logs."
    text = log_end(folder.path)
    if text is None:
        return "There is no log: the run has not started, or its folder was deleted."
    return text or "The run has printed nothing."
