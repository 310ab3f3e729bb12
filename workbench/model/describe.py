"""The expanded model as text."""

from __future__ import annotations

from workbench.config import Config
from workbench.model.config import Layer, ModelConfig


def describe_model(model: ModelConfig) -> str:
    """Sizes, then one line per layer, then what is added to the plain model."""
    head = "tied" if model.tied else "untied"
    lines = [f"width {model.width}, {model.depth} layers, vocabulary {model.vocabulary}, head {head}"]
    if "embedding" in model.canonical():
        lines.append(f"embedding {_component(model.embedding_config)}")
    for index, layer in enumerate(model.layers):
        lines.append(f"{index:3d}  {_layer(layer)}")
        if model.shortcuts and index % 2:
            read_layer = index - 1 + model.shortcut_parity
            lines.append(f"     + {_component(model.shortcuts[index // 2])} of layer {read_layer}'s feed-forward input")
    if model.mtp is not None and model.mtp_layer is not None:
        start = f"weight {model.mtp.weight:g} from {model.mtp.start:.0%} of the training"
        lines.append(f"multi-token head, {start}:  {_layer(model.mtp_layer)}")
    if model.hidden_z:
        lines.append(f"hidden z-loss, weight {model.hidden_z:g}")
    if model.readout:
        lines.append(f"readout {model.readout}: predictions from the state of a document's last token")
    return "\n".join(lines)


def _layer(layer: Layer) -> str:
    return f"{_component(layer.mixer)}  {_component(layer.feedforward)}"


def _component(config: Config) -> str:
    fields = config.plain()
    return f"{fields.pop('kind')}({', '.join(f'{name}={value}' for name, value in fields.items())})"
