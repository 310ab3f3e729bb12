"""Figures of what sequence mixers read and cache: keys by query, selected blocks, cache size against length.

The tables are those of :mod:`workbench.evaluation.inspection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.dashboards import style

COLUMNS = 4
"""Maps side by side."""
MAX_TICKS = 24
"""Up to so many tokens are written along the axes; of more, the pointer shows them."""


def reads_figure(tables: Mapping[str, pl.DataFrame], title: str = "", tokens: Sequence[str] = ()) -> go.Figure:
    """One square map per mixer of ``reads``, or per head of ``attention_weights``: queries downwards, keys to the
    right; darker is stronger, white is not read.

    Args:
        tables: title of a map -> its table.
        title: above all of them.
        tokens: text of the token at every position, shown under the pointer, and along the axes where they are few.
    """
    columns = min(len(tables), COLUMNS)
    rows = -(-len(tables) // COLUMNS)
    titles = [style.label(name) for name in tables]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.06, vertical_spacing=min(0.12, 0.4 / rows)
    )
    written = [style.label(repr(token)[1:-1]) for token in tokens]
    for place, table in enumerate(tables.values()):
        row, column = place // columns + 1, place % columns + 1
        drawn = table.filter(pl.col("strength") > 0).with_columns(pl.col("strength").log10())
        figure.add_trace(
            go.Heatmap(
                x=drawn["key"].to_list(),
                y=drawn["query"].to_list(),
                z=drawn["strength"].to_list(),
                zmin=-4,
                zmax=0,
                colorscale="Blues",
                customdata=[(q, k, written[q], written[k]) for q, k in drawn.select("query", "key").iter_rows()]
                if written
                else None,
                showscale=place == 0,
                hovertemplate=f"{CELL_OF_TOKENS if written else CELL}: 10^%{{z:.1f}}<extra></extra>",
                colorbar={"title": {"text": "share, log<sub>10</sub>"}},
            ),
            row,
            column,
        )
        x = "x" if place == 0 else f"x{place + 1}"
        figure.update_yaxes(autorange="reversed", showticklabels=column == 1, scaleanchor=x, row=row, col=column)
    if 0 < len(written) <= MAX_TICKS:
        named = {"tickvals": list(range(len(written))), "ticktext": written, "tickfont": {"size": 8}}
        figure.update_xaxes(**named, tickangle=-90)
        figure.update_yaxes(**named)
    figure = _maps(figure, title, "key", "query", height=100 + 280 * rows)
    for row in range(1, rows):
        figure.update_xaxes(title_text="", row=row)
    return figure


CELL = "query %{y} reads key %{x}"
CELL_OF_TOKENS = "query %{customdata[0]} “%{customdata[2]}” reads key %{customdata[1]} “%{customdata[3]}”"
"""Hover text of a cell; of text, with positions and tokens, since the axes may have either."""


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
