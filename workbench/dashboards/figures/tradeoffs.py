"""Quality against what it costs, in one ablation and over sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import band, figure_of, legend, quality_title, spread
from workbench.dashboards.tables import Spent, frontier_table, scaling_laws, scaling_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


SPENT_TITLES = {
    "training_flops": "training compute of one run (FLOPs)",
    "non_embedding": "parameters without embedding",
    "active": "active parameters",
    "cache_bytes": "decode state of one sequence (bytes)",
    "measured_rate": "training speed (tokens a second)",
}


def frontier(run: RunView, x: Spent = "training_flops") -> go.Figure:
    """Quality against what it costs: one point an arm with its range over seeds; the line joins arms that no other beats
    on both."""
    table, styles = frontier_table(run, x), style.looks(run)
    best = table.filter("best").sort(x)
    front = go.Scatter(
        x=best[x].to_list(),
        y=best["value"].to_list(),
        mode="lines",
        line={"color": style.INK, "width": 1.5, "dash": "dot"},
        name="Pareto front",
        hoverinfo="skip",
        showlegend=len(best) > 1,
    )
    points = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        tuning = bool(len(mine)) and mine["stage"][0] == "tuning"
        name = style.label(arm) + (" (tuning)" if tuning else "")
        points.append(
            go.Scatter(
                x=mine[x].to_list(),
                y=mine["value"].to_list(),
                name=name,
                mode="markers",
                marker={
                    "color": look.colour,
                    "size": 12,
                    "symbol": "circle-open" if tuning else "circle",
                    "line": {"width": 2},
                },
                error_y=spread(mine, "value", thickness=1.5, color=look.colour),
                customdata=mine["runs"].to_list(),
                hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)",
            )
        )
    empty = "" if len(table) else "No arm has both a number and this cost yet."
    figure = figure_of([front, *points], empty)
    wide = len(table) > 1 and table[x].min() > 0 and table[x].max() / table[x].min() > 5  # type: ignore[operator]
    figure.update_xaxes(title_text=SPENT_TITLES[x], type="log" if wide else "linear")
    figure.update_yaxes(title_text=quality_title(run))
    return figure.update_layout(legend=legend(run.arms))


BEYOND = 3.0
"""How far past the largest size, as a factor, a fitted law is drawn."""


def scaling(run: RunView, x: Literal["non_embedding", "training_flops"] = "non_embedding") -> go.Figure:
    """Quality of each arm over the sizes that have been run: this ablation and those beside it with arms of these names.

    Where there are sizes enough (:func:`scaling_laws`), the line is the arm's fitted law with its 95 % interval over seeds,
    carried on to :data:`BEYOND` times the largest size; where not, it joins the points.
    """
    table, styles = scaling_table(run, x), style.looks(run)
    laws = scaling_laws(table, x)
    bands, curves, points = [], [], []
    for arm, look in styles.items():
        mine, law = table.filter(pl.col("arm") == arm), laws.get(arm)
        group = {"name": style.label(arm), "legendgroup": f"arm {run.arms.index(arm)}"}
        places, reached = mine[x].to_list(), list(zip(mine["value"], mine["value"], mine["value"]))
        if law is not None:
            places = np.geomspace(min(places), BEYOND * max(places), 60).tolist()
            reached = [law.at(place) for place in places]
        value, low, high = ([row[i] for row in reached] for i in range(3))
        banded = law is not None and law.exponent_low is not None  # one seed a place tells nothing of the noise
        edges = zip(places, low, high) if banded else ()
        bands.append(band(edges, look, len(styles), **group))
        curves.append(
            go.Scatter(
                x=places,
                y=value,
                mode="lines",
                line={"color": look.colour, "dash": look.dash, "width": 1.8},
                hoverinfo="skip",
                showlegend=False,
                **group,
            )
        )
        points.append(
            go.Scatter(
                x=mine[x].to_list(),
                y=mine["value"].to_list(),
                mode="markers",
                marker={"size": 9, "color": look.colour},
                error_y=spread(mine, "value", thickness=1.5),
                customdata=[style.label(name) for name in mine["ablation"]],
                showlegend=True,
                hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata})",
                **group,
            )
        )
    figure = figure_of([*bands, *curves, *points], "" if len(table) else "No arm has a number yet.")
    figure.update_xaxes(title_text=SPENT_TITLES[x], type="log")
    figure.update_yaxes(title_text=quality_title(run), type="log")
    return figure.update_layout(legend=legend(run.arms))
