"""Expected value of the best of k tuning trials."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl

from workbench.ablation.analysis.diagnostics import best_of_table
from workbench.ablation.spec.tuning import EXCHANGEABLE
from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, error_bars, figure_of, legend, loss_title, nothing_tuned
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot


@panels.register
class BestOf(FigurePanel):
    """What would an arm gain from more tuning?"""

    class Config(PanelConfig):
        kind: Literal["best_of"] = "best_of"

    title = "best of k"
    tab = "Tuning"
    order = 53
    note = (
        "Expected best of k of an arm's trials, with the middle 90 % of a bootstrap over them: where the lines are "
        "flat, more tuning would change little. Pruned trials are left out."
    )

    def table(self, run: Snapshot) -> pl.DataFrame:
        return best_of_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        lines = []
        for arm, look in style.arm_styles(run).items():
            rows = table.filter(pl.col("arm") == arm)
            lines.append(
                go.Scatter(
                    x=rows["k"].to_list(),
                    y=rows["best"].to_list(),
                    mode="lines+markers",
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    error_y=error_bars(rows, "best", thickness=1),
                    hovertemplate="%{y:.4f} with %{x} trials",
                    **arm_trace(run, arm),
                )
            )
        missing = nothing_tuned(run, "No tuning trial has ended with a value yet.")
        if run.tuning.trials and run.tuning.sampler not in EXCHANGEABLE:
            missing = f"A random part of the trials of the sampler {run.tuning.sampler} is no shorter search."
        figure = figure_of(lines, "" if table["best"].count() else missing)
        most = max(table["k"].to_list(), default=0)
        figure.update_xaxes(title_text="trials k", dtick=1 if 0 < most <= 20 else None)
        figure.update_yaxes(title_text=f"expected {loss_title(run, 'selection_value')}")
        return figure.update_layout(legend=legend(run.arms))
