"""Layer diagnostics as heat maps."""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import message, subplots
from workbench.dashboards.panel import PanelConfig, panels
from workbench.dashboards.panels.diagnostics import DiagnosticPanel
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.diagnostics import diagnostic_title


@panels.register
class DiagnosticMap(DiagnosticPanel):
    """How do the layers differ?"""

    class Config(PanelConfig):
        kind: Literal["layers"] = "layers"
        diagnostic: str = Field("", title="diagnostic")
        """Name of the diagnostic; by default the first."""

    title = "layers"
    order = 81
    note = "Mean over an arm's runs. Of a vector, such as the load of every expert, the values at the last step."

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """One heat map per arm: layers against training steps, or against the positions in a vector."""
        across = "index" if table["index"].count() else "step"
        if across == "index":
            table = table.filter(pl.col("step") == pl.col("step").max().over("arm"))
        arms = [arm for arm in run.arms if arm in table["arm"]]
        if not arms:
            return message("No run of this ablation has logged diagnostics of its layers.")
        grid, positions = subplots(len(arms), titles=arms)
        grid.update_layout(height=100 + 240 * positions[-1]["row"], margin={"t": 40})
        for arm, position in zip(arms, positions):
            rows = table.filter(pl.col("arm") == arm).sort(across)
            matrix = rows.pivot(across, index="layer", values="value").sort("layer")
            grid.add_heatmap(
                x=matrix.columns[1:],
                y=[str(layer) for layer in matrix["layer"]],
                z=matrix.drop("layer").to_numpy().tolist(),
                coloraxis="coloraxis",
                name=style.label(arm),
                hovertemplate=f"%{{z:.4g}} in layer %{{y}} at {across} %{{x}}",
                **position,
            )
            title = "training step" if across == "step" else "position in the vector (expert)"
            grid.update_xaxes(title_text=title, type="category", nticks=8, **position)
        grid.update_yaxes(type="category")
        grid.update_yaxes(title_text="layer", col=1)
        bar = {"title": {"text": diagnostic_title(table["name"][0]).replace(" (", "<br>(")}}
        return grid.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": bar})
