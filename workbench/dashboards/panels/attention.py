"""What trained layers read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from workbench.dashboards.figures.attention import reads_figure, selected_figure
from workbench.dashboards.panel import Block, Figure, Panel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import note
from workbench.dashboards.view import RunView
from workbench.status import Stage

LENGTH = 64
"""Positions that are shown."""
MAX_LAYERS = 3
"""Kinds of layers that are shown, one layer of each."""


@panels.register
class Attention(Panel):
    """Which inputs does each position of a trained layer read, and which blocks does it select?"""

    class Config(PanelConfig):
        kind: Literal["attention"] = "attention"
        layer: str = Field("", title="layer")
        """Number of the layer; by default one of each kind, up to three."""

    settings: Config
    labels = {"": "one of each kind"}
    title = "attention"
    tab = "Mechanisms"
    order = 85
    button = "Look inside"

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._blocks: dict[str, list[Block]] = {}

    def applies(self, run: RunView) -> bool:
        return bool(run.arms) and not run.archived  # which keeps no checkpoints

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        depth = max((_depth(folder) for folder in _one_per_arm(run)), default=0)
        return {"layer": ["", *map(str, range(depth))]}

    def prepare(self, run: Snapshot) -> None:
        """Load one run of each arm at its last checkpoint, and compute what its layers read."""
        self._blocks = {arm: _inspect(run, arm, self.settings.layer) for arm in run.arms}

    def blocks(self, run: Snapshot) -> list[Block]:
        if not self._blocks:
            hint = (
                "Choose a layer and press “Look inside” to load one run of each arm at its last checkpoint, and to "
                "compute which inputs each position of the layer reads."
            )
            return [Text("attention", note(hint))]
        return [block for arm in run.arms for block in self._blocks.get(arm, [])]


@cache
def _depth(folder: str) -> int:
    """Layers of the model of a run; 0 where there is no run."""
    from workbench.results import RunFolder

    files = RunFolder(folder)
    depth = files.record().config.get("model", {}).get("depth") if files.exists() else 0
    return depth if isinstance(depth, int) else 0


def _one_per_arm(run: Snapshot) -> list[str]:
    """The folder of the first run of every arm."""
    return run.unfiltered.runs().unique("arm", keep="first")["folder"].to_list()


def _inspect(run: Snapshot, arm: str, layer: str) -> list[Block]:
    from workbench.evaluation.inspection import INPUTS, reads, selected

    runs = run.unfiltered.runs().filter(pl.col("arm") == arm).sort(pl.col("stage") != Stage.CONFIRMATION, "seed")
    model = next((model for model in map(_load, runs["folder"]) if model is not None), None)
    if model is None:
        return [Text(f"attention-{arm}", note(f"{arm}: no run of this arm has a checkpoint yet."))]
    layers: dict[str, tuple[int, Any]] = {}
    for number, block in enumerate(model.blocks):
        if layer in ("", str(number)):
            layers.setdefault(type(block.mixer).__name__, (number, block.mixer))
    mixers = dict(list(layers.values())[:MAX_LAYERS])
    if not mixers:
        return [Text(f"attention-{arm}", note(f"{arm}: this model has no layer {layer}."))]
    width = model.config.width
    kinds = {number: model.config.layers[number].mixer.kind for number in mixers}
    maps = {f"layer {n}: {kinds[n]}": reads(mixer.eval(), width, LENGTH) for n, mixer in mixers.items()}
    table = pl.concat([table.with_columns(layer=pl.lit(name)) for name, table in maps.items()])
    figure = reads_figure(maps, f"{arm}: inputs that each position reads")
    about = f"Norms of gradients of the output by the input, averaged over {INPUTS} random inputs; heads together."
    blocks: list[Block] = [Figure(f"attention-{arm}-reads", figure, table, about)]
    for number, mixer in mixers.items():
        if hasattr(mixer, "selection"):
            table = selected(mixer, width, LENGTH)
            drawn = selected_figure(table, f"{arm}: blocks that layer {number} selects")
            blocks.append(Figure(f"attention-{arm}-blocks-{number}", drawn, table, "For one random input."))
    return blocks


def _load(folder: str) -> Any:
    """The model of a run at its last checkpoint; None where there is none."""
    from workbench.model import LanguageModel
    from workbench.results import RunFolder
    from workbench.training.checkpoint import latest, load_weights
    from workbench.training.config import RunConfig

    checkpoint, _ = latest(Path(folder) / "checkpoint")
    if checkpoint is None:
        return None
    config = RunConfig.parse(RunFolder(folder).record().config)
    model = LanguageModel(config.model, seed=config.seed_of("init"))
    model.load_state_dict(load_weights(checkpoint))
    return model
