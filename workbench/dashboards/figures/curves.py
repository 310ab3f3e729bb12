"""Training over time."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import band, figure_of, legend, y_title
from workbench.dashboards.tables import XAxis, YAxis, curve_table, smoothed, thinned

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


X_TITLES = {"tokens": "training tokens", "flops": "training compute (FLOPs)", "seconds": "training time (s)"}


def loss_curves(
    run: RunView,
    x: XAxis = "tokens",
    y: YAxis = "loss",
    *,
    smoothing: float = 0.0,
    log_x: bool = False,
    log_y: bool = False,
    single: Collection[str] = (),
) -> go.Figure:
    """Mean over seeds as a line, smallest to largest as a band, one colour an arm.

    Args:
        run: the run.
        x: ``tokens``, ``flops`` or ``seconds``.
        y: ``loss`` or ``selection_value``.
        smoothing: as in :func:`curve_table`.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical one is.
        single: names of runs that are drawn as thin lines of their own, too.
    """
    table, styles = curve_table(run, x, y, smoothing=smoothing), style.looks(run)
    bands, lines = [], []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        place = mine[x].to_list()
        tuning = bool(len(mine)) and mine["stage"][0] == "tuning"
        name = style.label(arm) + (" (tuning trials)" if tuning else "")
        group = f"arm {run.arms.index(arm)}"
        bands.append(band(zip(place, mine["low"], mine["high"]), look, len(styles), legendgroup=group, name=name))
        lines.append(
            go.Scatter(
                x=place,
                y=mine["mean"].to_list(),
                name=name,
                legendgroup=group,
                customdata=mine["runs"].to_list(),
                mode="lines+markers" if y == "selection_value" else "lines",
                marker={"size": 5},
                line={"color": look.colour, "dash": look.dash, "width": 2.2 if arm == run.baseline else 1.8},
                hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)",
                showlegend=True,
            )
        )
    for held in run.lines() if single else ():
        if held.run in single and held.arm in styles:
            along, up = held.points.line(x, y)
            lines.append(
                go.Scattergl(
                    x=thinned(along),
                    y=thinned(smoothed(up, smoothing)),
                    mode="lines",
                    showlegend=False,
                    name=style.label(held.run),
                    line={"color": styles[held.arm].colour, "width": 1},
                    legendgroup=f"arm {run.arms.index(held.arm)}",
                    hovertemplate="%{y:.4f} at %{x:.4s}",
                )
            )
    none = "No training steps are kept of this ablation." if run.finished else "No training step has been recorded yet."
    figure = figure_of([*bands, *lines], "" if len(table) else none)
    figure.update_xaxes(title_text=X_TITLES[x], type="log" if log_x else "linear")
    told = f", smoothed (weight {smoothing:g})" if smoothing else ""
    figure.update_yaxes(title_text=y_title(run, y) + told, type="log" if log_y else "linear")
    figure.update_layout(legend=legend(run.arms), hovermode="x unified" if len(styles) <= 8 else "closest")
    return figure
