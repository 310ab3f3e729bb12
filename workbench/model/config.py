"""A model is data: a layer pattern tiled over the depth, with settings by name and overrides for single layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from workbench.config import Config, ConfigError, nearest
from workbench.contract import Variant, VariantConfig, feedforwards, mixers
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


def _settings(value: object) -> object:
    """Settings may be given as data, as a variant's name, or as a variant's Config."""
    if isinstance(value, VariantConfig):
        return value.model_dump(mode="json", exclude_unset=True) | {"kind": value.kind}
    return {"kind": value} if isinstance(value, str) else value


Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]


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
    tied: bool = True
    """Whether the output head shares the embedding's weights."""

    def model_post_init(self, _context: Any) -> None:
        if self.scale not in SCALES:
            raise ConfigError.at("scale", got=self.scale, expected="a named scale", do=nearest(self.scale, SCALES))
        for name, value in SCALES[self.scale].items():
            if getattr(self, name) is None:
                self.__dict__[name] = value  # frozen for users; still under construction here
        assert self.layers  # expand now: a mistake is reported where it was made

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The expanded model, one entry a block, every default filled in.

        Raises:
            ConfigError: naming the setting that cannot be built.
        """
        mixer = self._expand(mixers, "pattern", "mixers", "at")
        feedforward = self._expand(feedforwards, "feedforward", "feedforwards", "feedforward_at")
        return tuple(Layer(m, f) for m, f in zip(mixer, feedforward, strict=True))

    def _expand(self, registry: Registry[Any], tile_field: str, settings_field: str, at_field: str) -> list[Any]:
        assert self.width and self.depth
        tile: list[str] = getattr(self, tile_field).split()
        named: Mapping[str, dict[str, Any]] = getattr(self, settings_field)
        at: Mapping[int, dict[str, Any]] = getattr(self, at_field)
        if not tile:
            raise ConfigError.at(tile_field, got="nothing", expected="at least one name", do=nearest("", registry))
        if self.depth % len(tile):
            raise ConfigError.at(tile_field, got=f"{len(tile)} names for depth={self.depth}",
                                 expected="a tile that divides the depth",
                                 do=f"Make depth a multiple of {len(tile)}, or use `{at_field}` for single layers.")  # fmt: skip
        for index in at:
            if not 0 <= index < self.depth:
                raise ConfigError.at(f"{at_field}.{index}", got=index, expected=f"a layer from 0 to {self.depth - 1}")
        for name in tile:
            if name not in named and name not in registry:
                raise ConfigError.at(tile_field, got=name, expected=f"a registered {registry.noun}",
                                     do=nearest(name, {*registry, *named}))  # fmt: skip
        unused = set(named) - set(tile) - {str(v.get("kind")) for v in at.values()}
        if unused:
            name = min(unused)
            raise ConfigError.at(f"{settings_field}.{name}", got="settings for a name that no layer uses",
                                 expected=f"a name in {tile_field} ({getattr(self, tile_field)!r})",
                                 do=nearest(name, tile))  # fmt: skip
        by_name: dict[str, Any] = {}
        for name in tile:
            if name not in by_name:
                by_name[name] = self._resolve(
                    registry, {"kind": name, **named.get(name, {})}, f"{settings_field}.{name}"
                )
        expanded = [by_name[tile[i % len(tile)]] for i in range(self.depth)]
        for index, settings in at.items():
            expanded[index] = self._resolve(registry, settings, f"{at_field}.{index}")
        return expanded

    def _resolve(self, registry: Registry[Any], settings: dict[str, Any], path: str) -> Any:
        try:
            if "kind" not in settings:
                raise ConfigError.at("kind", got="nothing", expected=f"a registered {registry.noun}",
                                     do=nearest("", registry))  # fmt: skip
            config_class = registry[settings["kind"]].Config
            defaults = config_class.defaults_at(self.scale, settings)
            return config_class.parse({**defaults, **settings}).resolved(self.width)
        except ConfigError as error:
            raise error.under(path) from None

    def canonical(self) -> dict[str, Any]:
        """The expanded model: two ways to write the same layers are the same model."""
        return {
            "width": self.width,
            "vocabulary": self.vocabulary,
            "tied": self.tied,
            "layers": [
                {"mixer": layer.mixer.plain(), "feedforward": layer.feedforward.plain()} for layer in self.layers
            ],
        }

    def variants(self) -> list[tuple[type[Variant], VariantConfig]]:
        """Every variant of every layer, with its resolved configuration, in order."""
        return [
            pair
            for layer in self.layers
            for pair in (
                (mixers[layer.mixer.kind], layer.mixer),
                (feedforwards[layer.feedforward.kind], layer.feedforward),
            )
        ]

    def not_causal(self) -> list[str]:
        """Variants whose outputs depend on later tokens: their losses say nothing beside those of causal models."""
        return sorted({config.kind for cls, config in self.variants() if not cls.capabilities.causal})

    def describe(self) -> str:
        """The expanded layer table as text."""
        lines = [f"width {self.width}, {self.depth} layers, vocabulary {self.vocabulary}, "
                 f"head {'tied' if self.tied else 'untied'}"]  # fmt: skip
        for index, layer in enumerate(self.layers):
            parts = []
            for config in (layer.mixer, layer.feedforward):
                fields = ", ".join(f"{k}={v}" for k, v in config.plain().items() if k != "kind")
                parts.append(f"{config.kind}({fields})")
            lines.append(f"{index:3d}  {'  '.join(parts)}")
        return "\n".join(lines)
