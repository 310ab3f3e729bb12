"""Figures of hyper-parameter transfer: the coordinate check, and loss over the tuned field at several sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import polars as pl
from plotly.colors import qualitative, sample_colorscale

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, subplots

if TYPE_CHECKING:
    from workbench.ablation.analysis.transfer import Transfer

QUANTITIES = ("hidden change", "mixer change", "feedforward change", "router change", "logits change")


def coordinate_figure(checks: dict[str, pl.DataFrame], over: str) -> go.Figure:
    """Change of activations after the last step over the size, a plot for each quantity, a line for each check.

    Args:
        checks: name, such as that of a parametrisation -> ``CoordinateCheck.table``.
        over: width or depth.
    """
    present = [name for name in QUANTITIES if any((table["quantity"] == name).any() for table in checks.values())]
    grid, positions = subplots(len(present), 5, present)
    for colour, (name, table) in zip(qualitative.D3, checks.items()):
        last = table.filter(pl.col("step") == table["step"].max())
        for quantity, position in zip(present, positions):
            rows = last.filter(pl.col("quantity") == quantity).group_by(over, maintain_order=True)
            means = rows.agg(pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max()).sort(over)
            trace = go.Scatter(
                x=means[over].to_list(),
                y=means["value"].to_list(),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (means["high"] - means["value"]).to_list(),
                    "arrayminus": (means["value"] - means["low"]).to_list(),
                },
                mode="lines+markers",
                line={"color": colour},
                name=style.label(name),
                legendgroup=name,
                showlegend=quantity == present[0],
            )
            grid.add_trace(trace, **position)
    grid.update_xaxes(type="log", title_text=over)
    grid.update_yaxes(type="log")
    grid.update_yaxes(title_text="mean absolute change", col=1)
    return grid.update_layout(height=380)


def transfer_figure(transfer: Transfer) -> go.Figure:
    """Loss over the tuned field, mean over seeds, a plot for each parametrisation, a line for each size; the optimum of
    each size is marked."""
    kinds = transfer.table["parametrisation"].unique(maintain_order=True).to_list()
    if not kinds:
        return figure_of([], "No parametrisation has arms of two sizes.")
    sizes = sorted(set(transfer.table["size"].to_list()))
    shares = [number / max(1, len(sizes) - 1) for number in range(len(sizes))]
    colours = dict(zip(sizes, sample_colorscale("Viridis", [0.9 * share for share in shares])))
    grid, positions = subplots(len(kinds), 4, kinds)
    for kind, position in zip(kinds, positions):
        for row in transfer.table.filter(pl.col("parametrisation") == kind).iter_rows(named=True):
            points = transfer.curves.filter((pl.col("arm") == row["arm"]) & pl.col("loss").is_finite())
            mean = points.group_by("value").agg(pl.col("loss").mean()).sort("value")
            colour = colours[row["size"]]
            line = go.Scatter(
                x=mean["value"].to_list(),
                y=mean["loss"].to_list(),
                mode="lines+markers",
                line={"color": colour},
                name=f"{transfer.over} {row['size']:g}",
                legendgroup=str(row["size"]),
                showlegend=kind == kinds[0],
            )
            grid.add_trace(line, **position)
            grid.add_vline(x=row["optimum"], line={"color": colour, "dash": "dot", "width": 1}, **position)
    grid.update_xaxes(type="log", title_text=style.label(transfer.field))
    grid.update_yaxes(title_text=style.label(f"selection value ({transfer.unit})"), col=1)
    return grid.update_layout(height=420)
