"""Recall along one label of the examples."""

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

DODGE = 0.5
"""Share of the space of a place over which its arms are spread."""


@panels.register
class RecallCurves(FigurePanel):
    """How many answers are right, by one or two labels of the examples?"""

    class Config(PanelConfig):
        kind: Literal["recall_curves"] = "recall_curves"
        labels: tuple[str, str] | tuple[str] | None = None
        """Label along the horizontal axis, and that of the plots, if any; by default those that the task names."""

    settings: Config
    title = "recall"
    tab = "Mechanisms"
    order = 82
    report = {"Recall": {}}
    note = "Right answers among the report examples: the mean over confirmation runs; bars span the runs."

    def applies(self, run: RunView) -> bool:
        return "recall_curves" in run.views

    def _labels(self, run: Snapshot) -> tuple[str, ...]:
        return tuple(self.settings.labels or run.views.get("recall_curves", ()) or ("pairs", "length"))

    def table(self, run: Snapshot) -> pl.DataFrame:
        return recall_table(run, *self._labels(run))

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        x, *further = self._labels(run)
        if not len(table):
            return no_examples(x, "accuracy")
        plots = {"": table}
        if further and table.select(*further).n_unique() == table.select(x, *further).n_unique() > 1:
            return self._dodged(run, table, x, further[0])
        if further:
            groups = table.sort(further[0]).partition_by(further[0], as_dict=True, maintain_order=True)
            plots = {f"{further[0]} {value:g}": examples for (value,), examples in groups.items()}
        grid = accuracy_row(run, list(plots))
        for column, examples in enumerate(plots.values(), start=1):
            for arm, look in style.arm_styles(run).items():
                rows = examples.filter(pl.col("arm") == arm)
                grid.add_scatter(
                    x=rows[x].to_list(),
                    y=rows["accuracy"].to_list(),
                    mode="lines+markers",
                    row=1,
                    col=column,
                    showlegend=column == 1,
                    customdata=rows["runs"].to_list(),
                    error_y=error_bars(rows, "accuracy", thickness=1, width=3),
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    hovertemplate="%{y:.1%} at %{x:g} (%{customdata} runs)",
                    **arm_trace(run, arm),
                )
            ticks = examples[x].unique().sort().to_list()
            grid.update_xaxes(title_text=style.label(x), type="log", tickvals=ticks, row=1, col=column)
        return grid

    def _dodged(self, run: Snapshot, table: pl.DataFrame, x: str, further: str) -> go.Figure:
        """One plot for examples in which one label decides the other: the arms of a place side by side."""
        places = table.select(x, further).unique().sort(x, further).rows()
        grid, styles = accuracy_row(run, [""]), style.arm_styles(run)
        for i, (arm, look) in enumerate(styles.items()):
            rows = table.filter(pl.col("arm") == arm).sort(x, further)
            aside = DODGE * ((i + 0.5) / len(styles) - 0.5)
            grid.add_scatter(
                x=[places.index(place) + aside for place in rows.select(x, further).rows()],
                y=rows["accuracy"].to_list(),
                mode="markers",
                row=1,
                col=1,
                customdata=rows["runs"].to_list(),
                error_y=error_bars(rows, "accuracy", thickness=1, width=3),
                marker={"color": look.colour, "size": 9, "symbol": look.symbol},
                hovertemplate="%{y:.1%} (%{customdata} runs)",
                **arm_trace(run, arm),
            )
        texts = [f"{value:g}<br>{style.label(further)} {other:g}" for value, other in places]
        grid.update_xaxes(title_text=style.label(x), tickvals=list(range(len(places))), ticktext=texts, row=1, col=1)
        return grid.update_xaxes(range=[-0.6, len(places) - 0.4])
