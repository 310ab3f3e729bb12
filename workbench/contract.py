"""The contract between a variant and the rest of the workbench.

A variant is one file: a configuration with a ``kind``, a module, its accounting, its search space, its capabilities,
one decorator. Everything else (training, accounting, sweeps, conformance tests, dashboards) asks through the classes
here and knows no variant by name.

Legend for shape suffixes: B batch, T time, D model width, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from workbench.config import Config, ConfigError
from workbench.pooled import Pooled, mean_of
from workbench.ranges import Range
from workbench.registry import Registry

__all__ = [
    "AuxOutputs",
    "BlocksPerQuery",
    "Budget",
    "BudgetChoice",
    "Cache",
    "Capabilities",
    "Component",
    "ComponentConfig",
    "Config",
    "ConfigError",
    "Cost",
    "Embedding",
    "EmbeddingConfig",
    "FeedForward",
    "Mixer",
    "ParameterRole",
    "Range",
    "RescalingPair",
    "Residual",
    "ResidualConfig",
    "Role",
    "Scores",
    "Shared",
    "State",
    "StepCounter",
    "Taken",
    "Variant",
    "VariantConfig",
    "WarmUp",
    "embeddings",
    "feedforwards",
    "mixers",
    "residuals",
]

mixers: Registry[type[Mixer]] = Registry("mixer", "workbench.mixers")
feedforwards: Registry[type[FeedForward]] = Registry("feed-forward", "workbench.feedforwards")
embeddings: Registry[type[Embedding]] = Registry("embedding", "workbench.embeddings")
residuals: Registry[type[Residual]] = Registry("residual", "workbench.residuals")


@dataclass(frozen=True)
class Capabilities:
    """What a component can do. The rest of the workbench asks; it never guesses from the name."""

    causal: bool = True
    """No output depends on later inputs."""
    segments: bool = True
    """Packed documents in one row do not see each other."""
    decode: bool = True
    """Prefill and one-token decode with a cache agree with the full pass."""
    flops_check: Literal["forward", "decode"] = "forward"
    """How the FLOP formula is checked: against matrix products counted in one full forward pass, or, where the full
    pass computes more than the variant needs (masked scores), in a token-by-token decode."""


class Role(StrEnum):
    """What a parameter is: rules of optimisers, of transfer across widths and of growth refer to roles, not to
    names."""

    EMBEDDING = "embedding"
    """Rows that are looked up: token vectors, tables of n-grams."""
    HIDDEN = "hidden"
    """A matrix inside the model."""
    LATENT_DOWN = "latent_down"
    """A matrix into a latent (latent attention)."""
    LATENT_UP = "latent_up"
    """A matrix out of a latent."""
    EXPERT = "expert"
    """The matrices of several experts, one along the first axis."""
    ROUTER = "router"
    """The matrix to the scores of experts, or of whatever else a token chooses from: its fan-in may follow the width,
    its fan-out does not."""
    HEAD = "head"
    """The output matrix, where it is not the embedding."""
    CONVOLUTION = "convolution"
    """Taps (C, W) of a depthwise convolution."""
    NORM = "norm"
    """Gains."""
    BIAS = "bias"
    VECTOR = "vector"
    """Other numbers per channel, head or position: decay rates, time steps, sinks, position encodings."""


VECTORS = frozenset({Role.EMBEDDING, Role.NORM, Role.BIAS, Role.VECTOR})
"""Roles without a fan-in and without weight decay, which would act on them at every step, whatever their gradient."""


@dataclass(frozen=True)
class ParameterRole:
    """The role of one parameter and what the rules for it need. The defaults are those of a matrix (…, out, in)."""

    role: Role
    writes_residual: bool = False
    """Whether its product is added to the residual stream; it then starts smaller by 1/sqrt(2 · depth)."""
    decays: bool = True
    """Whether weight decay acts on it."""
    fan_out: int = -2
    """Axis of the output channels, from the end."""
    fan_in: int | None = -1
    """Axis of the input channels, from the end; None where every output has one number, or is looked up."""
    parts: tuple[tuple[int, int], ...] = ()
    """(heads, channels of one) of every matrix that is stored in this one along its output channels, in order; empty
    where it is one without heads."""

    @classmethod
    def of(cls, role: Role) -> Self:
        """The usual parameter of this role: a matrix, or for :data:`VECTORS` (…, out) without decay."""
        return cls(role, decays=False, fan_out=-1, fan_in=None) if role in VECTORS else cls(role)


@dataclass(frozen=True, eq=False)
class RescalingPair:
    """Two sets of tensors that enter the output as products: scaling one and dividing the other changes no output.

    Numbers of a tensor that must share a scale have one index. An index is an integer tensor that broadcasts against
    its parameter, -1 where nothing is scaled. Exact for any positive scales; bit for bit where they are powers of two.
    """

    name: str
    """What is paired: "qk", "vo", "up_down"."""
    first: Mapping[str, Tensor]
    """Parameter name -> index of the scale that multiplies each number."""
    second: Mapping[str, Tensor]
    """Parameter name -> index of the scale that divides each number."""
    heads: Tensor
    """(S,) head, key–value group or expert of every scale. Coarser rescaling uses one scale per head, or one for
    all."""

    def factors(self, scales_S: Tensor) -> list[tuple[str, Tensor]]:
        """Parameters with the factors that multiply them; one parameter may occur on both sides."""
        sides = ((self.first, scales_S), (self.second, 1 / scales_S))
        return [
            (name, torch.where(index >= 0, scales[index.clamp_min(0)], 1.0))
            for side, scales in sides
            for name, index in side.items()
        ]

    def under(self, prefix: str) -> RescalingPair:
        """The same pair, as seen from a module that holds its owner as ``prefix``."""
        first, second = (
            {f"{prefix}.{name}": index for name, index in side.items()} for side in (self.first, self.second)
        )
        return RescalingPair(self.name, first, second, self.heads)


@dataclass(frozen=True)
class Cost:
    """What one variant costs in one layer. The formulas are defined beside the module and tested against
    measurement."""

    parameters: int
    """Stored parameters."""
    active_parameters: int
    """Parameters that take part for one token (less than stored only for routed experts)."""
    flops: float
    """Forward FLOPs per token in matrix products, the mean over positions 1 to T (one multiply-add = 2 FLOPs).
    Elementwise work, norms and short convolutions are left out, as is any recomputation."""
    cache_bytes: int = 0
    """Bytes of the decode cache of one sequence after T tokens."""
    unevicted_bytes: int | None = None
    """The same if windows evicted nothing; None where nothing is evicted anyway."""

    def plus(self, *, parameters: int = 0, flops: float = 0.0, cache_bytes: int = 0) -> Cost:
        """This cost and these further ones; the parameters take part for every token."""
        return replace(
            self,
            parameters=self.parameters + parameters,
            active_parameters=self.active_parameters + parameters,
            flops=self.flops + flops,
            cache_bytes=self.cache_bytes + cache_bytes,
        )


class BlocksPerQuery(NamedTuple):
    """How many blocks of keys the queries of a sparse mixer attend."""

    field: str
    """Field of the configuration that sets the number."""
    configured: int
    """Its value."""
    smallest: int
    """Blocks that every query attends whatever its scores."""


class BudgetChoice(NamedTuple):
    """What a layer attends in one micro-batch; scalars on the device."""

    blocks: Tensor
    """Blocks per query, int32."""
    coverage_lost: Tensor
    """Share of the selection scores that the configured number of blocks has and these do not."""

    @property
    def metrics(self) -> dict[str, Pooled]:
        """As numbers of a log."""
        return {"budget": mean_of(self.blocks), "coverage_lost": mean_of(self.coverage_lost)}


class WarmUp(NamedTuple):
    """A stage at the start of training, which a mixer declares."""

    fraction: float
    """Of the run's steps."""
    alone: bool = False
    """Whether nothing is trained meanwhile but the parameters by which the layers in their stage choose
    (:attr:`Component.chosen_by`)."""


@dataclass(frozen=True, eq=False)
class Budget:
    """The number of blocks that the queries of one layer attend in one micro-batch.

    Numbers that vary are tensors on the device, read by the kernels when they run: all values share compiled code, and
    the host waits for none. A subclass overrides :meth:`choose` to decide by coverage.
    """

    largest: int
    """Largest number that :meth:`choose` returns: the size of index buffers."""
    blocks: Tensor
    """The number where it does not depend on coverage: int32, a scalar."""
    candidates_K: Tensor | None = None
    """(K,) int32 numbers of blocks whose coverage :meth:`choose` receives; None: it needs no coverage."""
    queries: int = 1024
    """Queries of a row, evenly spaced, over which coverage is averaged; all queries of a shorter row."""

    def choose(self, coverage_K: Tensor | None) -> BudgetChoice:
        """The number of blocks. Default: ``blocks``, and nothing lost.

        Args:
            coverage_K: (K,) share of the selection scores in the best ``candidates_K`` blocks, the mean over queries;
                None without candidates.
        """
        return BudgetChoice(self.blocks, torch.zeros((), device=self.blocks.device))


@dataclass
class AuxOutputs:
    """Auxiliary outputs of one layer: losses, metrics and counts, appended by its modules during forward.

    A layer sees one micro-batch of a rank. Losses and metrics are of the whole optimiser step, all micro-batches and
    ranks: losses and the inputs of step losses are shares of it, which are added; metrics are pooled. Positions of
    padding (negative ``segments``) enter none of them.
    """

    collect_metrics: bool = True
    """Whether to fill ``metrics``. Most training steps run without; the metrics of some enter the run's diagnostics."""
    tokens: Tensor | None = None
    """Tokens of the whole step without padding, by which a layer divides its sums over tokens: a scalar. Default: those
    of this micro-batch."""
    losses: list[Tensor] = field(default_factory=list)
    """Scalars to add to the training loss, already multiplied by their weight."""
    metrics: dict[str, Pooled] = field(default_factory=dict)
    """Detached numbers by name."""
    counts: list[tuple[StepCounter, Tensor, Tensor]] = field(default_factory=list)
    """One entry per :class:`StepCounter` of the layer: the counter, its counts, the input of its step loss."""
    score_maxima: list[Tensor] | None = None
    """Where a list is given, mixers without a :meth:`Mixer.score_obstacle` append (H,) the largest attention score of
    each head, before a soft-cap, padding left out; detached."""
    budget: BudgetChoice | None = None
    """Set by a mixer that was given a :class:`Budget`."""
    warming_up: bool = False
    """Whether the layer's mixer is in the stage that it declares (:meth:`Mixer.warm_up`)."""

    def token_mean(self, values_N: Tensor, valid_N: Tensor | None) -> Tensor:
        """Sum over the tokens of (N, …) divided by the tokens of the step: this micro-batch's share of their mean.

        Args:
            valid_N: (N,) where there is a token and no padding. Default: everywhere.
        """
        if valid_N is None:
            return values_N.mean(0) if self.tokens is None else values_N.sum(0) / self.tokens.to(values_N.dtype)
        tokens = valid_N.sum().clamp_min(1) if self.tokens is None else self.tokens
        valid = valid_N.view(-1, *[1] * (values_N.dim() - 1))
        return torch.where(valid, values_N, 0.0).sum(0) / tokens.to(values_N.dtype)


class StepCounter(nn.Module):
    """A module that counts tokens and has a loss or a state that depends on the counts of a whole optimiser step.

    In training, forward appends ``(self, counts, loss_input)`` to ``AuxOutputs.counts``: integer counts (one axis, no
    gradient) and a tensor of the module's choice (with gradient), a share of a sum over the step. The trainer sums the
    counts over ranks and micro-batches and calls :meth:`step_loss` for every micro-batch; after the optimiser step it
    calls :meth:`update_state` once. Forward itself is free of side effects: a block recomputed in the backward pass
    counts once, and a compiled block stays a pure function.
    """

    tap_size: int
    """Length of :attr:`gradient_tap`."""
    freeze_last: float = 0.0
    """Fraction of the run's steps, at its end, in which :meth:`update_state` leaves the state unchanged. Before that
    the state does not depend on the length of the run."""
    counts_first: bool = False
    """Whether :meth:`step_loss` needs the counts of the whole step. A step of several micro-batches then runs them all
    without gradients beforehand, in order to count."""
    gradient_tap: Tensor | None = None
    """A zero tensor added to the gate values on diagnostic steps; its gradient is the gradient of the gates."""

    def step_loss(self, counts: Tensor, loss_input: Tensor) -> Tensor | None:
        """A micro-batch's share of a loss of the step, a scalar already multiplied by its weight.

        Args:
            counts: all ranks, all micro-batches of the step; without :attr:`counts_first` those up to this one.
            loss_input: from this micro-batch's forward.
        """
        return None

    def update_state(self, counts: Tensor, lr_factor: float, remaining: float, applied: Tensor) -> None:
        """Update the state after an optimiser step, without synchronising with the device.

        Args:
            counts: of the whole step.
            lr_factor: learning rate of this step divided by the peak learning rate.
            remaining: fraction of the run's steps still to come.
            applied: on the device, 1.0, or 0.0 where the optimiser skipped the step.
        """

    def diagnostics(
        self, counts: Tensor, recent_counts: Tensor, loss_input: Tensor, tap_gradient: Tensor
    ) -> dict[str, Tensor]:
        """Detached scalars or vectors by name for the run's diagnostics.

        Args:
            counts: of the step.
            recent_counts: of all steps since the last diagnostics.
            loss_input: summed over the step.
            tap_gradient: gradient of the step's loss with respect to :attr:`gradient_tap`.
        """
        return {}


class ComponentConfig(Config):
    """Base of a component's configuration. ``kind`` is the registered name."""

    kind: str
    scales: ClassVar[dict[str, dict[str, Any]]] = {}
    """Defaults that depend on the named scale: ``{"tiny": {"window": 32}}``. Explicit fields win."""
    implementation: ClassVar[frozenset[str]] = frozenset()
    """Fields that choose how the function is computed: they change speed and rounding, not the function."""

    @classmethod
    def defaults_at(cls, scale: str, given: dict[str, Any]) -> dict[str, Any]:
        """Defaults of the named scale, where the user has set the fields ``given``."""
        return cls.scales.get(scale, {})


class VariantConfig(ComponentConfig):
    """Base of the configuration of a mixer or feed-forward."""

    def resolved(self, width: int) -> Self:
        """This configuration, checked, with every default that follows from the model width filled in.

        Raises:
            ConfigError: when the variant cannot be built at this width.
        """
        return self


class Cache(ABC):
    """Decode state of one layer. Mutated in place by the mixer that made it.

    Passes over several tokens (prompts) move all sequences by equally many tokens, which ``length`` counts. After
    :meth:`step_from` every pass is a step: one token per sequence at the positions of ``positions_B``, which lie on the
    device and differ between sequences. A step changes nothing but memory of the device, so that it can be captured in
    a CUDA graph; whoever makes the steps advances the positions.
    """

    length: int = 0
    """Tokens of every sequence that passes have seen; not kept up to date by steps."""
    positions_B: Tensor | None = None
    """(B,) int64 position of the token of the next step; None before :meth:`step_from`."""
    ragged: ClassVar[bool] = False
    """Whether its mixer makes such steps. If not, sequences are decoded together only while they are equally long, and
    every pass over one token counts in ``length``."""

    common: ClassVar[tuple[str, ...]] = ()
    """Attributes, of the cache or of what it consists of, whose tensors all sequences share; others have a row each."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All cached tensors; accounting is tested against their size."""

    def store_in(self, dtype: torch.dtype) -> str | None:
        """Keep the tokens in eight bits, as int8 or float8_e4m3fn, before any is cached. Returns why that is
        impossible; None where it is done, or where nothing is cached for every token."""
        return "what is cached is read in the type of the model"

    def step_bytes(self, lengths: Sequence[int]) -> float:
        """Bytes that a step has to read and write, for sequences of these lengths. Default: every tensor is read."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def take_from(self, givers: Mapping[str, Cache]) -> None:  # noqa: B027  (a default)
        """Called once, before the first pass, where the layer takes something from earlier ones. Default: a step reads
        nothing from their caches.

        Args:
            givers: name of what is taken -> cache of the layer that gives it.
        """

    def step_from(self, positions_B: Tensor) -> None:
        """Make every further pass a step at these positions. The tensor is shared, not copied."""
        self.positions_B = positions_B

    def rotary(self) -> dict[str, Any]:
        """Keyword arguments of :class:`workbench.layers.Rotary` for the next tokens."""
        return {"offset": self.length} if self.positions_B is None else {"positions_BT": self.positions_B[:, None]}

    def part(self, first: int, last: int) -> Self:
        """A cache of the sequences ``first`` to ``last - 1`` on the same memory, for passes of their own."""
        listed = {id(tensor) for tensor in self.tensors()}

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[first:last] if id(value) in listed else value
            if isinstance(value, list):
                return [of(item) for item in value]
            if isinstance(value, dict):
                return {name: of(item) for name, item in value.items()}
            if not hasattr(value, "tensors"):
                return value
            copied, common = copy.copy(value), getattr(value, "common", ())
            vars(copied).update({name: of(item) for name, item in vars(value).items() if name not in common})
            return copied

        return of(self)


class Component(nn.Module):
    """What mixers, feed-forwards and embeddings share; each kind has a registry."""

    Config: ClassVar[type[ComponentConfig]]
    capabilities: ClassVar[Capabilities] = Capabilities()
    roles: Mapping[str, Role | ParameterRole] = {}
    """Parameters by name, "sink" or "project.down.weight", with their role. Every module may declare ``roles``; the
    layers of :mod:`workbench.layers` declare theirs, so that a variant names only its direct parameters and those whose
    role differs from their layer's. See :func:`workbench.model.roles.parameter_roles`."""
    chosen_by: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of parameters that choose what the output is computed from. The choice has no gradient:
    auxiliary losses alone train them."""
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Settings with which the conformance suite builds the component, each on top of the defaults."""

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        """Fields of the configuration that a sweep may vary, with sensible ranges; the defaults lie inside."""
        return {}

    def transfer_constants(self) -> Mapping[str, float]:
        """Numbers in the function or the initial values that depend on sizes and that no rule of a parametrisation
        follows, by the setting they come from. A parametrisation other than the standard one refuses a base model in
        which they differ."""
        return {}

    def rescaling_pairs(self) -> list[RescalingPair]:
        """Exact rescalings of this component, the finest granularity of each.

        A pair is left out where there is a norm, a nonlinearity or a rotation of unequal scales between its tensors.
        """
        return []

    widens: ClassVar[tuple[str, ...]] = ()
    """Whole-number settings that growth in width may multiply, all by one number: roles say what they are an axis of,
    and every unit (a hidden channel, a head with its keys) computes the same beside copies of it."""

    def width_obstacle(self) -> str | None:
        """Why the channels of the residual stream cannot be repeated here; None where they can. Constants that follow
        the width are declared by :meth:`transfer_constants`."""
        return None

    def graph_obstacle(self) -> str | None:
        """Why a decoding step through this component cannot be captured in a CUDA graph; None where it can."""
        return None

    def rescaling_obstacles(self) -> dict[str, str]:
        """Name of a pair that other components have and this one lacks -> what stands between its tensors."""
        return {}


class Variant(Component):
    """A mixer or feed-forward. Built as ``cls(config, width)`` from a *resolved* configuration."""

    Config: ClassVar[type[VariantConfig]]

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        """Accounting of one layer at sequence length ``length``; cached tensors in the model's type take
        ``element_bytes`` bytes per element."""

    def silencers(self, writers: Sequence[str]) -> tuple[str, ...]:
        """Parameters at whose zeros the output is zero for every input, by name. Default: ``writers``.

        Args:
            writers: the parameters that write the residual stream.

        Raises:
            ConfigError: when no values of the parameters silence the output.
        """
        return tuple(writers)


class Scores(NamedTuple):
    """What the scores of a softmax over tokens are made of: scale · q_t · k_s, over keys s ≤ t of the same document."""

    q_BTHK: Tensor
    """Queries (B, T, H, K)."""
    k_BTGK: Tensor
    """Keys (B, T, G, K), H a multiple of G."""
    scale: float | None = None
    """Default: 1/sqrt(K)."""
    window: int | None = None
    """Keys that a query sees, its own included. Default: all."""


class Taken(NamedTuple):
    """What a mixer takes from an earlier layer of the same model."""

    source: Literal["first", "nearest"]
    """Which of the earlier layers that can give it: the first of the model, or the one closest to the taker."""
    required: bool
    """Whether a model without such a layer is refused; if not, a layer without a source does without."""
    settings: Mapping[str, Any]
    """Settings that must be those of the giver, by name."""


@dataclass
class Shared:
    """What a layer takes from earlier layers and gives to later ones in one forward pass, by name."""

    taken: Mapping[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    """Filled by the mixer with all of :attr:`Mixer.given_to_later`: tensors, or tuples of tensors."""


class Mixer(Variant):
    """A sequence mixer: the only part of a block in which tokens see each other."""

    given_to_later: frozenset[str] = frozenset()
    """Names of what later layers of the model take from this one; set by the model."""

    @classmethod
    def gives(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        """What a layer of this configuration can give to later ones: name -> settings that a taker must share.

        A mixer that gives or takes has the further argument ``shared: Shared | None`` in :meth:`forward`; it is passed
        only where something is given or taken. Default: nothing.
        """
        return {}

    @classmethod
    def takes(cls, config: Any) -> Mapping[str, Taken]:
        """What a layer of this configuration takes from an earlier one, by name. Default: nothing."""
        return {}

    def warm_up(self) -> WarmUp | None:
        """The stage at the start of training in which :attr:`AuxOutputs.warming_up` is true for this layer. Passes
        without auxiliary outputs, as those of evaluations, and the multi-token head are never in it. Default: None,
        without such a stage."""
        return None

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        """Queries and keys of every softmax over tokens, from the mixer's input, before a soft-cap. Arguments as of
        :meth:`forward`.

        A sparse mixer gives all keys that a query may select, and leaves out blocks that it pools. Default: none.
        """
        return []

    @classmethod
    def blocks_per_query(cls, config: Any) -> BlocksPerQuery | None:
        """The number of blocks that a :class:`Budget` may change. A mixer that has one takes the further argument
        ``budget: Budget | None`` in :meth:`forward`: without it, the configured number; not together with ``cache``.
        Default: None, a mixer that selects no blocks."""
        return None

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        """Mix along time.

        Args:
            x_BTD: normalised block input.
            segments: (B, T) integers; positions see each other only where their numbers are equal; negative where
                padded. None means one document per row. Not together with ``cache``.
            cache: decode state; the T tokens follow the cached ones; updated in place.
            aux: collects losses, metrics and counts, if given.

        Returns:
            (B, T, D), to be added to the residual stream.
        """

    @abstractmethod
    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> Cache:
        """An empty cache for ``batch`` sequences of at most ``length`` tokens.

        Args:
            dtype: of the model, for tensors that are only read later; a state that every token changes has at least
                fp32, in which the changes of a long sequence are not lost.
        """

    def score_obstacle(self) -> str | None:
        """Why the largest attention score of a head is not measured, or no factor of the weights scales the scores of
        one head alone; None where :meth:`score_factors` does."""
        return "it does not measure the scores of its heads"

    def score_factors(self, factors_H: Tensor) -> dict[str, Tensor]:
        """Parameters and what multiplies them so that the scores of every head are multiplied by one factor each.

        Args:
            factors_H: positive; a head with the factor 1 keeps its scores.

        Returns:
            name -> a tensor that broadcasts against the parameter, with its full length along the first axis.
        """
        raise NotImplementedError(f"{type(self).__name__}: {self.score_obstacle()}")


class FeedForward(Variant):
    """A feed-forward: acts on each token separately, unless its capabilities exclude causality."""

    @classmethod
    def num_experts(cls, config: Any) -> int:
        """Experts E that ranks may divide among themselves (``training.expert_parallel``): the length of the first axis
        of all parameters of the module itself whose role is ``expert``. :meth:`forward` then has DTensors in their
        place, which it passes on to :func:`workbench.ops.experts.swiglu_experts` or ``routed_experts``. Default: 0,
        none; experts, if there are any, stay undivided."""
        return 0

    @abstractmethod
    def forward(self, x_BTD: Tensor, *, segments: Tensor | None = None, aux: AuxOutputs | None = None) -> Tensor:
        """Transform each token.

        Args:
            x_BTD: normalised block input.
            segments: as for a :class:`Mixer`. A layer that routes or counts tokens leaves out those with a negative
                number; the output there has no effect.
            aux: collects losses, metrics and counts, if given.

        Returns:
            (B, T, D), to be added to the residual stream.
        """


class EmbeddingConfig(ComponentConfig):
    """Base of an embedding's configuration."""

    def resolved(self, width: int, vocabulary: int) -> Self:
        """This configuration, checked, with every default that follows from the model filled in.

        Raises:
            ConfigError: when the embedding cannot be built for this width and vocabulary.
        """
        return self


class Embedding(Component):
    """From token ids to the residual stream. Built as ``cls(config, width, vocabulary)`` from a *resolved*
    configuration.

    ``weight`` (V, D) is what a tied head shares.
    """

    Config: ClassVar[type[EmbeddingConfig]]
    weight: Tensor

    @abstractmethod
    def forward(self, tokens_BT: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D). Segments and cache as for a :class:`Mixer`: documents do not see each other."""

    @abstractmethod
    def new_cache(self, batch: int, device: torch.device | str) -> Cache:
        """An empty cache for ``batch`` sequences."""

    def inspect(self, tokens_BT: Tensor, segments: Tensor) -> dict[str, Any]:
        """Statistics of the embedding on a sample of training rows (both (B, T)), as plain data; logged before
        training."""
        return {}

    @classmethod
    @abstractmethod
    def cost(cls, config: Any, width: int, vocabulary: int) -> Cost:
        """Accounting. Parameters that are looked up are stored and not active; active ones take part in every token."""


State = Tensor | tuple[Tensor, ...]
"""What blocks pass on: the residual stream (B, T, D), or what a residual has in its place."""


class ResidualConfig(ComponentConfig):
    """Base of a residual's configuration."""

    def resolved(self, width: int, depth: int) -> Self:
        """This configuration, checked, with every default that follows from the model filled in.

        Raises:
            ConfigError: when the residual cannot be built for this width and depth.
        """
        return self


class Residual(Component):
    """How the branches of a model, its mixers and feed-forwards, read and write what passes from block to block. One
    module per branch, built as ``cls(config, width, number)`` from a *resolved* configuration; branches are numbered
    along the depth, two per block.

    It acts on each token separately. Between blocks a :data:`State` has tensors (B, T, …) alone.
    """

    Config: ClassVar[type[ResidualConfig]]
    repeats: ClassVar[bool] = True
    """Whether blocks of equal settings cost the same wherever they are, so that a few of them tell the cost of all."""

    @classmethod
    def enter(cls, config: Any, x_BTD: Tensor) -> State:
        """The state before the first block, from the embeddings. Default: these."""
        return x_BTD

    @abstractmethod
    def forward(self, state: Any, branch: Callable[[Tensor], Tensor]) -> State:
        """The state behind a branch.

        Args:
            state: before it.
            branch: (B, T, D) -> (B, T, D), norm and multiplier included; called once.
        """

    @classmethod
    def exit(cls, config: Any, width: int) -> nn.Module:
        """A module from the last block's state to what the final norm reads, (B, T, D). Default: the state."""
        return nn.Identity()

    @staticmethod
    def stream(state: Any) -> Tensor:
        """(B, T, D) of a state, for whoever watches a model: what plays the part of the residual stream."""
        assert isinstance(state, Tensor)
        return state

    def branch_input(self, state: Any) -> Tensor:
        """What the branch reads of a state, (B, T, D)."""
        read: list[Tensor] = []

        def branch(x_BTD: Tensor) -> Tensor:
            read.append(x_BTD)
            return torch.zeros_like(x_BTD)

        self(state, branch)
        return read[0]

    def silent_obstacle(self) -> str | None:
        """Why a block whose branches write nothing is no identity; None where it is one."""
        return None

    @classmethod
    def cost(cls, config: Any, width: int, depth: int) -> Cost:
        """Accounting of all branches of a model of ``depth`` blocks and of the exit, without the branches themselves.
        Default: nothing."""
        return Cost(0, 0, 0.0)
