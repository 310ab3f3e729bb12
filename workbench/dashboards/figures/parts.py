"""What figures are put together from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.dashboards import style

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


def figure_of(traces: list[Any], empty: str = "") -> go.Figure:
    figure = go.Figure(traces)
    figure.update_layout(template=style.TEMPLATE, height=400)
    if empty:
        say(figure, empty)
        bare = {"showticklabels": False, "ticks": "", "showgrid": False, "zeroline": False}
        figure.update_layout(xaxis=bare, yaxis=bare)
    return figure


def say(figure: go.Figure, text: str) -> None:
    figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 15})


def sentence(text: str) -> go.Figure:
    figure = figure_of([], text)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.update_layout(height=160)


def table_of(heads: list[str], columns: list[list[str]]) -> go.Figure:
    plain = {"fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": style.FAINT}, "align": "left"}
    widths = [min(max(len(text) for text in [head, *column]), 40) + 3 for head, column in zip(heads, columns)]
    figure = figure_of(
        [
            go.Table(
                header={"values": [f"<b>{head}</b>" for head in heads], **plain, "font": {"color": style.INK}},
                cells={"values": columns, "height": 26, **plain, "font": {"color": style.INK}},
                columnwidth=widths,
            )
        ]
    )
    return figure.update_layout(height=min(120 + 40 * len(columns[0]), 640), margin={"l": 8, "r": 8, "t": 8, "b": 8})


def panels(count: int, columns: int = 4, titles: Sequence[str] = (), gap: float = 0.03) -> tuple[go.Figure, list[Any]]:
    """Drawings side by side with one vertical axis, at most so many in a row; and the place of each."""
    columns = min(count, columns)
    lines = math.ceil(count / columns)
    grid = make_subplots(
        lines,
        columns,
        shared_yaxes=True,
        horizontal_spacing=gap,
        vertical_spacing=min(0.2, 0.6 / lines),
        subplot_titles=[style.label(title) for title in titles] or None,
    )
    grid.update_layout(template=style.TEMPLATE)
    return grid, [{"row": i // columns + 1, "col": i % columns + 1} for i in range(count)]


def band(edges: Iterable[tuple[float, Any, Any]], look: style.ArmStyle, among: int, **about: Any) -> go.Scatter:
    """What lies between two lines, filled; faintly where many arms lie over one another.

    Args:
        edges: place, low, high.
        look: of the arm.
        among: how many arms are drawn.
        about: more fields of the trace.
    """
    held = list(edges)
    along, low, high = map(list, zip(*held)) if held else ([], [], [])
    return go.Scatter(
        x=along + along[::-1],
        y=high + low[::-1],
        mode="lines",
        fill="toself",
        fillcolor=look.faint(0.16 if among <= 8 else 0.05),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        **about,
    )


def spread(table: pl.DataFrame, middle: str, **look: Any) -> dict[str, Any]:
    """Error bars from the columns low to high of ``table``."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (table["high"] - table[middle]).to_list(),
        "arrayminus": (table[middle] - table["low"]).to_list(),
        **look,
    }


def legend(arms: list[str]) -> dict[str, Any]:
    """Above the plot for few arms; beside it, where it scrolls, for many."""
    if len(arms) <= 8:
        return {}
    return {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "font": {"size": 11}}


def y_title(run: RunView, y: str) -> str:
    if y == "loss":
        return "training loss (nats per token)"
    return style.label(f"selection {run.metric.name} ({run.metric.unit})")


def quality_title(run: RunView) -> str:
    return style.label(f"{run.metric.name} ({run.metric.unit})")
