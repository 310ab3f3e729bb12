"""Figures of what sequence mixers read and cache: keys by query, selected blocks, cache size against length.

The tables are those of :mod:`workbench.evaluation.inspection`.
"""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.dashboards import style


def reads_figure(tables: Mapping[str, pl.DataFrame], title: str = "") -> go.Figure:
    """One square map per mixer of ``reads``: queries downwards, keys to the right; darker is stronger, white is not
    read.

    Args:
        tables: title of a map -> its table.
        title: above all of them.
    """
    figure = make_subplots(
        1, len(tables), subplot_titles=[style.label(name) for name in tables], horizontal_spacing=0.06
    )
    for column, table in enumerate(tables.values(), start=1):
        drawn = table.filter(pl.col("strength") > 0).with_columns(pl.col("strength").log10())
        figure.add_trace(
            go.Heatmap(
                x=drawn["key"].to_list(),
                y=drawn["query"].to_list(),
                z=drawn["strength"].to_list(),
                zmin=-4,
                zmax=0,
                colorscale="Blues",
                showscale=column == len(tables),
                hovertemplate="query %{y} reads key %{x}: 10^%{z:.1f}<extra></extra>",
                colorbar={"title": {"text": "share, log<sub>10</sub>"}},
            ),
            1,
            column,
        )
        x = "x" if column == 1 else f"x{column}"
        figure.update_yaxes(autorange="reversed", showticklabels=column == 1, scaleanchor=x, col=column)
    return _maps(figure, title, "key", "query", height=380)


def selected_figure(table: pl.DataFrame, title: str = "") -> go.Figure:
    """Selected blocks over positions, one plot per group of heads: the table of ``selected``."""
    groups = sorted(table["group"].unique().to_list())
    figure = make_subplots(1, len(groups), subplot_titles=[f"group {g} of heads" for g in groups], shared_yaxes=True)
    for column, group in enumerate(groups, start=1):
        rows = table.filter(pl.col("group") == group)
        figure.add_trace(
            go.Scatter(
                x=rows["query"].to_list(),
                y=rows["block"].to_list(),
                mode="markers",
                showlegend=False,
                marker={"symbol": "square", "size": 4, "color": style.PALETTE[1]},
                hovertemplate="position %{x} selects block %{y}<extra></extra>",
            ),
            1,
            column,
        )
    return _maps(figure, title, "position", "block", height=330)


def _maps(figure: go.Figure, title: str, x: str, y: str, height: int) -> go.Figure:
    """Plots side by side, without a grid, under one title."""
    figure.update_xaxes(title_text=x, showgrid=False, zeroline=False, constrain="domain")
    figure.update_yaxes(showgrid=False, zeroline=False, constrain="domain")
    figure.update_yaxes(title_text=y, col=1)
    figure.update_layout(template=style.TEMPLATE, height=height, margin={"t": 84 if title else 48})
    if title:
        figure.update_layout(title={"text": style.label(title), "x": 0.01, "font": {"size": 15}})
    return figure


def cache_figure(table: pl.DataFrame) -> go.Figure:
    """Cache size against length (the table of ``cache_table``), both logarithmic. Solid: windows evict tokens that they
    no longer read. Dotted: windows keep every token."""
    arms = table["arm"].unique(maintain_order=True).to_list()
    figure = go.Figure()
    for arm, look in style.styles_of(arms).items():
        rows = table.filter(pl.col("arm") == arm)
        for column, dash in (("bytes", "solid"), ("unevicted", "dot")):
            if column == "unevicted" and rows["bytes"].equals(rows["unevicted"], null_equal=True):
                continue
            figure.add_trace(
                go.Scatter(
                    x=rows["length"].to_list(),
                    y=rows[column].to_list(),
                    name=style.label(arm),
                    legendgroup=f"arm {arms.index(arm)}",
                    showlegend=column == "bytes",
                    line={"color": look.colour, "dash": dash},
                    mode="lines",
                    hovertemplate=f"{style.label(arm)}, %{{x}} tokens: %{{y:.3s}}B<extra></extra>",
                )
            )
    figure.update_xaxes(type="log", title_text="tokens seen")
    figure.update_yaxes(type="log", title_text="cache of one sequence (bytes)")
    figure.update_layout(template=style.TEMPLATE, height=420)
    return figure
