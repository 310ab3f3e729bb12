"""What trained layers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import polars as pl

from workbench.dashboards.figures.attention import reads_figure, selected_figure
from workbench.dashboards.panel import Block, Figure, Panel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import note
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

    title = "attention"
    tab = "Mechanisms"
    order = 85
    button = "Look inside"

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._blocks: dict[str, list[Block]] = {}

    def prepare(self, run: Snapshot) -> None:
        """Load one run of each arm at its last checkpoint, and compute what its layers read."""
        self._blocks = {arm: _inspect(run, arm) for arm in run.arms}

    def blocks(self, run: Snapshot) -> list[Block]:
        if not self._blocks:
            hint = (
                "Press “Look inside” to load one run of each arm at its last checkpoint, and to compute which inputs "
                "each position of its layers reads."
            )
            return [Text("attention", note(hint))]
        return [block for arm in run.arms for block in self._blocks.get(arm, [])]


def _inspect(run: Snapshot, arm: str) -> list[Block]:
    from workbench.evaluation.inspection import reads, selected

    runs = run.unfiltered.runs().filter(pl.col("arm") == arm).sort(pl.col("stage") != Stage.CONFIRMATION, "seed")
    model = next((model for model in map(_load, runs["folder"]) if model is not None), None)
    if model is None:
        missing = "the archive holds no checkpoints" if run.archived else "no run of this arm has a checkpoint yet"
        return [Text(f"attention-{arm}", note(f"{arm}: {missing}."))]
    layers: dict[str, tuple[int, Any]] = {}
    for number, block in enumerate(model.blocks):
        layers.setdefault(type(block.mixer).__name__, (number, block.mixer))
    mixers = dict(list(layers.values())[:MAX_LAYERS])
    width = model.config.width
    maps = {f"layer {number}": reads(mixer.eval(), width, LENGTH) for number, mixer in mixers.items()}
    table = pl.concat([table.with_columns(layer=pl.lit(name)) for name, table in maps.items()])
    blocks: list[Block] = [Figure(f"attention-{arm}-reads", reads_figure(maps), table, f"{arm}: inputs that are read")]
    for number, mixer in mixers.items():
        if hasattr(mixer, "selection"):
            table = selected(mixer, width, LENGTH)
            name = f"attention-{arm}-blocks-{number}"
            blocks.append(Figure(name, selected_figure(table), table, f"{arm}: blocks selected by layer {number}"))
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
