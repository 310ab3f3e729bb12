"""What several figures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.ablation.design import SAME_SIZE
from workbench.dashboards import style
from workbench.dashboards.snapshot import Snapshot

COST_TITLES = {
    "training_flops": "training compute of one run (FLOPs)",
    "non_embedding": "parameters without embedding",
    "active": "active parameters",
    "cache_bytes": "decode state of one sequence (bytes)",
    "measured_rate": "training speed (tokens per second)",
}
"""Column of the cost table -> the title of an axis along it."""


def figure_of(traces: Sequence[Any], empty: str = "") -> go.Figure:
    """A figure in the common style.

    Args:
        traces: its traces.
        empty: why there is nothing to draw; the axes are bare then.
    """
    figure = go.Figure(traces)
    figure.update_layout(template=style.TEMPLATE, height=400)
    if empty:
        annotate(figure, empty)
        bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
        figure.update_layout(xaxis=bare, yaxis=bare)
    return figure


def annotate(figure: go.Figure, text: str) -> None:
    """Write ``text`` into the middle of the figure."""
    figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 15})


def message(text: str) -> go.Figure:
    """A small figure that holds only a sentence."""
    figure = figure_of([], text)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.update_layout(height=160)


def subplots(
    count: int, columns: int = 4, titles: Sequence[str] = (), gap: float = 0.03
) -> tuple[go.Figure, list[Any]]:
    """``count`` plots with a shared vertical axis, at most ``columns`` in a row; and the row and column of each."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    grid = make_subplots(
        rows,
        columns,
        shared_yaxes=True,
        horizontal_spacing=gap,
        vertical_spacing=min(0.2, 0.6 / rows),
        subplot_titles=[style.label(title) for title in titles] or None,
    )
    grid.update_layout(template=style.TEMPLATE)
    if titles:
        grid.update_layout(**style.ABOVE_TITLES)
    return grid, [{"row": i // columns + 1, "col": i % columns + 1} for i in range(count)]


def arm_trace(run: Snapshot, arm: str, suffix: str = "") -> dict[str, Any]:
    """The fields that make a trace one of an arm: its name in the legend, and the group that is switched with it."""
    return {"name": style.labels(run.all_arms)[arm] + suffix, "legendgroup": f"arm {run.all_arms.index(arm)}"}


def band(edges: Iterable[tuple[float, Any, Any]], arm: style.ArmStyle, arms: int, **fields: Any) -> go.Scatter:
    """The area between two lines, fainter where many arms overlap.

    Args:
        edges: x, low, high.
        arm: the style of the arm.
        arms: how many arms are drawn.
        fields: more fields of the trace.
    """
    points = list(edges)
    x, low, high = map(list, zip(*points)) if points else ([], [], [])
    return go.Scatter(
        x=x + x[::-1],
        y=high + low[::-1],
        mode="lines",
        fill="toself",
        fillcolor=arm.faint(0.16 if arms <= 8 else 0.05),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        **fields,
    )


def error_bars(table: pl.DataFrame, middle: str, low: str = "low", high: str = "high", **fields: Any) -> dict[str, Any]:
    """Error bars from column ``low`` to column ``high`` of ``table`` around column ``middle``."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (table[high] - table[middle]).clip(0).to_list(),
        "arrayminus": (table[middle] - table[low]).clip(0).to_list(),
        **fields,
    }


def around(values: Iterable[float]) -> list[float] | None:
    """A range around amounts that are nearly equal, which would otherwise be drawn far apart; None if they are not."""
    known = [value for value in values if value is not None]
    if not known or min(known) <= 0 or max(known) > SAME_SIZE * min(known):
        return None
    return [0.5 * min(known), 1.5 * max(known)]


def legend(arms: Sequence[str]) -> dict[str, Any]:
    """Position of the legend: above the plot for few arms; beside it, where it scrolls, for many."""
    if len(arms) <= 8:
        return {}
    # measured from the plots, also where titles have moved the legend to the top of the figure
    place = {"x": 1.02, "yref": "paper", "y": 1, "yanchor": "top"}
    return {"orientation": "v", "font": {"size": 11}, "tracegroupgap": 0, **place}


def loss_title(run: Snapshot, y: str) -> str:
    """Title of an axis of ``loss`` or ``selection_value``."""
    if y == "loss":
        return "training loss (nats per token)"
    return style.label(f"selection {run.metric.name} ({run.metric.unit})")


def spanning(title: str, what: str) -> str:
    """A title of an axis with what bars or bands along it span."""
    return f"{title}<br><span style='font-size:11px'>{what}</span>"


def metric_title(run: Snapshot) -> str:
    """Title of an axis of the metric."""
    return style.label(f"{run.metric.name} ({run.metric.unit})")


def nothing_tuned(run: Snapshot, otherwise: str) -> str:
    """Why a figure of tuning trials is empty: no trial is planned, or ``otherwise``."""
    if run.tuning.trials:
        return otherwise
    return "Nothing is tuned: every arm trains with its given settings."
