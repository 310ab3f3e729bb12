"""Scores of evaluation suites over the length of the context."""

from __future__ import annotations

from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, band, legend, message, subplots
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.suites import NO_SCORES, main_scores, plus_minus, suite_table, with_names
from workbench.dashboards.view import RunView

ALL = "all suites"
COLUMNS = 3


@panels.register
class SuiteLengths(FigurePanel):
    """How does each arm do as the context grows?"""

    class Config(PanelConfig):
        kind: Literal["suite_lengths"] = "suite_lengths"
        suite: str = Field(ALL, title="suite")
        """Name of a suite."""

    settings: Config
    title = "lengths"
    tab = "Suites"
    order = 47
    report = {"Suites over context length": {}}
    note = "Means over confirmation runs; the band is the t interval over seeds. Dotted: the length of training."

    def applies(self, run: RunView) -> bool:
        return run.has_suites

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"suite": [ALL, *self._all(run)["suite"].unique().sort()]}

    def _all(self, run: Snapshot) -> pl.DataFrame:
        """Tasks with two lengths or more."""
        table = main_scores(suite_table(run, by_length=True))
        return table.filter(pl.col("length").n_unique().over("suite", "task", "metric") > 1)

    def table(self, run: Snapshot) -> pl.DataFrame:
        """Rows of :func:`workbench.dashboards.tables.suites.suite_table` by length."""
        table = self._all(run)
        return table if self.settings.suite == ALL else table.filter(pl.col("suite") == self.settings.suite)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """A plot per task."""
        if not len(table):
            return message(f"{NO_SCORES[:-1]} at several lengths.")
        plots = with_names(table).partition_by("suite", "task", "metric", maintain_order=True)
        grid, positions = subplots(len(plots), COLUMNS, [_title(plot.row(0, named=True)) for plot in plots], gap=0.08)
        trained = sorted({length for arm, length in run.contexts.items() if arm in run.arms})
        for plot, position in zip(plots, positions):
            for arm, look in style.arm_styles(run).items():
                rows, trace = plot.filter(pl.col("arm") == arm), arm_trace(run, arm)
                edges = rows.drop_nulls("low").select("length", "low", "high").rows()
                grid.add_trace(band(edges, look, len(run.arms), legendgroup=trace["legendgroup"]), **position)
                grid.add_scatter(
                    x=rows["length"].to_list(),
                    y=rows["value"].to_list(),
                    mode="lines+markers",
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    hovertext=[_hover(row) for row in rows.iter_rows(named=True)],
                    hoverinfo="text+name",
                    showlegend=plot is plots[0],
                    **position,
                    **trace,
                )
            for length in trained:
                grid.add_vline(length, line={"color": style.INK, "dash": "dot", "width": 1.5}, **position)
            lengths = plot["length"].unique().sort().to_list()
            grid.update_xaxes(type="log", tickvals=lengths, ticktext=[f"{n:,}" for n in lengths], **position)
            top = {"range": [-0.03, 1.05]} if plot["upper"][0] == 1 else {}
            grid.update_yaxes(
                title_text=style.label(plot["metric"][0]), showticklabels=True, matches=None, **top, **position
            )
        rows_of_plots = positions[-1]["row"]
        for position in positions[-COLUMNS:]:
            grid.update_xaxes(title_text="context (tokens)", **position)
        space = 0.2 / rows_of_plots
        return grid.update_layout(
            height=90 + 290 * rows_of_plots, margin={"t": 80}, legend={**legend(run.arms), "y": 1 + space}
        )


def _title(row: dict[str, Any]) -> str:
    """Title of a plot."""
    if row["task"] is None:
        return f"{row['suite']}, mean over tasks"
    return row["suite"] if row["task"] == row["suite"] else f"{row['suite']} {row['task']}"


def _hover(row: dict[str, Any]) -> str:
    """A point in words."""
    return f"{plus_minus(row)} at {row['length']:,} tokens ({row['seeds']} seed{'s' * (row['seeds'] > 1)})"
