"""Figures of what sequence mixers read and cache: keys by query, selected blocks, cache size against length.

The tables come from :mod:`workbench.evaluation.inspection`, which needs torch; no other dashboard module imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.dashboards import style
from workbench.evaluation.inspection import reads, selected


def reads_figure(tables: Mapping[str, pl.DataFrame]) -> go.Figure:
    """One map a mixer of :func:`reads`: queries downwards, keys to the right, darker is stronger, white is not read."""
    figure = make_subplots(
        1, len(tables), subplot_titles=[style.label(name) for name in tables], horizontal_spacing=0.02
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
        figure.update_yaxes(autorange="reversed", showticklabels=column == 1, col=column)
    figure.update_xaxes(title_text="key")
    figure.update_yaxes(title_text="query", col=1)
    figure.update_layout(template=style.TEMPLATE, height=330, margin={"t": 48})
    return figure


def selected_figure(table: pl.DataFrame) -> go.Figure:
    """Selected blocks over positions, one map a group of heads."""
    groups = sorted(table["group"].unique().to_list())
    figure = make_subplots(1, len(groups), subplot_titles=[f"group {g}" for g in groups], shared_yaxes=True)
    for column, group in enumerate(groups, start=1):
        mine = table.filter(pl.col("group") == group)
        figure.add_trace(
            go.Scatter(
                x=mine["query"].to_list(),
                y=mine["block"].to_list(),
                mode="markers",
                showlegend=False,
                marker={"symbol": "square", "size": 4, "color": style.PALETTE[1]},
                hovertemplate="position %{x} selects block %{y}<extra></extra>",
            ),
            1,
            column,
        )
    figure.update_xaxes(title_text="position")
    figure.update_yaxes(title_text="block", col=1)
    figure.update_layout(template=style.TEMPLATE, height=330, margin={"t": 48})
    return figure


def cache_figure(table: pl.DataFrame) -> go.Figure:
    """Bytes against length, both logarithmic: solid with windows evicted, dotted where windows kept every token."""
    arms = table["arm"].unique(maintain_order=True).to_list()
    figure = go.Figure()
    for arm, look in style.arm_styles(arms).items():
        mine = table.filter(pl.col("arm") == arm)
        for column, dash in (("bytes", "solid"), ("unevicted", "dot")):
            if column == "unevicted" and mine["bytes"].equals(mine["unevicted"], null_equal=True):
                continue
            figure.add_trace(
                go.Scatter(
                    x=mine["length"].to_list(),
                    y=mine[column].to_list(),
                    name=style.label(arm),
                    legendgroup=arm,
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


LENGTH, LAYERS = 64, 3
"""Positions and kinds of layers that :func:`inside` looks at."""


def inside(run: Any) -> dict[str, dict[str, Any]]:
    """What the trained layers of each arm read, and the blocks they select: one run of each arm at its last checkpoint.

    Args:
        run: an ablation's run or a snapshot of it.

    Returns:
        arm -> name of a map -> (figure, table), or a sentence where there is no checkpoint.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in run.arms:
        mine = run.runs().filter(pl.col("arm") == arm).sort(pl.col("stage") != "confirmation", "seed")
        model = next((model for model in map(_trained, mine["folder"]) if model is not None), None)
        if model is None:
            found[arm] = {"none": "No run of this arm has a checkpoint yet."}
            continue
        width = model.config.width
        layers: dict[str, tuple[int, Any]] = {}
        for number, block in enumerate(model.blocks):
            layers.setdefault(type(block.mixer).__name__, (number, block.mixer))
        shown = dict(list(layers.values())[:LAYERS])
        maps = {f"layer {number}": reads(mixer.eval(), width, LENGTH) for number, mixer in shown.items()}
        found[arm] = {
            "reads": (
                reads_figure(maps),
                pl.concat([table.with_columns(layer=pl.lit(name)) for name, table in maps.items()]),
            )
        }
        for number, mixer in shown.items():
            if hasattr(mixer, "selection"):
                table = selected(mixer, width, LENGTH)
                found[arm][f"selected blocks of layer {number}"] = selected_figure(table), table
    return found


def _trained(folder: str) -> Any:
    from pathlib import Path

    from workbench.model import LanguageModel
    from workbench.results import RunFolder
    from workbench.training.checkpoint import latest, load_weights
    from workbench.training.config import RunConfig

    checkpoint, _ = latest(Path(folder) / "checkpoint")
    if checkpoint is None:
        return None
    config = RunConfig.parse(RunFolder(folder).about()["config"])
    model = LanguageModel(config.model, seed=config.seed)
    model.load_state_dict(load_weights(checkpoint))
    return model
