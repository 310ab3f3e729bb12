"""What layers told while they trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import band, figure_of, legend, panels, sentence
from workbench.dashboards.tables import diagnostic_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


UNITS = {
    "half_life": "tokens",
    "selected_distance": "tokens",
    "norm": "length",
    "violation": "share of an even load",
    "entropy": "nats",
    "gate": "share",
    "experts": "experts per token",
}
"""Part of a diagnostic's name -> its unit; others are plain numbers."""


def _diagnostic_title(name: str) -> str:
    unit = next((unit for part, unit in UNITS.items() if part in name), "value")
    return f"{style.label(name.replace('_', ' '))} ({unit})"


def diagnostic_curves(run: RunView, name: str) -> go.Figure:
    """One diagnostic over training: the mean over layers as a line, smallest to largest layer as a band. Of a vector (the
    load of every expert) its largest number is drawn."""
    table, styles = diagnostic_table(run).filter(pl.col("name") == name), style.looks(run)
    vector = table["index"].count() > 0
    table = table.group_by("arm", "step", "layer").agg(pl.col("value").max())
    bands, lines = [], []
    for arm, look in styles.items():
        mine = (
            table.filter(pl.col("arm") == arm)
            .group_by("step")
            .agg(mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max())
            .sort("step")
        )
        steps = mine["step"].to_list()
        bands.append(band(zip(steps, mine["low"], mine["high"]), look, len(styles), legendgroup=f"arm {arm}"))
        lines.append(
            go.Scatter(
                x=steps,
                y=mine["mean"].to_list(),
                name=style.label(arm),
                mode="lines+markers",
                marker={"size": 4},
                line={"color": look.colour, "dash": look.dash, "width": 2},
                showlegend=bool(steps),
                legendgroup=f"arm {arm}",
                hovertemplate="%{y:.4g} at step %{x}",
            )
        )
    figure = figure_of([*bands, *lines], "" if len(table) else "No run has stored this.")
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text=f"largest {_diagnostic_title(name)}" if vector else _diagnostic_title(name))
    return figure.update_layout(legend=legend(run.arms))


def diagnostic_map(run: RunView, name: str) -> go.Figure:
    """One diagnostic as a heat map over layers and training steps, one an arm that has it; of a vector (the load of every
    expert) over layers and places in it, at the last step."""
    table = diagnostic_table(run).filter(pl.col("name") == name)
    across = "index" if table["index"].count() else "step"
    if across == "index":
        table = table.filter(pl.col("step") == pl.col("step").max().over("arm"))
    arms = [arm for arm in run.arms if arm in table["arm"]]
    if not arms:
        return sentence("No run has stored this.")
    grid, places = panels(len(arms), titles=arms)
    grid.update_layout(height=100 + 240 * places[-1]["row"], margin={"t": 40})
    for arm, at in zip(arms, places):
        mine = table.filter(pl.col("arm") == arm)
        wide = mine.sort(across).pivot(across, index="layer", values="value").sort("layer")
        grid.add_heatmap(
            x=wide.columns[1:],
            y=[str(layer) for layer in wide["layer"]],
            z=wide.drop("layer").to_numpy().tolist(),
            coloraxis="coloraxis",
            name=style.label(arm),
            hovertemplate=f"%{{z:.4g}} in layer %{{y}} at {across} %{{x}}",
            **at,
        )
        title = "training step" if across == "step" else "place in the vector (expert)"
        grid.update_xaxes(title_text=title, type="category", nticks=8, **at)
    grid.update_yaxes(type="category")
    grid.update_yaxes(title_text="layer", col=1)
    bar = {"title": {"text": _diagnostic_title(name).replace(" (", "<br>(")}}
    return grid.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": bar})
