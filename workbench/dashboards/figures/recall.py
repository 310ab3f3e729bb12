"""Answers to the examples of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, legend, panels, spread
from workbench.dashboards.tables import recall_table, state_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


def recall_state(run: RunView) -> go.Figure:
    """Share of right answers against what decoding keeps, one point an arm and number of pairs."""
    table, styles = state_table(run), style.looks(run)
    if not len(table):
        return _nothing_recalled("decode state of one sequence (bytes)", "right answers")
    values = table["pairs"].unique().sort().to_list()
    grid = _in_one_row(run, [f"{value:g} pairs" for value in values])
    for column, value in enumerate(values, start=1):
        for arm, look in styles.items():
            mine = table.filter((pl.col("arm") == arm) & (pl.col("pairs") == value))
            grid.add_scatter(
                x=mine["cache_bytes"].to_list(),
                y=mine["accuracy"].to_list(),
                name=style.label(arm),
                mode="markers",
                legendgroup=f"arm {arm}",
                showlegend=column == 1,
                row=1,
                col=column,
                marker={"color": look.colour, "size": 11},
                hovertemplate="%{y:.1%} with %{x:.3s}B",
            )
        grid.update_xaxes(title_text="decode state (bytes)", type="log", row=1, col=column)
    return grid


def recall_curves(run: RunView, x: str = "pairs", panel: str = "length") -> go.Figure:
    """Share of right answers along one label of the report examples, one panel a value of another; mean over seeds as a
    line, smallest to largest as error bars.

    Args:
        run: the run.
        x: label along the horizontal axis.
        panel: label that tells the panels apart.
    """
    table, styles = recall_table(run, x, panel), style.looks(run)
    if not len(table):
        return _nothing_recalled(x, "accuracy")
    values = table[panel].unique().sort().to_list()
    grid = _in_one_row(run, [f"{panel} {value:g}" for value in values])
    for column, value in enumerate(values, start=1):
        for arm, look in styles.items():
            mine = table.filter((pl.col("arm") == arm) & (pl.col(panel) == value))
            grid.add_scatter(
                x=mine[x].to_list(),
                y=mine["accuracy"].to_list(),
                name=style.label(arm),
                mode="lines+markers",
                row=1,
                col=column,
                legendgroup=f"arm {run.arms.index(arm)}",
                showlegend=column == 1,
                customdata=mine["runs"].to_list(),
                error_y=spread(mine, "accuracy", thickness=1, width=3),
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate="%{y:.1%} at %{x:g} (%{customdata} runs)",
            )
        ticks = table.filter(pl.col(panel) == value)[x].unique().sort().to_list()
        grid.update_xaxes(title_text=style.label(x), type="log", tickvals=ticks, row=1, col=column)
    return grid


def recall_map(run: RunView, x: str = "length", y: str = "depth") -> go.Figure:
    """Share of right answers over two labels of the report examples as a heat map, one an arm.

    Args:
        run: the run.
        x: label along the horizontal axis.
        y: label along the vertical axis, growing downwards (a depth).
    """
    table = recall_table(run, x, y)
    if not len(table):
        return _nothing_recalled(x, y)
    arms = [arm for arm in run.arms if arm in table["arm"]]
    grid, places = panels(len(arms), titles=arms)
    grid.update_layout(height=100 + 280 * places[-1]["row"], margin={"t": 40})
    across, down = ([f"{value:g}" for value in table[name].unique().sort()] for name in (x, y))
    for arm, at in zip(arms, places):
        rows = table.filter(pl.col("arm") == arm).iter_rows(named=True)
        held = {(f"{row[x]:g}", f"{row[y]:g}"): row["accuracy"] for row in rows}
        grid.add_heatmap(
            x=across,
            y=down,
            z=[[held.get((a, d)) for a in across] for d in down],
            zmin=0,
            zmax=1,
            name=style.label(arm),
            coloraxis="coloraxis",
            texttemplate="%{z:.0%}",
            xgap=1,
            ygap=1,
            hovertemplate="%{z:.1%} at " + f"{style.label(x)} %{{x}}, {style.label(y)} %{{y}}",
            **at,
        )
        grid.update_xaxes(title_text=style.label(x), type="category", **at)
    grid.update_yaxes(type="category", autorange="reversed")
    grid.update_yaxes(title_text=style.label(y), col=1)
    bar = {"title": {"text": "right<br>answers"}, "tickformat": ".0%"}
    return grid.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})


def _in_one_row(run: RunView, titles: list[str]) -> go.Figure:
    """Panels of the share of right answers."""
    grid, _ = panels(len(titles), len(titles), titles)
    grid.update_layout(height=380, legend={**legend(run.arms), "y": 1.1}, margin={"t": 60})
    grid.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    return grid.update_yaxes(title_text="right answers", col=1)


def _nothing_recalled(x: str, y: str) -> go.Figure:
    figure = figure_of([], "No confirmation run with such examples has ended.")
    figure.update_xaxes(title_text=style.label(x))
    return figure.update_yaxes(title_text=style.label(y))
