"""Recall over two labels of the examples."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import subplots
from workbench.dashboards.figures.recall import no_examples
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.recall import recall_table
from workbench.dashboards.view import RunView


@panels.register
class RecallMap(FigurePanel):
    """Where are the answers right?"""

    class Config(PanelConfig):
        kind: Literal["recall_map"] = "recall_map"
        labels: tuple[str, str] | None = None
        """Labels to the right and downwards (such as a depth); by default those that the task names."""

    settings: Config
    title = "recall map"
    tab = "Mechanisms"
    order = 83
    report = {"Recall map": {}}
    note = "Right answers among the report examples, the mean over confirmation runs."

    def applies(self, run: RunView) -> bool:
        return "recall_map" in run.views

    def _labels(self, run: Snapshot) -> tuple[str, str]:
        x, y = self.settings.labels or run.views.get("recall_map", ()) or ("length", "depth")
        return x, y

    def table(self, run: Snapshot) -> pl.DataFrame:
        return recall_table(run, *self._labels(run))

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """One heat map per arm."""
        x, y = self._labels(run)
        if not len(table):
            return no_examples(x, y)
        arms = [arm for arm in run.arms if arm in table["arm"]]
        grid, positions = subplots(len(arms), titles=arms)
        grid.update_layout(height=100 + 280 * positions[-1]["row"], margin={"t": 40})
        columns, rows = ([f"{value:g}" for value in table[name].unique().sort()] for name in (x, y))
        for arm, position in zip(arms, positions):
            accuracy = {
                (f"{row[x]:g}", f"{row[y]:g}"): row["accuracy"]
                for row in table.filter(pl.col("arm") == arm).iter_rows(named=True)
            }
            grid.add_heatmap(
                x=columns,
                y=rows,
                z=[[accuracy.get((column, row)) for column in columns] for row in rows],
                zmin=0,
                zmax=1,
                name=style.label(arm),
                coloraxis="coloraxis",
                texttemplate="%{z:.0%}",
                xgap=1,
                ygap=1,
                hovertemplate="%{z:.1%} at " + f"{style.label(x)} %{{x}}, {style.label(y)} %{{y}}",
                **position,
            )
            grid.update_xaxes(title_text=style.label(x), type="category", **position)
        grid.update_yaxes(type="category", autorange="reversed")
        grid.update_yaxes(title_text=style.label(y), col=1)
        bar = {"title": {"text": "right<br>answers"}, "tickformat": ".0%"}
        return grid.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})
