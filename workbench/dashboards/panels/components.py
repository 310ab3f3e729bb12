"""Components of the noise."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl

from workbench.ablation.analysis.components import LABELS, component_table
from workbench.dashboards import style
from workbench.dashboards.figures.parts import error_bars, figure_of
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import RunView


@panels.register
class ComponentShares(FigurePanel):
    """What does the noise between runs consist of?"""

    class Config(PanelConfig):
        kind: Literal["components"] = "components"

    title = "Noise"
    order = 75
    report = {"Components of the noise": {}}
    note = (
        "Share of the variance between runs; bars: 95 % generalised confidence intervals. "
        "Their combination: what only a particular set of seeds has."
    )

    def applies(self, run: RunView) -> bool:
        return bool(run.arms) and run.components is not None

    def table(self, run: Snapshot) -> pl.DataFrame:
        return component_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        shown = table.drop_nulls("share")
        points = []
        for (quantity,), rows in shown.group_by("quantity", maintain_order=True):
            arm = next(name for name in run.all_arms if quantity == name or str(quantity).startswith(f"{name} − "))
            look = style.arm_styles(run)[arm]
            points.append(
                go.Scatter(
                    x=rows["share"].to_list(),
                    y=[LABELS[name] for name in rows["component"]],
                    name=style.label(str(quantity)),
                    mode="markers",
                    marker={"color": look.colour, "size": 9, "symbol": "circle" if quantity == arm else "diamond"},
                    error_x=error_bars(rows, "share", "share_low", "share_high", thickness=1.5, color=look.colour),
                    customdata=rows["sd"].to_list(),
                    hovertemplate=f"%{{x:.0%}} of the variance, sd %{{customdata:.2g}} {run.metric.unit}",
                )
            )
        missing = "The runs do not differ." if len(table) else "The crossed runs are not complete yet."
        figure = figure_of(points, "" if points else missing)
        figure.update_layout(scattermode="group", showlegend=len(points) > 1)
        figure.update_xaxes(title_text="share of the variance between runs", tickformat=".0%", range=[-0.02, 1.02])
        return figure.update_yaxes(title_text="component", autorange="reversed")
