"""A model is data: a layer pattern tiled over the depth, with settings by name and overrides for single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from workbench.config import Config, ConfigError, nearest
from workbench.contract import EmbeddingConfig, Variant, VariantConfig, embeddings, feedforwards, mixers
from workbench.registry import Registry

SCALES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "depth": 4, "vocabulary": 2048},
    "340m": {"width": 1024, "depth": 24, "vocabulary": 32_000},
    "1.3b": {"width": 2048, "depth": 24, "vocabulary": 32_000},
}
"""Named scales. With full attention and SwiGLU: 1.1M, 341.0M and 1,298.7M parameters, embeddings tied."""

PATTERNS = {"mixer": ("mixers", ("pattern",)), "feed-forward": ("feedforwards", ("feedforward", "shortcut"))}
"""What is tiled -> the field with the settings of its names, and the fields with patterns of names."""


@dataclass(frozen=True)
class Layer:
    """One block of the expanded model: resolved configurations of its two variants."""

    mixer: VariantConfig
    feedforward: VariantConfig

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {"mixer": self.mixer.plain(), "feedforward": self.feedforward.plain()}


class Span(NamedTuple):
    """What repeats over the depth: a layer, or a pair of layers with the shortcut beside it."""

    layers: tuple[Layer, ...]
    shortcut: VariantConfig | None = None


def _settings(value: object) -> object:
    """Settings may be given as data, as a variant's name, or as a variant's Config."""
    if isinstance(value, VariantConfig | EmbeddingConfig):
        return value.model_dump(mode="json", exclude_unset=True) | {"kind": value.kind}
    return {"kind": value} if isinstance(value, str) else value


Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]


class MultiTokenConfig(Config):
    """A head for the token after the next one: norm of a block of projection [norm(hidden t); norm(embedding of t + 1)], and the
    model's own output matrix. It serves training alone."""

    weight: Annotated[float, Field(gt=0)] = 0.3
    """Weight of its loss beside the model's."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training after which it begins to be trained."""
    mixer: Settings | None = None
    """Its mixer. Default: that of the last layer."""
    feedforward: Settings = {"kind": "swiglu"}
    """Its feed-forward."""


class ModelConfig(Config):
    """A decoder language model."""

    scale: str = "tiny"
    """Named size that sets width, depth, vocabulary and the variants' defaults: tiny, 340m, 1.3b."""
    width: Annotated[int | None, Field(ge=8, le=2**20)] = None
    """Model width D. Default: the scale's."""
    depth: Annotated[int | None, Field(ge=1, le=10_000)] = None
    """Number of blocks. Default: the scale's."""
    vocabulary: Annotated[int | None, Field(ge=2, le=2**26)] = None
    """Token ids that exist; the tokenizer is trained to this size. Default: the scale's."""
    pattern: str = "full"
    """Mixers by name, tiled over the depth: "gdn gdn gdn full"."""
    mixers: dict[str, Settings] = {}
    """Settings of the names in the pattern. A name is a variant, or any word with a `kind`."""
    at: dict[int, Settings] = {}
    """Single layers (from 0) that depart from the pattern: {0: {kind: full}}."""
    feedforward: str = "swiglu"
    """Feed-forwards by name, tiled over the depth: "swiglu moe"."""
    feedforwards: dict[str, Settings] = {}
    """Settings of the names in the feed-forward pattern."""
    feedforward_at: dict[int, Settings] = {}
    """Single layers whose feed-forward departs from the pattern."""
    shortcut: str = ""
    """Feed-forwards beside those of the layers, by name, tiled over pairs of layers (0 and 1, 2 and 3, …): "moe". Each reads
    what a feed-forward of its pair reads, and joins where the pair ends (ScMoE, arXiv 2509.01322)."""
    shortcut_from: Literal["first", "second"] = "first"
    """Whose input a shortcut reads. From the first it has a whole layer's time to arrive; from the second it is an ordinary
    feed-forward beside the layer's own: the baseline of equal parameters and FLOPs."""
    embedding: Settings = {"kind": "token"}
    """How token ids become vectors: token, or ngram."""
    tied: bool = True
    """Whether the output head shares the embedding's weights."""
    mtp: MultiTokenConfig | None = None
    """Multi-token prediction in training. Default: none."""
    hidden_z: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the hidden z-loss, which keeps the last hidden states from growing (arXiv 2509.01322, eq. 10)."""

    def model_post_init(self, _context: Any) -> None:
        if self.scale not in SCALES:
            raise ConfigError.at("scale", got=self.scale, expected="a named scale", do=nearest(self.scale, SCALES))
        for name, value in SCALES[self.scale].items():
            if getattr(self, name) is None:
                self.__dict__[name] = value  # frozen for users; still under construction here
        for expanded in (
            "layers",
            "shortcuts",
            "mtp_layer",
            "embedding_config",
        ):  # now: a mistake is reported where it was made
            getattr(self, expanded)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The expanded model, one entry a block, every default filled in.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        assert self.depth
        mixer = self._expand(mixers, "pattern", self.depth, "at")
        feedforward = self._expand(feedforwards, "feedforward", self.depth, "feedforward_at")
        return tuple(Layer(m, f) for m, f in zip(mixer, feedforward, strict=True))

    @cached_property
    def shortcuts(self) -> tuple[VariantConfig, ...]:
        """Resolved feed-forwards of the shortcuts, one a pair of layers; empty where there are none.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        assert self.depth
        if not self.shortcut.split():
            if self.shortcut_from != "first":
                raise ConfigError.at(
                    "shortcut_from",
                    got=self.shortcut_from,
                    expected="a `shortcut` that reads from there",
                    do="Give a feed-forward: shortcut: moe.",
                )
            return ()
        if self.depth % 2:
            raise ConfigError.at(
                "shortcut",
                got=f"depth={self.depth}",
                expected="an even number of layers: a shortcut spans two",
                do=f"Make depth {self.depth + 1}, or leave the shortcut out.",
            )
        return tuple(self._expand(feedforwards, "shortcut", self.depth // 2))

    @cached_property
    def mtp_layer(self) -> Layer | None:
        """The block of the multi-token head.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        if self.mtp is None:
            return None
        mixer = self.layers[-1].mixer
        if self.mtp.mixer is not None:
            mixer = self._resolve(mixers, self.mtp.mixer, "mtp.mixer")
        return Layer(mixer, self._resolve(feedforwards, self.mtp.feedforward, "mtp.feedforward"))

    @cached_property
    def embedding_config(self) -> EmbeddingConfig:
        """The resolved configuration of the embedding.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        try:
            return embeddings.parse(self.embedding).resolved(self.width, self.vocabulary)
        except ConfigError as error:
            raise error.under("embedding") from None

    def _expand(self, registry: Registry[Any], tile_field: str, count: int, at_field: str = "") -> list[Any]:
        """Resolved configurations of the ``count`` places that a pattern is tiled over."""
        assert self.depth
        settings_field, tile_fields = PATTERNS[registry.noun]
        tile: list[str] = getattr(self, tile_field).split()
        named: Mapping[str, dict[str, Any]] = getattr(self, settings_field)
        at: Mapping[int, dict[str, Any]] = getattr(self, at_field) if at_field else {}
        if not tile:
            raise ConfigError.at(tile_field, got="nothing", expected="at least one name", do=nearest("", registry))
        if count % len(tile):
            singly = f", or use `{at_field}` for single layers" if at_field else ""
            raise ConfigError.at(
                tile_field,
                got=f"{len(tile)} names for depth={self.depth}",
                expected="a tile that divides the depth" + ("" if at_field else " in pairs"),
                do=f"Make depth a multiple of {len(tile) * self.depth // count}{singly}.",
            )
        for index in at:
            if not 0 <= index < count:
                raise ConfigError.at(f"{at_field}.{index}", got=index, expected=f"a layer from 0 to {count - 1}")
        for name in tile:
            if name not in named and name not in registry:
                raise ConfigError.at(
                    tile_field,
                    got=name,
                    expected=f"a registered {registry.noun}",
                    do=nearest(name, {*registry, *named}),
                )
        used = [name for field in tile_fields for name in getattr(self, field).split()]
        unused = set(named) - set(used) - {str(v.get("kind")) for v in at.values()}
        if unused:
            name = min(unused)
            raise ConfigError.at(
                f"{settings_field}.{name}",
                got="settings for a name that no layer uses",
                expected=f"a name in {tile_field} ({getattr(self, tile_field)!r})",
                do=nearest(name, used),
            )
        by_name: dict[str, Any] = {}
        for name in tile:
            if name not in by_name:
                by_name[name] = self._resolve(
                    registry, {"kind": name, **named.get(name, {})}, f"{settings_field}.{name}"
                )
        expanded = [by_name[tile[i % len(tile)]] for i in range(count)]
        for index, settings in at.items():
            expanded[index] = self._resolve(registry, settings, f"{at_field}.{index}")
        return expanded

    def _resolve(self, registry: Registry[Any], settings: dict[str, Any], path: str) -> Any:
        try:
            if "kind" not in settings:
                raise ConfigError.at(
                    "kind", got="nothing", expected=f"a registered {registry.noun}", do=nearest("", registry)
                )
            config_class = registry[settings["kind"]].Config
            defaults = config_class.defaults_at(self.scale, settings)
            return config_class.parse({**defaults, **settings}).resolved(self.width)
        except ConfigError as error:
            raise error.under(path) from None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The expanded model as what repeats over its depth."""
        if not self.shortcuts:
            return tuple(Span((layer,)) for layer in self.layers)
        return tuple(map(Span, zip(self.layers[::2], self.layers[1::2]), self.shortcuts))

    def with_spans(self, spans: Sequence[Span]) -> ModelConfig:
        """The same model made of other spans: a shrunken one, to be measured."""
        layers = tuple(layer for span in spans for layer in span.layers)
        other = self.model_copy(update={"depth": len(layers)})
        other.__dict__["layers"] = layers
        other.__dict__["shortcuts"] = tuple(span.shortcut for span in spans if span.shortcut is not None)
        return other

    def canonical(self) -> dict[str, Any]:
        """The expanded model: two ways to write the same layers are the same model. What is off is left out, so that a model
        keeps its identity when the workbench learns something new."""
        canonical: dict[str, Any] = {
            "width": self.width,
            "vocabulary": self.vocabulary,
            "tied": self.tied,
            "layers": [layer.plain() for layer in self.layers],
        }
        if self.embedding_config != embeddings["token"].Config():
            canonical["embedding"] = self.embedding_config.plain()
        if self.shortcuts:
            own = [config.plain() for config in self.shortcuts]
            canonical["shortcut"] = {"from": self.shortcut_from, "feedforwards": own}
        if self.mtp is not None and self.mtp_layer is not None:
            canonical["mtp"] = {**self.mtp.plain(), **self.mtp_layer.plain()}
        if self.hidden_z:
            canonical["hidden_z"] = self.hidden_z
        return canonical

    def variants(self) -> list[tuple[type[Variant], VariantConfig]]:
        """Every variant with its resolved configuration: those of every layer in order, then those of the shortcuts."""
        pairs: list[tuple[type[Variant], VariantConfig]] = []
        for layer in self.layers:
            pairs += [
                (mixers[layer.mixer.kind], layer.mixer),
                (feedforwards[layer.feedforward.kind], layer.feedforward),
            ]
        return pairs + [(feedforwards[config.kind], config) for config in self.shortcuts]

    def lacking(self, capability: Literal["causal", "segments", "decode"]) -> list[str]:
        """Kinds of components without this field of their :class:`workbench.contract.Capabilities`, sorted.

        The multi-token head counts except for ``decode``: it serves training alone.
        """
        embedding = self.embedding_config
        components: list[tuple[Any, Any]] = [*self.variants(), (embeddings[embedding.kind], embedding)]
        if self.mtp_layer is not None and capability != "decode":
            mixer, feedforward = self.mtp_layer.mixer, self.mtp_layer.feedforward
            components += [(mixers[mixer.kind], mixer), (feedforwards[feedforward.kind], feedforward)]
        return sorted({config.kind for cls, config in components if not getattr(cls.capabilities, capability)})

    def describe(self) -> str:
        """The expanded layer table as text."""
        lines = [
            f"width {self.width}, {self.depth} layers, vocabulary {self.vocabulary}, "
            f"head {'tied' if self.tied else 'untied'}"
        ]
        if "embedding" in self.canonical():
            lines.append(f"embedding {_told(self.embedding_config)}")
        for index, layer in enumerate(self.layers):
            lines.append(f"{index:3d}  {_told(layer.mixer)}  {_told(layer.feedforward)}")
            if self.shortcuts and index % 2:
                reads = index - 1 if self.shortcut_from == "first" else index
                lines.append(f"     + what {reads}'s feed-forward reads, by {_told(self.shortcuts[index // 2])}")
        if self.mtp is not None and self.mtp_layer is not None:
            told = f"{_told(self.mtp_layer.mixer)}  {_told(self.mtp_layer.feedforward)}"
            lines.append(
                f"token after the next, weight {self.mtp.weight:g} from {self.mtp.start:.0%} of the training:  {told}"
            )
        if self.hidden_z:
            lines.append(f"hidden z-loss, weight {self.hidden_z:g}")
        return "\n".join(lines)


def _told(config: VariantConfig | EmbeddingConfig) -> str:
    fields = ", ".join(f"{k}={v}" for k, v in config.plain().items() if k != "kind")
    return f"{config.kind}({fields})"
