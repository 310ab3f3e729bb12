"""Recall against the size of the decode state."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, error_bars
from workbench.dashboards.figures.recall import accuracy_row, no_examples
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.recall import recall_table
from workbench.dashboards.view import RunView


@panels.register
class RecallState(FigurePanel):
    """How much is recalled with how large a decode state?"""

    class Config(PanelConfig):
        kind: Literal["recall_state"] = "recall_state"

    title = "recall against state"
    tab = "Mechanisms"
    order = 84
    report = {"Recall against decode state": {}}
    note = "Right answers among the report examples, one point per arm and number of pairs."

    def applies(self, run: RunView) -> bool:
        return any("pairs" in labels for labels in run.views.values())

    def table(self, run: Snapshot) -> pl.DataFrame:
        """Accuracy by number of pairs, with cache_bytes of each arm."""
        recall, card = recall_table(run, "pairs"), run.cost()
        if "cache_bytes" not in card.columns:
            return recall.with_columns(cache_bytes=pl.lit(None, pl.Float64))
        cache = card.select("arm", pl.col("cache_bytes").cast(pl.Float64))
        return recall.join(cache, on="arm", how="left", maintain_order="left")

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        if not len(table):
            return no_examples("decode state of one sequence (bytes)", "right answers")
        values = table["pairs"].unique().sort().to_list()
        grid = accuracy_row(run, [f"{value:g} pairs" for value in values])
        for column, value in enumerate(values, start=1):
            for arm, look in style.arm_styles(run).items():
                rows = table.filter((pl.col("arm") == arm) & (pl.col("pairs") == value))
                grid.add_scatter(
                    x=rows["cache_bytes"].to_list(),
                    y=rows["accuracy"].to_list(),
                    mode="markers",
                    showlegend=column == 1,
                    row=1,
                    col=column,
                    marker={"color": look.colour, "size": 11, "symbol": look.symbol},
                    error_y=error_bars(rows, "accuracy", thickness=1, width=3, color=look.colour),
                    hovertemplate="%{y:.1%} with %{x:.3s}B",
                    **arm_trace(run, arm),
                )
            grid.update_xaxes(title_text="decode state (bytes)", type="log", minexponent=3, row=1, col=column)
        return grid
