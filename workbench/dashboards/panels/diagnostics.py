"""Layer diagnostics over training."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, band, figure_of, legend, message
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.diagnostics import diagnostic_names, diagnostic_table, diagnostic_title
from workbench.dashboards.view import RunView


class DiagnosticPanel(FigurePanel):
    """A panel of one diagnostic of the layers."""

    tab = "Mechanisms"

    def applies(self, run: RunView) -> bool:
        return super().applies(run) and not run.archived  # which keeps no diagnostics

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"diagnostic": diagnostic_names(run)}

    def table(self, run: Snapshot) -> pl.DataFrame:
        names = diagnostic_names(run)
        wanted = self.settings.diagnostic
        name = wanted if wanted in names or not names else names[0]
        return diagnostic_table(run).filter(pl.col("name") == name)


@panels.register
class DiagnosticCurves(DiagnosticPanel):
    """What happens inside the layers while they train?"""

    class Config(PanelConfig):
        kind: Literal["diagnostics"] = "diagnostics"
        diagnostic: str = Field("", title="diagnostic")
        """Name of the diagnostic; by default the first."""

    title = "over training"
    order = 80
    note = (
        "Mean over layers; the band spans the layers. Of a vector, such as the load of every expert, the largest value."
    )

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        if not len(table):
            return message("No run of this ablation has logged diagnostics of its layers.")
        styles, title = style.arm_styles(run), diagnostic_title(table["name"][0])
        is_vector = table["index"].count() > 0
        table = table.group_by("arm", "step", "layer").agg(pl.col("value").max())
        bands, lines = [], []
        for arm, look in styles.items():
            rows = (
                table.filter(pl.col("arm") == arm)
                .group_by("step")
                .agg(mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max())
                .sort("step")
            )
            steps, trace = rows["step"].to_list(), arm_trace(run, arm)
            bands.append(band(zip(steps, rows["low"], rows["high"]), look, len(styles), **trace))
            lines.append(
                go.Scatter(
                    x=steps,
                    y=rows["mean"].to_list(),
                    mode="lines+markers",
                    marker={"size": 4},
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    showlegend=bool(steps),
                    hovertemplate="%{y:.4g} at step %{x}",
                    **trace,
                )
            )
        figure = figure_of([*bands, *lines])
        figure.update_xaxes(title_text="training step")
        figure.update_yaxes(title_text=f"largest {title}" if is_vector else title)
        return figure.update_layout(legend=legend(run.arms))
