"""The expanded model as text, and as a table in a notebook."""

from __future__ import annotations

from itertools import groupby

from workbench import notebook
from workbench.config import Config, ConfigError
from workbench.model.config import Layer, ModelConfig

__all__ = ["Description", "describe_model"]


class Description(str):
    """A text about a model; a notebook shows its layers as a table."""

    __slots__ = ("head", "layers", "rest")

    head: str
    """The sizes."""
    layers: list[tuple[str, str, str]]
    """Which layers, mixer, feed-forward."""
    rest: list[str]
    """What is added to the plain model."""

    def __new__(cls, head: str, layers: list[tuple[str, str, str]], rest: list[str]) -> Description:
        width = max(len(which) for which, _, _ in layers)
        rows = [f"{which:>{width}}  {mixer}  {feedforward}".rstrip() for which, mixer, feedforward in layers]
        text = super().__new__(cls, "\n".join([head, *rows, *rest]))
        text.head, text.layers, text.rest = head, layers, rest
        return text

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rest = "".join(notebook.paragraph(line) for line in self.rest)
        note = f"{self.head}. Settings that are not named have their defaults."
        return notebook.table(["layer", "mixer", "feed-forward"], self.layers, note=note) + rest


def describe_model(model: ModelConfig) -> Description:
    """Sizes; a line for each run of equal layers, with the settings that differ from the defaults of their variants;
    what is added to the plain model.

    ``0–2 ×3`` is layers 0 to 2, three of them.
    """
    head = f"width {model.width}, {model.depth} layers, vocabulary {model.vocabulary}, head "
    head += "tied" if model.tied else "untied"
    rest = []
    if "embedding" in model.canonical():
        rest.append(f"embedding {_component(model.embedding_config, model)}")
    if "residual" in model.canonical():
        rest.append(f"residual {_component(model.residual_config, model)}")
    if model.mtp is not None and model.mtp_layer is not None:
        start = f"weight {model.mtp.weight:g} from {model.mtp.start:.0%} of the training"
        rest.append(f"multi-token head, {start}:  {'  '.join(_layer(model.mtp_layer, model))}")
    if model.hidden_z:
        rest.append(f"hidden z-loss, weight {model.hidden_z:g}")
    if model.readout:
        rest.append(f"readout {model.readout}: predictions from the state of a document's last token")
    return Description(head, _layers(model), rest)


def _layers(model: ModelConfig) -> list[tuple[str, str, str]]:
    """Runs of equal layers; with shortcuts, every pair of layers has a line of its own."""
    texts = [_layer(layer, model) for layer in model.layers]
    rows: list[tuple[str, str, str]] = []
    for index, (mixer, feedforward) in enumerate(texts if model.shortcuts else ()):
        rows.append((str(index), mixer, feedforward))
        if index % 2:
            shortcut = _component(model.shortcuts[index // 2], model)
            rows.append(("+", f"{shortcut} of layer {index - 1 + model.shortcut_parity}'s feed-forward input", ""))
    if rows:
        return rows
    for (mixer, feedforward), numbers in groupby(range(len(texts)), key=texts.__getitem__):
        first, *more = numbers
        which = f"{first}–{more[-1]} ×{len(more) + 1}" if more else str(first)
        rows.append((which, mixer, feedforward))
    return rows


def _layer(layer: Layer, model: ModelConfig) -> tuple[str, str]:
    return _component(layer.mixer, model), _component(layer.feedforward, model)


def _component(config: Config, model: ModelConfig) -> str:
    """A variant with the settings that differ from those it has in this model by default."""
    fields, usual = config.plain(), _defaults(config, model)
    kind = fields.pop("kind")
    changed = {name: value for name, value in fields.items() if name not in usual or usual[name] != value}
    return f"{kind}({', '.join(f'{name}={value}' for name, value in changed.items())})" if changed else kind


def _defaults(config: Config, model: ModelConfig) -> dict[str, object]:
    """The settings of the same variant where none is given; none where it cannot be built without."""
    settings = {"kind": config.plain()["kind"]}
    try:
        cls = type(config)
        given = cls.parse({**cls.defaults_at(model.scale, settings), **settings})  # type: ignore[attr-defined]
        sizes = (model.width or 0, model.vocabulary or 0) if config is model.embedding_config else (model.width,)
        return dict(given.resolved(*sizes).plain())  # type: ignore[attr-defined]
    except ConfigError:
        return {}
