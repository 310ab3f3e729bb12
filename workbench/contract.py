"""The contract between a variant and the rest of the workbench.

A variant is one file: a configuration with a ``kind``, a module, its accounting, its search space, its capabilities,
one decorator. Everything else (training, accounting, sweeps, conformance tests, dashboards) asks through the classes
here and knows no variant by name.

Legend for shape suffixes: B batch, T time, D model width, H heads, K key channels, V value channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from workbench.config import Config, ConfigError
from workbench.registry import Registry

__all__ = [
    "Cache",
    "Capabilities",
    "Config",
    "ConfigError",
    "Cost",
    "Counter",
    "Embedding",
    "EmbeddingConfig",
    "FeedForward",
    "Mixer",
    "Range",
    "Side",
    "Variant",
    "VariantConfig",
    "embeddings",
    "feedforwards",
    "mixers",
]

mixers: Registry[type[Mixer]] = Registry("mixer", "workbench.mixers")
feedforwards: Registry[type[FeedForward]] = Registry("feed-forward", "workbench.feedforwards")
embeddings: Registry[type[Embedding]] = Registry("embedding", "workbench.embeddings")


class Range(Config):
    """Values a hyper-parameter may take in a search: either ``values``, or an interval ``low`` to ``high``."""

    values: tuple[int | float | str | bool, ...] = ()
    """The listed values, and only those (a grid)."""
    low: int | float | None = None
    """Lower end of an interval, included."""
    high: int | float | None = None
    """Upper end of an interval, included."""
    log: bool = False
    """Whether the interval is searched on a logarithmic scale."""

    def model_post_init(self, _context: Any) -> None:
        if bool(self.values) == (self.low is not None and self.high is not None):
            raise ConfigError.at("", got=self.plain(), expected="either `values`, or both `low` and `high`")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError.at("low", got=self.low, expected=f"less than high={self.high}")
        if self.log and (self.low is None or self.low <= 0):
            raise ConfigError.at("log", got=f"low={self.low}", expected="a positive interval for a logarithmic search")


@dataclass(frozen=True)
class Capabilities:
    """What a variant can do. The system asks; it never guesses from the name."""

    causal: bool = True
    """No output depends on later inputs."""
    segments: bool = True
    """Packed documents in one row do not see each other."""
    decode: bool = True
    """Prefill and one-token decode with a cache agree with the full pass."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which it trains."""
    flops_from: Literal["forward", "decode"] = "forward"
    """How the FLOP formula is checked: against matrix products counted in one full forward pass, or, where the full
    pass computes more than the variant needs (masked scores), in a token-by-token decode."""


@dataclass(frozen=True)
class Cost:
    """What one variant costs in one layer. The formulas stand beside the module and are tested against measurement."""

    parameters: int
    """Stored parameters."""
    active_parameters: int
    """Parameters that take part for one token (less than stored only for routed experts)."""
    flops: float
    """Forward FLOPs per token in matrix products, the mean over positions 1 to T (one multiply-add = 2 FLOPs).
    Elementwise work, norms and short convolutions are left out, as is any recomputation."""
    cache_bytes: int = 0
    """Bytes that decoding keeps for one sequence after T tokens."""
    unevicted_bytes: int | None = None
    """The same if windows kept every token; None where nothing is evicted."""


@dataclass
class Side:
    """What a layer gives beside its output: losses to add to the training loss, and numbers to look at.

    ``losses`` are scalars already multiplied by their weight; ``metrics`` are detached scalars or vectors by name, wanted only
    where ``watch`` is set (most training steps do without them; those of some steps land in the run's diagnostics);
    ``counted`` holds, for every :class:`Counter` in the layer, itself, what it counted and what its late loss needs.
    """

    watch: bool = True
    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    counted: list[tuple[Counter, Tensor, Tensor]] = field(default_factory=list)


class Counter(nn.Module):
    """A module that counts tokens, and has a loss or a state that depends on the counts of a whole optimiser step.

    In training its forward leaves ``(self, counts, own)`` in ``Side.counted``: integer counts, one axis, without gradient, and a
    tensor of its own choice, with gradient. The trainer sums the counts over ranks and over the micro-batches of a step so
    far and asks for :meth:`late_loss`; after the optimiser has made the step it calls :meth:`move` once. Forward itself
    changes nothing, so a block that is computed again in the backward pass counts once, and a compiled one stays a function.
    """

    categories: int
    """Length of :attr:`probe`."""
    frozen: float = 0.0
    """Share of a run's steps, at its end, in which :meth:`move` leaves the state alone. Before, the length of the run has no
    influence on the state: longer runs can begin with this one's trunk."""
    probe: Tensor | None = None
    """Zeros that a watched training step lays beside what the module weighs, to see the gradient there; else None."""

    def late_loss(self, counts: Tensor, own: Tensor) -> Tensor | None:
        """A scalar to add to the loss of a micro-batch, multiplied by its weight; ``counts`` are those of the step so far."""
        return None

    def move(self, counts: Tensor, rate: float, left: float, applied: Tensor) -> None:
        """Change the state after an optimiser step, without waiting for the device.

        Args:
            counts: of the whole step.
            rate: learning rate of this step as a share of the peak.
            left: share of the run's steps that is still to come.
            applied: 1.0 on the device, or 0.0 where the optimiser has skipped the step.
        """

    def diagnose(self, counts: Tensor, recent: Tensor, own: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Detached scalars or vectors by name for the run's diagnostics.

        Args:
            counts: of the step. recent: of all steps since the diagnosis before.
            own: what the step's last micro-batch left. gradient: of that micro-batch's loss at :attr:`probe`.
        """
        return {}


class VariantConfig(Config):
    """Base of a variant's configuration. ``kind`` is the registered name."""

    kind: str
    scales: ClassVar[dict[str, dict[str, Any]]] = {}
    """Defaults that depend on the named scale: ``{"tiny": {"window": 32}}``. Explicit fields win."""

    @classmethod
    def defaults_at(cls, scale: str, given: dict[str, Any]) -> dict[str, Any]:
        """The fields that the named scale sets where the user has ``given`` others."""
        return cls.scales.get(scale, {})

    def resolved(self, width: int) -> Self:
        """This configuration with everything that follows from the model width filled in and checked.

        Raises:
            ConfigError: when the variant cannot be built at this width.
        """
        return self


class Cache(ABC):
    """Decode state of one layer. ``length`` tokens have been seen. Mutated in place by the mixer that made it."""

    length: int = 0

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every tensor kept, so that accounting can be compared with what is really held."""


class Variant(nn.Module):
    """What mixers and feed-forwards share. Built as ``cls(config, width)`` from a *resolved* configuration."""

    Config: ClassVar[type[VariantConfig]]
    capabilities: ClassVar[Capabilities] = Capabilities()
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings, beside the defaults, that the conformance suite takes the variant through."""

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        """Accounting of one layer at sequence length ``length``; cache tensors in the model's type take
        ``element_bytes`` bytes an element."""

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        """Fields of the configuration that a sweep may turn, with sensible ranges; the defaults lie inside."""
        return {}


class Mixer(Variant):
    """A sequence mixer: the only place of a block where tokens see each other."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None, side: Side | None = None
    ) -> Tensor:
        """Mix along time.

        Args:
            x_BTD: normalised block input.
            segments: (B, T) integers; positions see each other only where their numbers are equal. None means one
                document a row. Not together with ``cache``.
            cache: decode state; the T tokens continue what it holds, and it is updated in place.
            side: where to leave losses and metrics, if wanted.

        Returns:
            (B, T, D), to be added to the residual stream.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> Cache:
        """An empty cache for ``batch`` sequences of at most ``length`` tokens."""


class FeedForward(Variant):
    """A feed-forward: acts on every token by itself, unless its capabilities say that it is not causal."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, *, side: Side | None = None) -> Tensor:
        """(B, T, D) normalised block input -> (B, T, D), to be added to the residual stream."""


class EmbeddingConfig(Config):
    """Base of an embedding's configuration. ``kind`` is the registered name."""

    kind: str

    def resolved(self, width: int, vocabulary: int) -> Self:
        """This configuration with everything that follows from the model filled in and checked.

        Raises:
            ConfigError: when the embedding cannot be built so.
        """
        return self


class Embedding(nn.Module):
    """From token ids to the residual stream. Built as ``cls(config, width, vocabulary)`` from a *resolved* configuration.

    ``weight`` (V, D) is what a tied head shares.
    """

    Config: ClassVar[type[EmbeddingConfig]]
    weight: Tensor

    @abstractmethod
    def forward(self, tokens_BT: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D). Segments and cache as for a :class:`Mixer`: documents do not see each other."""

    @abstractmethod
    def new_cache(self, batch: int, device: torch.device | str) -> Cache:
        """What decoding ``batch`` sequences keeps of earlier tokens."""

    def examine(self, tokens_BT: Tensor, segments: Tensor) -> dict[str, Any]:
        """What is worth knowing about this embedding of these rows of text, as plain data, before a training begins."""
        return {}

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, width: int, vocabulary: int) -> Cost:
        """Accounting. Parameters that are looked up are stored and not active; active ones take part in every token."""
