"""What trained layers read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from workbench.config import ConfigError
from workbench.dashboards.figures.attention import reads_figure, selected_figure
from workbench.dashboards.panel import Block, Figure, Panel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import note
from workbench.dashboards.view import RunView
from workbench.status import Stage

LENGTH = 64
"""Positions that are shown, at most."""
ROWS = 16
"""Training rows from which the one with the longest first document is shown."""
MAX_HEADS = 16
"""Heads of a layer that are shown."""
MAX_LAYERS = 3
"""Kinds of layers that are shown, one layer of each."""


@panels.register
class Attention(Panel):
    """Which inputs does each position of a trained layer read, and which blocks does it select?"""

    class Config(PanelConfig):
        kind: Literal["attention"] = "attention"
        layer: str = Field("", title="layer")
        """Number of the layer; by default one of each kind, up to three."""
        heads: Literal["together", "each"] = "together"
        """What the whole layer reads, or the attention weights of each head."""

    settings: Config
    labels = {"": "one of each kind", "together": "heads together", "each": "each head"}
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
        self._blocks = {arm: _inspect(run, arm, self.settings.layer, self.settings.heads) for arm in run.arms}

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


def _inspect(run: Snapshot, arm: str, layer: str, heads: str) -> list[Block]:
    from workbench.evaluation.inspection import attention_weights, layer_input, reads, selected

    runs = run.unfiltered.runs().filter(pl.col("arm") == arm).sort(pl.col("stage") != Stage.CONFIRMATION, "seed")
    loaded = ((folder, _load(folder)) for folder in runs["folder"])
    folder, model = next((found for found in loaded if found[1] is not None), ("", None))
    if model is None:
        return [Text(f"attention-{arm}", note(f"{arm}: no run of this arm has a checkpoint yet."))]
    layers: dict[str, int] = {}
    for number, block in enumerate(model.blocks):
        if layer in ("", str(number)):
            layers.setdefault(type(block.mixer).__name__, number)
    numbers = list(layers.values())[:MAX_LAYERS]
    if not numbers:
        return [Text(f"attention-{arm}", note(f"{arm}: this model has no layer {layer}."))]
    tokens_T, words = _document(Path(folder))
    text = "a training document" if words else "random tokens, since the data are gone"
    names = {number: f"layer {number}: {model.config.layers[number].mixer.kind}" for number in numbers}
    mixers = {number: model.blocks[number].mixer.eval() for number in numbers}
    inputs = {number: layer_input(model, tokens_T, number) for number in numbers}
    blocks: list[Block] = []
    if heads == "together":
        maps = {names[n]: reads(mixer, 0, 0, inputs=inputs[n]) for n, mixer in mixers.items()}
        figure = reads_figure(maps, f"{arm}: inputs that each position reads", words)
        about = f"Norms of gradients of the layer's output by its input, for {text}; heads together."
        blocks.append(Figure(f"attention-{arm}-reads", figure, _joined(maps), about))
    for number, mixer in mixers.items() if heads == "each" else ():
        maps = {
            f"head {head}": table for head, table in enumerate(attention_weights(mixer, inputs[number])[:MAX_HEADS])
        }
        name = f"attention-{arm}-heads-{number}"
        if not maps:
            missing = f"{arm}, {names[number]}: it has no attention weights of single heads."
            blocks.append(Text(name, note(missing)))
            continue
        figure = reads_figure(maps, f"{arm}, {names[number]}: attention weights", words)
        about = f"For {text}; before soft-caps, sinks and the selection of blocks."
        blocks.append(Figure(name, figure, _joined(maps), about))
    for number, mixer in mixers.items():
        if hasattr(mixer, "selection"):
            table = selected(mixer, model.config.width, LENGTH)
            drawn = selected_figure(table, f"{arm}: blocks that layer {number} selects")
            blocks.append(Figure(f"attention-{arm}-blocks-{number}", drawn, table, "For one random input."))
    return blocks


def _joined(maps: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([table.with_columns(map=pl.lit(name)) for name, table in maps.items()])


def _document(folder: Path) -> tuple[Any, list[str]]:
    """Token ids (T,) of the beginning of a document that the run trains on, and the text of each; random ids without
    text where the data are gone."""
    import numpy as np
    import torch

    from workbench.results import RunFolder
    from workbench.training.config import RunConfig
    from workbench.training.export import open_data

    run = RunFolder(folder)
    config = RunConfig.parse(run.record().config)
    try:
        source = open_data(run)
    except ConfigError:
        return torch.randint(config.model.vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0)), []
    stream = config.stream(source)

    def first_document(number: int) -> Any:
        tokens, _, segments, *_ = stream.row(number)
        return tokens[: int(np.argmax(np.append(segments, -2) != segments[0]))][:LENGTH]

    tokens = max(map(first_document, range(ROWS)), key=len)
    decode = str if source.tokenizer is None else lambda token: source.tokenizer.decode([token])
    return torch.as_tensor(np.asarray(tokens, np.int64)), [decode(int(token)) for token in tokens]


def _load(folder: str) -> Any:
    """The model of a run at its last checkpoint, with the weights that are measured; None where there is none."""
    from workbench.results import RunFolder
    from workbench.training.checkpoint import latest
    from workbench.training.config import RunConfig
    from workbench.training.export import trained_model

    checkpoint, _ = latest(Path(folder) / "checkpoint")
    return (
        None if checkpoint is None else trained_model(RunConfig.parse(RunFolder(folder).record().config), checkpoint)[0]
    )
