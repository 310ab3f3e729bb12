"""Quality against cost."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import (
    COST_TITLES,
    arm_trace,
    around,
    error_bars,
    figure_of,
    legend,
    metric_title,
    spanning,
)
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.quality import CostAxis, frontier_table
from workbench.status import Stage


@panels.register
class Frontier(FigurePanel):
    """Which arms are worth their cost?"""

    class Config(PanelConfig):
        kind: Literal["frontier"] = "frontier"
        cost: CostAxis = Field("training_flops", title="against")

    settings: Config
    title = "Frontier"
    order = 60
    labels = COST_TITLES
    note = "The dotted line joins the arms that no other arm beats on both axes; bars span the runs."

    def table(self, run: Snapshot) -> pl.DataFrame:
        return frontier_table(run, self.settings.cost)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        cost = self.settings.cost
        best = table.filter("best").sort(cost)
        front = go.Scatter(
            x=best[cost].to_list(),
            y=best["value"].to_list(),
            mode="lines",
            line={"color": style.INK, "width": 1.5, "dash": "dot"},
            name="Pareto front",
            hoverinfo="skip",
            showlegend=len(best) > 1,
        )
        points = []
        for arm, look in style.arm_styles(run).items():
            row = table.filter(pl.col("arm") == arm)
            is_tuning = bool(len(row)) and row["stage"][0] == Stage.TUNING
            symbol = f"{look.symbol}-open" if is_tuning else look.symbol
            points.append(
                go.Scatter(
                    x=row[cost].to_list(),
                    y=row["value"].to_list(),
                    mode="markers",
                    marker={"color": look.colour, "size": 12, "symbol": symbol, "line": {"width": 2}},
                    error_y=error_bars(row, "value", thickness=1.5, color=look.colour),
                    customdata=row["runs"].to_list(),
                    hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)",
                    **arm_trace(run, arm, " (tuning)" if is_tuning else ""),
                )
            )
        figure = figure_of([front, *points], "" if len(table) else "No arm has both a value and this cost yet.")
        costs = table[cost].to_list()
        log = len(costs) > 1 and min(costs) > 0 and max(costs) / min(costs) > 5
        span = None if log else around(costs)
        figure.update_xaxes(title_text=COST_TITLES[cost], type="log" if log else "linear", minexponent=3, range=span)
        figure.update_yaxes(title_text=spanning(metric_title(run), "bars: smallest to largest run"))
        return figure.update_layout(legend=legend(run.arms), height=470)
