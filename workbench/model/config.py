"""A model is data: a layer pattern tiled over the depth, with settings by name and overrides for single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, field_validator

from workbench.config import Config, ConfigError, deep_merge, nearest, require
from workbench.contract import (
    Component,
    ComponentConfig,
    EmbeddingConfig,
    ResidualConfig,
    Taken,
    Variant,
    VariantConfig,
    embeddings,
    feedforwards,
    mixers,
    residuals,
)
from workbench.model.lora import LoraConfig
from workbench.model.pattern import check_names, tile
from workbench.parametrisations import Parametrisation, ParametrisationSetting, parametrisations
from workbench.registry import Registry

SCALES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "depth": 4, "vocabulary": 2048},
    "340m": {"width": 1024, "depth": 24, "vocabulary": 32_000},
    "1.3b": {"width": 2048, "depth": 24, "vocabulary": 32_000},
}
"""Named scales. With full attention and SwiGLU: 1.1M, 341.0M and 1,298.7M parameters, embeddings tied."""


@dataclass(frozen=True)
class Layer:
    """One block of the expanded model: resolved configurations of its two variants."""

    mixer: VariantConfig
    feedforward: VariantConfig

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {"mixer": self.mixer.plain(), "feedforward": self.feedforward.plain()}

    def canonical(self) -> dict[str, Any]:
        """Plain data that is equal for equivalent layers."""
        return {"mixer": self.mixer.canonical(), "feedforward": self.feedforward.canonical()}


class Span(NamedTuple):
    """What repeats over the depth: a layer, or a pair of layers with its shortcut."""

    layers: tuple[Layer, ...]
    shortcut: VariantConfig | None = None


def _settings(value: object) -> object:
    """Settings may be given as data, as a variant's name, or as a variant's Config."""
    if isinstance(value, VariantConfig | EmbeddingConfig | ResidualConfig):
        return value.model_dump(mode="json", exclude_unset=True) | {"kind": value.kind}
    return {"kind": value} if isinstance(value, str) else value


Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]


def _of_scale(name: str) -> Any:
    """Default of a field that the scale sets. An unknown scale is reported for the field ``scale`` alone."""
    return Field(default_factory=lambda fields: SCALES[fields.get("scale", "tiny")][name])


class MultiTokenConfig(Config):
    """A head for the token after the next: norm(block(W [norm(hidden t); norm(embedding of t + 1)])), and the model's
    output matrix. It is used in training only."""

    weight: Annotated[float, Field(gt=0)] = 0.3
    """Weight of its loss relative to the next-token loss."""
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training after which it is trained."""
    mixer: Settings | None = None
    """Its mixer. Default: that of the last layer."""
    feedforward: Settings = {"kind": "swiglu"}
    """Its feed-forward."""


class ModelConfig(Config):
    """A decoder language model."""

    scale: str = "tiny"
    """Named size that sets width, depth, vocabulary and the variants' defaults: tiny, 340m, 1.3b."""
    width: Annotated[int, Field(ge=8, le=2**20)] = _of_scale("width")
    """Model width D. Default: the scale's."""
    depth: Annotated[int, Field(ge=1, le=10_000)] = _of_scale("depth")
    """Number of blocks. Default: the scale's."""
    vocabulary: Annotated[int, Field(ge=2, le=2**26)] = _of_scale("vocabulary")
    """Number of token ids; the tokenizer is trained to this size. Default: the scale's."""
    pattern: str = "full"
    """Mixers by name, tiled over the depth: "gdn gdn gdn full"."""
    mixers: dict[str, Settings] = {}
    """Settings of the names in the pattern. A name is a variant, or any word with a `kind`."""
    at: dict[int, Settings] = {}
    """Mixers of single layers (from 0) that differ from the pattern: {0: {kind: full}}."""
    feedforward: str = "swiglu"
    """Feed-forwards by name, tiled over the depth: "swiglu moe"."""
    feedforwards: dict[str, Settings] = {}
    """Settings of the names in the feed-forward pattern."""
    feedforward_at: dict[int, Settings] = {}
    """Feed-forwards of single layers that differ from the pattern."""
    shortcut: str = ""
    """Feed-forwards parallel to pairs of layers (0 and 1, 2 and 3, …), by name, tiled over the pairs: "moe". Each reads
    the input of a feed-forward of its pair; its output is added at the end of the pair (ScMoE, arXiv 2509.01322)."""
    shortcut_from: Literal["first", "second"] = "first"
    """The layer of a pair whose feed-forward input a shortcut reads. From the first, its computation can overlap with a
    whole layer; from the second, it is an ordinary feed-forward parallel to the layer's: the baseline of equal
    parameters and FLOPs."""
    embedding: Settings = {"kind": "token"}
    """How token ids become vectors: token, or ngram."""
    residual: Settings = {"kind": "plain"}
    """How mixers and feed-forwards read and write what passes from layer to layer: plain, attention, hyper_connections,
    scalars."""
    tied: bool = True
    """Whether the output head shares the embedding's weights."""
    parametrisation: ParametrisationSetting = Field(default="standard", validate_default=True)
    """How initial values and optimiser settings follow width and depth, relative to a base model on which they are
    tuned: standard, full_align, mup, complete_p."""
    mtp: MultiTokenConfig | None = None
    """Multi-token prediction in training. Default: none."""
    lora: LoraConfig | None = None
    """Low-rank adapters, which alone are trained: {rank: 8, alpha: 16}. Default: none, all parameters are trained."""
    hidden_z: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the hidden z-loss, which keeps the last hidden states from growing (arXiv 2509.01322, eq. 10)."""
    readout: Literal["summary"] | None = None
    """Where predictions are made from: of a document's prefix at each position (default), or of the state of its last
    token alone (summary), for tasks that measure what a state holds."""

    @field_validator("scale")
    @classmethod
    def _named(cls, scale: str) -> str:
        require(scale in SCALES, "", got=scale, expected="a named scale", do=nearest(scale, SCALES))
        return scale

    def model_post_init(self, _context: Any) -> None:
        require(
            self.readout is None or (self.mtp is None and self.width % 2 == 0),
            "readout",
            got=f"{self.readout} with width={self.width}" + (" and mtp" if self.mtp is not None else ""),
            expected="an even width and no multi-token head",
        )
        # expanded now, so that a mistake is reported at construction
        _ = self.layers, self.shortcuts, self.mtp_layer, self.embedding_config, self.base_model
        _ = self.sources, self.residual_config
        require(
            self.parametrised.tied_head or not self.tied,
            "tied",
            got=True,
            expected=f"false with parametrisation {self.parametrisation.kind}: embedding and head have different rules",
            do="Set tied: false, or choose mup or complete_p.",
        )

    # -- the expanded model ------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """One entry per block, every default filled in.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        mixer = self._expand(mixers, "pattern", "at")
        feedforward = self._expand(feedforwards, "feedforward", "feedforward_at")
        return tuple(Layer(m, f) for m, f in zip(mixer, feedforward, strict=True))

    @cached_property
    def shortcuts(self) -> tuple[VariantConfig, ...]:
        """Resolved feed-forwards of the shortcuts, one per pair of layers; empty where there are none.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        if not self.shortcut.split():
            require(
                self.shortcut_from == "first",
                "shortcut_from",
                got=self.shortcut_from,
                expected="first where there is no `shortcut`",
                do="Give a feed-forward: shortcut: moe.",
            )
            return ()
        require(
            self.depth % 2 == 0,
            "shortcut",
            got=f"depth={self.depth}",
            expected="an even number of layers: a shortcut spans two",
            do=f"Make depth {self.depth + 1}, or leave the shortcut out.",
        )
        return tuple(self._expand(feedforwards, "shortcut", layers_per_name=2))

    @cached_property
    def sources(self) -> tuple[dict[str, int], ...]:
        """What each layer takes from earlier ones: name -> number of the layer that gives it.

        Raises:
            ConfigError: when a layer that a mixer needs is missing or has other settings.
        """
        sources: list[dict[str, int]] = []
        for index, layer in enumerate(self.layers):
            wanted = mixers[layer.mixer.kind].takes(layer.mixer)
            found = {name: self._source(index, name, taken) for name, taken in wanted.items()}
            sources.append({name: source for name, source in found.items() if source is not None})
        return tuple(sources)

    def _source(self, index: int, name: str, taken: Taken) -> int | None:
        """The layer from which layer ``index`` takes ``name``; None where there is none and none is needed."""
        offers = {n: mixers[self.layers[n].mixer.kind].gives(self.layers[n].mixer) for n in range(index)}
        givers = [n for n, offer in offers.items() if name in offer]
        where = f"mixer of layer {index} ({self.layers[index].mixer.kind})"
        require(
            givers or not taken.required,
            "pattern",
            got=f"{where} without an earlier layer that gives {name}",
            expected="such a layer before it",
            do="Put one before it in the pattern.",
        )
        if not givers:
            return None
        source = givers[0] if taken.source == "first" else givers[-1]
        for field, value in offers[source][name].items():
            require(
                taken.settings.get(field) == value,
                f"mixers.{self.layers[index].mixer.kind}.{field}",
                got=f"{taken.settings.get(field)!r} in the {where}",
                expected=f"{value!r}, as in layer {source}, whose {name} it reads",
            )
        return source

    @property
    def shortcut_parity(self) -> int:
        """Index within its pair, 0 or 1, of the layer that a shortcut reads from."""
        return ("first", "second").index(self.shortcut_from)

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
        needed = [name for name, taken in mixers[mixer.kind].takes(mixer).items() if taken.required]
        require(
            not needed,
            "mtp.mixer",
            got=f"{mixer.kind} that needs {', '.join(needed)} of an earlier layer",
            expected="a mixer with its own",
            do="Give the head one: mtp: {mixer: full}.",
        )
        return Layer(mixer, self._resolve(feedforwards, self.mtp.feedforward, "mtp.feedforward"))

    @cached_property
    def embedding_config(self) -> EmbeddingConfig:
        """The resolved configuration of the embedding.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        try:
            settings = {"kind": "token", **self.embedding}
            config_class = embeddings[settings["kind"]].Config
            defaults = config_class.defaults_at(self.scale, settings)
            return config_class.parse({**defaults, **settings}).resolved(self.width or 0, self.vocabulary or 0)
        except ConfigError as error:
            raise error.under("embedding") from None

    @cached_property
    def residual_config(self) -> ResidualConfig:
        """The resolved configuration of the residual.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        settings = {"kind": "plain", **self.residual}
        try:
            config_class = residuals[settings["kind"]].Config
            defaults = config_class.defaults_at(self.scale, settings)
            config = config_class.parse({**defaults, **settings}).resolved(self.width, self.depth)
        except ConfigError as error:
            raise error.under("residual") from None
        require(
            config.kind == "plain" or not self.shortcuts,
            "shortcut",
            got=f"{self.shortcut!r} beside residual {config.kind!r}",
            expected="the plain residual, to whose stream a shortcut adds",
            do="Leave one of them out.",
        )
        return config

    @property
    def repeats(self) -> bool:
        """Whether layers of equal settings cost the same wherever they are, and may be left out or repeated."""
        reads_nearest = any(
            taken.source == "nearest"
            for layer in self.layers
            for taken in mixers[layer.mixer.kind].takes(layer.mixer).values()
        )
        return residuals[self.residual_config.kind].repeats and not reads_nearest

    @cached_property
    def parametrised(self) -> Parametrisation:
        """The rules of the parametrisation."""
        return parametrisations[self.parametrisation.kind](self.parametrisation)

    @property
    def base_model(self) -> ModelConfig:
        """The model on which settings are tuned; this one in the standard parametrisation.

        Raises:
            ConfigError: naming the setting with which it cannot be built.
        """
        # no cached self: pydantic compares cached values as well, without end
        return self if self.parametrisation.kind == "standard" else self._base_model

    @cached_property
    def _base_model(self) -> ModelConfig:
        return self.base_model_at(None)

    def base_model_at(self, depth: int | None) -> ModelConfig:
        """The base model with another depth than its own, as whose layers those of a deeper model can be compared."""
        if self.parametrisation.kind == "standard":
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set if name != "parametrisation"}
        fields = deep_merge(given, {**self.parametrisation.base, **({} if depth is None else {"depth": depth})})
        try:
            return type(self).parse(fields)
        except ConfigError as error:
            raise error.under("parametrisation.base") from None

    def _expand(
        self,
        registry: Registry[Any],
        field: Literal["pattern", "feedforward", "shortcut"],
        single_field: str = "",
        layers_per_name: int = 1,
    ) -> list[Any]:
        """Resolved configurations along the pattern ``field``; ``single_field`` overrides single layers."""
        pattern: str = getattr(self, field)
        single: Mapping[int, dict[str, Any]] = getattr(self, single_field) if single_field else {}
        settings_field, used = "feedforwards", f"{self.feedforward} {self.shortcut}"
        if registry is mixers:
            settings_field, used = "mixers", self.pattern
        settings: Mapping[str, dict[str, Any]] = getattr(self, settings_field)
        hint = f", or use `{single_field}` for single layers" if single_field else ""
        try:
            names = tile(pattern, self.depth, layers_per_name=layers_per_name, hint=hint)
            check_names(names, {*registry, *settings}, registry.noun)
        except ConfigError as error:
            raise error.under(field) from None
        for index in single:
            in_range = 0 <= index < self.depth
            require(in_range, f"{single_field}.{index}", got=index, expected=f"a layer from 0 to {self.depth - 1}")
        unused = set(settings) - set(used.split()) - {str(override.get("kind")) for override in single.values()}
        for name in sorted(unused)[:1]:
            raise ConfigError.at(
                f"{settings_field}.{name}",
                got="settings for a name that no layer uses",
                expected=f"a name in {field} ({pattern!r})",
                do=nearest(name, used.split()),
            )
        by_name = {
            name: self._resolve(registry, {"kind": name, **settings.get(name, {})}, f"{settings_field}.{name}")
            for name in dict.fromkeys(names)
        }
        expanded = [by_name[name] for name in names]
        for index, override in single.items():
            expanded[index] = self._resolve(registry, override, f"{single_field}.{index}")
        return expanded

    def _resolve(self, registry: Registry[Any], settings: dict[str, Any], path: str) -> Any:
        try:
            has_kind, expected = "kind" in settings, f"a registered {registry.noun}"
            require(has_kind, "kind", got="nothing", expected=expected, do=nearest("", registry))
            config_class = registry[settings["kind"]].Config
            defaults = config_class.defaults_at(self.scale, settings)
            return config_class.parse({**defaults, **settings}).resolved(self.width)
        except ConfigError as error:
            raise error.under(path) from None

    # -- spans -------------------------------------------------------------------------------------------------------

    @property
    def spans(self) -> tuple[Span, ...]:
        """The expanded model as what repeats over its depth."""
        if not self.shortcuts:
            return tuple(Span((layer,)) for layer in self.layers)
        return tuple(map(Span, zip(self.layers[::2], self.layers[1::2]), self.shortcuts))

    def with_spans(self, spans: Sequence[Span]) -> ModelConfig:
        """This model made of other spans: a smaller one, to be measured."""
        layers = [layer for span in spans for layer in span.layers]
        shortcuts = [span.shortcut for span in spans if span.shortcut is not None]
        pattern, mixer_settings = _as_pattern([layer.mixer for layer in layers])
        names, feedforward_settings = _as_pattern([*(layer.feedforward for layer in layers), *shortcuts])
        mtp = None
        if self.mtp is not None and self.mtp_layer is not None:
            mtp = self.mtp.changed(**self.mtp_layer.plain())
        return self.changed(
            depth=len(layers),
            pattern=" ".join(pattern),
            mixers=mixer_settings,
            at={},
            feedforward=" ".join(names[: len(layers)]),
            feedforwards=feedforward_settings,
            feedforward_at={},
            shortcut=" ".join(names[len(layers) :]),
            mtp=mtp,
            parametrisation={"kind": "standard"},  # changes no size and no speed
        )

    # -- what it is --------------------------------------------------------------------------------------------------

    def canonical(self) -> dict[str, Any]:
        """The expanded model: two ways to write the same layers are the same model. Features that are off are left out,
        so that a model keeps its identity when a feature is added to the workbench."""
        canonical: dict[str, Any] = {
            "width": self.width,
            "vocabulary": self.vocabulary,
            "tied": self.tied,
            "layers": [layer.canonical() for layer in self.layers],
        }
        if self.embedding_config != embeddings["token"].Config():
            canonical["embedding"] = self.embedding_config.canonical()
        if self.residual_config.kind != "plain":
            canonical["residual"] = self.residual_config.canonical()
        if self.shortcuts:
            shortcuts = [config.canonical() for config in self.shortcuts]
            canonical["shortcut"] = {"from": self.shortcut_from, "feedforwards": shortcuts}
        if self.mtp is not None and self.mtp_layer is not None:
            canonical["mtp"] = {**self.mtp.plain(), **self.mtp_layer.canonical()}
        if self.lora is not None:
            canonical["lora"] = self.lora.canonical()
        if self.hidden_z:
            canonical["hidden_z"] = self.hidden_z
        if self.readout:
            canonical["readout"] = self.readout
        if self.parametrisation.kind != "standard":
            canonical["parametrisation"] = {**self.parametrisation.plain(), "base": self.base_model.canonical()}
        return canonical

    def variants(self) -> list[tuple[type[Variant], VariantConfig]]:
        """Every variant with its resolved configuration: those of the layers in order, then those of the shortcuts."""
        pairs = [pair for layer in self.layers for pair in _variants_of(layer)]
        return pairs + [(feedforwards[config.kind], config) for config in self.shortcuts]

    def settings(self) -> list[tuple[str, type[Component], ComponentConfig]]:
        """Path of the settings of each component, such as "mixers.full" or "embedding", with class and resolved
        configuration."""
        layer_mixers = {layer.mixer for layer in self.layers}
        settings: list[tuple[str, type[Component], ComponentConfig]] = [
            (f"{'mixers' if config in layer_mixers else 'feedforwards'}.{config.kind}", cls, config)
            for cls, config in self.variants()
        ]
        embedding, residual = self.embedding_config, self.residual_config
        return [
            *settings,
            ("embedding", embeddings[embedding.kind], embedding),
            ("residual", residuals[residual.kind], residual),
        ]

    def lacking(self, capability: Literal["causal", "segments", "decode"]) -> list[str]:
        """Kinds of components without this field of their :class:`workbench.contract.Capabilities`, sorted.

        The multi-token head counts except for ``decode``: it is used in training only.
        """
        embedding = self.embedding_config
        components: list[tuple[Any, Any]] = [*self.variants(), (embeddings[embedding.kind], embedding)]
        if self.mtp_layer is not None and capability != "decode":
            components += _variants_of(self.mtp_layer)
        kinds = {config.kind for cls, config in components if not getattr(cls.capabilities, capability)}
        if self.readout is not None and capability != "segments":
            kinds.add(f"readout {self.readout}")
        return sorted(kinds)


def _variants_of(layer: Layer) -> list[tuple[type[Variant], VariantConfig]]:
    mixer, feedforward = layer.mixer, layer.feedforward
    return [(mixers[mixer.kind], mixer), (feedforwards[feedforward.kind], feedforward)]


def _as_pattern(configs: Sequence[VariantConfig]) -> tuple[list[str], dict[str, Any]]:
    """A name for every configuration, equal where they are equal, and the settings of the names."""
    numbers = {config: number for number, config in enumerate(dict.fromkeys(configs))}
    names = [f"{config.kind}-{numbers[config]}" for config in configs]
    return names, {name: config.plain() for name, config in zip(names, configs)}
