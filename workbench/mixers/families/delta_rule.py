"""The delta-rule family: one layer, whose configuration selects the member.

    q, k, v = silu(conv(W x)), q and k L2-normalised per head, q scaled by K^-1/2
    S_t = (I - p eᵀ) Diag(exp g) S_{t-1} + p zᵀ,  o_t = S_tᵀ q_t       y = W_o [ RMSNorm_head(o) * gate(W_g x) ]

A member defines the write key p, the erase key e and the value z from k, v and the edit gates b (erase) and w (write),
each a number or a vector per head. The erase gate acts on

    key       p = k,            e = b * k,   z = w * v
    both      p = e = √b * k,                z = √w * v
    address   p = b * k,        e = k,       z = v

The decay g is none, a number or a vector per head, -exp(A_log) · softplus(W_a x + dt_bias). Tied gates are one gate,
w = b. The power of the write gate (1, 1/2, 0) gives a tied scalar gate the same effect in all three: DeltaNet's β.

Sources: DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, Kimi Delta Attention 2510.26692, GDN-2 2605.22791,
FG²-GDN 2604.19021. The members' files say what is published and what is ours.

Legend: B batch, T time, D model width, H heads, K key channels, V value channels, C = H(2K + V) convolved channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench import seeding
from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Range, Role
from workbench.layers import Linear, RMSNorm, ShortConvolution, linear_flops, softplus
from workbench.mixers.families.recurrent import (
    CONV_WIDTH,
    RecurrentConfig,
    RecurrentMixer,
    StateCache,
    fill_time_steps,
    record_state,
)
from workbench.ops.delta_rule import delta_rule, delta_rule_flops
from workbench.ops.short_convolution import Heads, short_convolution
from workbench.pooled import is_token, maximum_of, quantiles_of

XAVIER_GAIN = 2**-2.5
"""Of GDN-2's initial values (arXiv 2605.22791)."""
MAX_DECAY = 5.0
"""Largest decay per token, in nats, with ``bounded_decay`` (flash-linear-attention's bound)."""
WRITE_POWER = {"key": 1.0, "both": 0.5, "address": 0.0}
"""``erase_gate_on`` -> power of the write gate that multiplies the values."""


class DeltaRuleConfig(RecurrentConfig):
    """Fields that the delta-rule family shares; the defaults are Kimi Delta Attention's."""

    heads: Annotated[int | None, Field(ge=1)] = None
    """Heads H. Default: width / head_dim."""
    head_dim: Annotated[int | None, Field(ge=1)] = None
    """Key channels K per head. Default: width / heads, or 128 where neither is given."""
    value_dim: Annotated[int | None, Field(ge=1)] = None
    """Value channels V per head. Default: K."""
    decay: Literal["none", "scalar", "channel"] = "channel"
    """Decay of the state: none, one number per head, or one per key channel."""
    decay_rank: Annotated[int | None, Field(ge=0)] = None
    """Rank of the projection to a channel-wise decay; 0 is a full matrix. Default: V."""
    bounded_decay: bool = False
    """Decay of at most 5 nats per token, -5 σ(exp(A_log) · (W x + dt_bias)), with A_log starting at 0."""
    erase: Literal["scalar", "channel"] = "scalar"
    """Axis of the erase gate: one number per head, or one per key channel."""
    write: Literal["scalar", "channel"] = "scalar"
    """Axis of the write gate: one number per head, or one per value channel."""
    tied: bool = True
    """Whether erase and write gate are one gate; they then have the same axis, and K = V where that is channels."""
    erase_gate_on: Literal["key", "both", "address"] = "key"
    """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e, both by its root, or the write key p."""
    negative_eigenvalues: bool = False
    """Edit strength in (0, 2) instead of (0, 1): the state may flip sign along a key (arXiv 2411.12537). A gate that is
    one number for erasing and writing (key, tied, scalar) is doubled as a whole, any other only in the erasure."""
    output_gate: Literal["sigmoid", "silu", "none"] = "sigmoid"
    """Activation of the gate on the output."""
    output_gate_rank: Annotated[int | None, Field(ge=0)] = None
    """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one. Default:
    V."""
    short_convolution: bool = True
    """Whether q, k and v pass a causal convolution over four tokens before their SiLU."""
    qk_norm: Literal["l2", "none"] = "l2"
    """Normalisation of q and k per head. Without it a step may stretch the state without bound."""
    initialisation: Literal["model", "xavier"] = "model"
    """Initial values of the matrices: those of all other variants, or Xavier-uniform with gain 2^-2.5."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"head_dim": 32},
        "340m": {"head_dim": 128},
        "1.3b": {"head_dim": 128},
    }

    def resolved(self, width: int) -> Self:
        super().resolved(width)
        head_dim = self.head_dim or (width // self.heads if self.heads else min(128, width))
        require(
            self.heads or (head_dim and width % head_dim == 0),
            "head_dim",
            got=head_dim,
            expected=f"a divisor of width={width}, or heads given",
        )
        heads = self.heads or width // head_dim
        require(
            heads >= 1 and head_dim >= 1, "heads", got=heads, expected=f"at least one head of width {width} or less"
        )
        value_dim = self.value_dim or head_dim
        require(
            not self.tied or self.erase == self.write,
            "write",
            got=f"{self.write!r} with erase={self.erase!r}",
            expected="one axis for tied gates",
            do="Set both, or tied: false.",
        )
        writes = WRITE_POWER[self.erase_gate_on] > 0
        require(
            not (self.tied and self.erase == "channel" and writes) or value_dim == head_dim,
            "value_dim",
            got=value_dim,
            expected=f"head_dim ({head_dim}), since one gate of K channels scales keys and values",
            do="Leave value_dim out, or set tied: false.",
        )
        require(
            self.tied or writes,
            "erase_gate_on",
            got=self.erase_gate_on,
            expected="key or both, since the write gate is a gate of its own",
            do="Set it, or tied: true.",
        )
        bounded = self.qk_norm == "l2" and not self.negative_eigenvalues
        require(
            bounded or self.backend != "cudnn_truncated",
            "backend",
            got=f"cudnn_truncated with qk_norm={self.qk_norm!r}, negative_eigenvalues={self.negative_eigenvalues}",
            expected="keys of norm 1 and an edit strength of at most 1, which its truncation assumes",
            do="Use backend: auto.",
        )
        return self.changed(
            heads=heads,
            head_dim=head_dim,
            value_dim=value_dim,
            decay_rank=value_dim if self.decay_rank is None else self.decay_rank,
            output_gate_rank=value_dim if self.output_gate_rank is None else self.output_gate_rank,
        )


class LowRankEditsConfig(DeltaRuleConfig):
    """And the rank of gates with one number per channel."""

    edit_rank: Annotated[int | None, Field(ge=0)] = None
    """Rank of the projections to gates with one number per channel; 0 is a full matrix. Default: V."""

    def canonical(self) -> dict[str, Any]:
        plain = super().canonical()
        if self.edit_rank == 0:
            del plain["edit_rank"]  # full matrices, as before there was a rank
        return plain

    def resolved(self, width: int) -> Self:
        config = super().resolved(width)
        return config.changed(edit_rank=config.value_dim if self.edit_rank is None else self.edit_rank)


class GateShape(NamedTuple):
    """One projection of the layer's input to a gate, direct or through ``rank`` channels."""

    channels: int
    rank: int = 0
    bias: bool = False


class StackedLinear(Linear):
    """Several projections of one input in one matrix product. The initial values of each depend on its name, not on the
    others.

    Args:
        d_in: input channels.
        sizes: output channels by name.
        xavier: initialise Xavier-uniform with GDN-2's gain.
        options: as for :class:`workbench.layers.Linear`.
    """

    def __init__(self, d_in: int, sizes: Mapping[str, int], *, xavier: bool, **options: Any):
        parts = options.pop("parts", tuple((1, channels) for channels in sizes.values()))
        super().__init__(d_in, sum(sizes.values()), parts=parts, **options)
        self.sizes, self.xavier = dict(sizes), xavier

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        for part, piece in zip(self.sizes, parameter.split(list(self.sizes.values()))):
            part_generator = seeding.generator(generator.initial_seed(), part)
            if self.xavier and name == "weight":
                bound = XAVIER_GAIN * math.sqrt(6 / (self.in_features + len(piece)))
                piece.uniform_(-bound, bound, generator=part_generator)
            else:
                super().init_parameter(name, piece, part_generator)


def _projection(d_in: int, sizes: Mapping[str, int], xavier: bool, **options: Any) -> Linear:
    """One matrix product; unless Xavier, initialised as any other mixer's of its name and shape."""
    if xavier:
        return StackedLinear(d_in, sizes, xavier=True, **options)
    return Linear(d_in, sum(sizes.values()), **options)


class Gates(nn.Module):
    """All gates of a layer: one product with the input, and a second one for each gate of low rank."""

    def __init__(self, width: int, shapes: Mapping[str, GateShape], xavier: bool):
        super().__init__()
        first = {name: shape.rank or shape.channels for name, shape in shapes.items()}
        self.first = StackedLinear(width, first, xavier=xavier)
        self.second = nn.ModuleDict(
            {
                name: StackedLinear(shape.rank, {name: shape.channels}, xavier=xavier, bias=shape.bias)
                for name, shape in shapes.items()
                if shape.rank
            }
        )
        for projection in (self.first, *self.second.values()):
            assert isinstance(projection, Linear)
            projection.sensitive = True  # decay and write strength compound over a whole document

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Name -> (B, T, channels), before any activation."""
        pieces = self.first(x_BTD).split(list(self.first.sizes.values()), dim=-1)
        return {
            name: self.second[name](piece) if name in self.second else piece
            for name, piece in zip(self.first.sizes, pieces)
        }


class Operands(NamedTuple):
    """Arguments of :func:`workbench.ops.delta_rule.delta_rule`, n edits a token."""

    q_BTHK: Tensor
    write_key: Tensor
    """(B, T, nH, K)."""
    value: Tensor
    """(B, T, nH, V)."""
    g: Tensor | None
    """(B, T, H) or (B, T, H, K), or None."""
    erase_key: Tensor | None
    """(B, T, nH, K), or None: the write key."""
    beta: Tensor | None
    """(B, T, nH), or None: 1."""


def one_by_one(operands: Operands, n: int) -> Operands:
    """n edits a token as one edit at each of nT tokens: the decay acts at the first of a token's n, the query reads
    after the last."""
    H = operands.q_BTHK.shape[2]

    def by_edit(x: Tensor | None) -> Tensor | None:  # (B, T, nH, …) -> (B, nT, H, …)
        return None if x is None else x.unflatten(2, (n, H)).flatten(1, 2)

    def at(x: Tensor, edit: int) -> Tensor:  # (B, T, H, …) -> (B, nT, H, …), zero but at one edit
        padded = x.new_zeros(*x.shape[:2], n, *x.shape[2:])
        padded[:, :, edit] = x
        return padded.flatten(1, 2)

    q_BTHK, write_key, value, g, erase_key, beta = operands
    keys, values = by_edit(write_key), by_edit(value)
    assert keys is not None and values is not None
    decay = None if g is None else at(g, 0)
    return Operands(at(q_BTHK, -1), keys, values, decay, by_edit(erase_key), by_edit(beta))


def erase_and_write(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    erased_BTHK: Tensor,
    erase_key_BTHK: Tensor,
    *,
    segments: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """S_t = (Diag(exp g) - p eᵀ) S_{t-1} + k vᵀ, o_t = S_tᵀ q_t, as two edits a token: the first decays and erases,
    with the erase key e exp(-g) since the decay comes first; the second writes.

    Args:
        erased_BTHK: p.
        erase_key_BTHK: e.
        segments: (B, T) document numbers.
        options: further ones of :func:`workbench.ops.delta_rule.delta_rule`.

    Returns:
        as of :func:`workbench.ops.delta_rule.delta_rule`, computed in the type of ``q_BTHK``.
    """
    edits = Operands(
        q_BTHK,
        torch.cat((erased_BTHK, k_BTHK), dim=2),
        torch.cat((torch.zeros_like(v_BTHV), v_BTHV), dim=2),
        g_BTHK,
        torch.cat((erase_key_BTHK * (-g_BTHK).exp(), torch.zeros_like(k_BTHK)), dim=2),
        None,
    )
    q, write_key, value, g, erase_key, _ = one_by_one(edits, 2)
    assert erase_key is not None
    o_BTHV, state_BHKV = delta_rule(
        q,
        write_key.to(q.dtype),
        value.to(q.dtype),
        g,
        erase_key_BTHK=erase_key.to(q.dtype),
        segments=None if segments is None else segments.repeat_interleave(2, dim=1),
        **options,
    )
    return o_BTHV[:, 1::2], state_BHKV


class DeltaRuleMixer(RecurrentMixer):
    """A layer of the family.

    A member may change the parts: the convolved heads (:meth:`heads`), the gates (:meth:`gate_shapes`), what they make
    of keys and values (:meth:`edit`), the operation on the state (:meth:`operate`).
    """

    capabilities = Capabilities(flops_check="forward")
    roles = {"A_log": Role.VECTOR, "dt_bias": Role.VECTOR}

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        H, K, V = self.H, self.K, self.V = config.heads, config.head_dim, config.value_dim
        xavier = config.initialisation == "xavier"
        n = self.edits(config)
        parts = (H, K), (n * H, K), (n * H, V)
        sizes = {name: heads * channels for name, (heads, channels) in zip("qkv", parts)}
        self.qkv = _projection(width, sizes, xavier, parts=parts)
        self.conv = ShortConvolution(sum(sizes.values()), CONV_WIDTH) if config.short_convolution else None
        self.gates = Gates(width, self.gate_shapes(config), xavier)
        if config.decay != "none":
            self.A_log = nn.Parameter(torch.empty(H))
            self.dt_bias = nn.Parameter(torch.empty(H if config.decay == "scalar" else H * K))
        self.cached_shapes = (H, K, V), (0 if self.conv is None else CONV_WIDTH - 1, sum(sizes.values()))
        self.norm = RMSNorm(V)
        self.out = _projection(H * V, {"out": width}, xavier, writes_residual=True)

    @classmethod
    def edits(cls, config: Any) -> int:
        """Edits n of the state at every token, each with its key, value and edit gates."""
        return 1

    @classmethod
    def gate_shapes(cls, config: Any) -> dict[str, GateShape]:
        """The gates of ``config``, by name."""
        H, K, V, n = config.heads, config.head_dim, config.value_dim, cls.edits(config)
        shapes: dict[str, GateShape] = {}
        if config.decay != "none":
            shapes["decay"] = GateShape(H) if config.decay == "scalar" else GateShape(H * K, config.decay_rank)
        erase, write = ("edit", "edit") if config.tied else ("erase", "write")
        rank = getattr(config, "edit_rank", 0)
        shapes[write] = GateShape(n * H) if config.write == "scalar" else GateShape(n * H * V, rank)
        shapes[erase] = GateShape(n * H) if config.erase == "scalar" else GateShape(n * H * K, rank)
        if config.output_gate != "none":
            shapes["output"] = GateShape(H * V, config.output_gate_rank, bias=config.output_gate_rank > 0)
        return shapes

    def transfer_constants(self) -> dict[str, float]:
        # Xavier's variance follows the sum of fan-in and fan-out
        return {"initialisation": self.qkv.in_features} if self.config.initialisation == "xavier" else {}

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "A_log" and self.config.bounded_decay:
            parameter.zero_()
        elif name == "A_log":  # exp(A_log) uniform, per head from 1e-4 instead of 0: the logarithm must be finite
            lowest = 1e-4 if self.config.decay == "scalar" else 1.0
            parameter.uniform_(lowest, 16.0, generator=generator).log_()
        else:
            fill_time_steps(parameter, generator)

    def rescaling_obstacles(self) -> dict[str, str]:
        qk = "keys enter the delta rule twice, to erase and to write"
        if self.config.qk_norm == "l2":
            qk = "queries and keys are scaled to unit length, which undoes any scale"
        return {"qk": qk, "vo": "the RMS norm between the heads and `out` undoes any scale of the values"}

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        config = self.config
        assert cache is None or isinstance(cache, StateCache)
        raw_BTC = self.qkv(x_BTD)
        tail_BWC = None if cache is None or cache.is_empty else cache.tail_BWC
        q_BTHK, k, v = self.heads(raw_BTC, segments, tail_BWC)
        raw = self.gates(x_BTD)
        g = self.log_decay(raw.get("decay"))
        write_key, erase_key, value, beta = self.edit(k, v, *self._log_gates(raw))
        operands = Operands(q_BTHK, write_key, value, g, erase_key, beta)
        o_BTHV, state_BHKV = self.operate(operands, raw, segments, cache)
        if cache is not None:
            assert state_BHKV is not None
            tail_BWC = cache.tail_BWC if self.conv is None else self.conv.next_tail(raw_BTC, cache.tail_BWC)
            cache.update(x_BTD.shape[1], state_BHKV, tail_BWC)
        if aux is not None and aux.collect_metrics:
            self.record_metrics(aux, raw, state_BHKV, operands, segments)
        y = self.norm(o_BTHV.to(x_BTD.dtype)).flatten(-2)
        if config.output_gate != "none":
            y = y * (F.silu if config.output_gate == "silu" else torch.sigmoid)(raw["output"])
        return self.out(y)

    def heads(
        self, raw_BTC: Tensor, segments: Tensor | None, tail_BWC: Tensor | None, *, normalise: bool = True
    ) -> list[Tensor]:
        """q (B, T, H, K), k (B, T, nH, K) and v (B, T, nH, V), convolved.

        Args:
            raw_BTC: inputs of the convolution.
            segments: (B, T) document numbers.
            tail_BWC: the inputs before them, from a cache.
            normalise: scale q and k as configured; q also by K^-1/2.
        """
        H, K, V, n = self.H, self.K, self.V, self.edits(self.config)
        unit = normalise and self.config.qk_norm == "l2"
        q_length, k_length = (K**-0.5, 1.0) if unit else (None, None)
        parts = (Heads(H, K, q_length), Heads(n * H, K, k_length), Heads(n * H, V))
        if self.conv is None:  # one token wide
            q_BTHK, k, v = short_convolution(raw_BTC, raw_BTC.new_ones(raw_BTC.shape[-1], 1), parts)
        else:
            q_BTHK, k, v = self.conv(raw_BTC, parts, segments=segments, tail_BWC=tail_BWC)
        if normalise and not unit:
            q_BTHK = q_BTHK * K**-0.5
        return [q_BTHK, k, v]

    def operate(
        self, operands: Operands, raw: Mapping[str, Tensor], segments: Tensor | None, cache: StateCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H, V), and the state after the last token (B, H, K, V), which may be None without a cache.

        Args:
            operands: of the recurrence.
            raw: gates before any activation, for members with further ones.
            segments: (B, T) document numbers.
            cache: with the state before the first token; a member with further states updates them here.
        """
        q_BTHK, write_key, value, g, erase_key, beta = operands
        return delta_rule(
            q_BTHK,
            write_key,
            value,
            g,
            erase_key_BTHK=erase_key,
            beta_BTH=beta,
            **self.operation_options(segments, cache),
        )

    def log_decay(self, raw: Tensor | None) -> Tensor | None:
        """(B, T, H) or (B, T, H, K), fp32 whatever the model's type: small decays decide what is remembered."""
        if raw is None:
            return None
        wide = torch.promote_types(raw.dtype, torch.float32)
        step = (raw.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.H, -1))
        rate_H1 = self.A_log.to(wide).exp()[:, None]
        g = -MAX_DECAY * torch.sigmoid(rate_H1 * step) if self.config.bounded_decay else -rate_H1 * softplus(step)
        return g[..., 0] if self.config.decay == "scalar" else g

    def _log_gates(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logarithms of the erase and the write gate, (B, T, nH, 1 or channels), fp32: powers of a gate that has
        underflowed keep a finite gradient."""

        heads = self.edits(self.config) * self.H

        def log_gate(name: str) -> Tensor:
            x = raw[name]
            return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))).unflatten(-1, (heads, -1))

        if self.config.tied:
            gate = log_gate("edit")
            return gate, gate
        return log_gate("erase"), log_gate("write")

    def edit(
        self, k_BTHK: Tensor, v_BTHV: Tensor, erase: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Write key, erase key (None: the write key), value and beta (None: 1) from keys, values and log-gates."""
        config = self.config
        if config.negative_eigenvalues:
            erase = erase + math.log(2)
        if config.erase_gate_on == "key" and config.tied and erase.shape[-1] == 1:
            return k_BTHK, None, v_BTHV, erase[..., 0].exp()
        power = WRITE_POWER[config.erase_gate_on]
        value_BTHV = _scaled(v_BTHV, write, power) if power else v_BTHV
        if config.erase_gate_on == "both":
            return _scaled(k_BTHK, erase, 0.5), None, value_BTHV, None
        gated_BTHK = _scaled(k_BTHK, erase, 1)
        if config.erase_gate_on == "key":
            return k_BTHK, gated_BTHK, value_BTHV, None
        return gated_BTHK, k_BTHK, value_BTHV, None

    @torch.no_grad()
    def record_metrics(
        self,
        aux: AuxOutputs,
        raw: Mapping[str, Tensor],
        state_BHKV: Tensor | None,
        operands: Operands,
        segments: Tensor | None,
    ) -> None:
        """Norm of the state at the end of rows, where it is known, half-life in tokens, gates, and the largest factor
        by which one edit stretches the state. Padding does not count, nor do rows that end with it."""
        record_state(aux, state_BHKV, operands.g, segments)
        for name in ("edit", "erase", "write"):
            if name in raw:
                gate = raw[name].float().sigmoid()
                aux.metrics.update(quantiles_of(f"{name}_gate", gate, is_token(segments, gate.dim() - 2)))
        write_key = operands.write_key
        erase_key = write_key if operands.erase_key is None else operands.erase_key
        if operands.beta is not None:
            erase_key = operands.beta[..., None] * erase_key
        norm_BTH = step_norm(write_key.float(), erase_key.float())
        aux.metrics["step_norm"] = maximum_of(norm_BTH, is_token(segments, 1))

    # No rescaling pairs: q, k and v pass a SiLU (and q and k an L2 norm), o an RMS norm.

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, K, V, n = config.heads, config.head_dim, config.value_dim, cls.edits(config)
        C = H * (K + n * (K + V))
        matrices, vectors = [(width, C), (H * V, width)], V
        for gate in cls.gate_shapes(config).values():
            matrices += [(width, gate.rank), (gate.rank, gate.channels)] if gate.rank else [(width, gate.channels)]
            vectors += gate.channels if gate.bias else 0
        if config.decay != "none":
            vectors += H + (H if config.decay == "scalar" else H * K)
        convolution = CONV_WIDTH * C if config.short_convolution else 0
        parameters = sum(a * b for a, b in matrices) + vectors + convolution
        by_channel = config.decay == "channel"
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops(*matrices)
            + n * delta_rule_flops(H, K, V, n * length, config.chunk, by_channel=by_channel),
            cache_bytes=4 * H * K * V + (element_bytes * (CONV_WIDTH - 1) * C if config.short_convolution else 0),
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {
            "negative_eigenvalues": Range(values=(False, True)),
            "output_gate": Range(values=("sigmoid", "silu", "none")),
        }


def step_norm(p: Tensor, e: Tensor) -> Tensor:
    """(…) largest singular value of I - p eᵀ, which bounds one step of the state: the decay only shrinks it further.

    Off the plane of p and e the matrix is the identity; on it, its singular values σ1 σ2 = |1 - p·e| and
    σ1² + σ2² = 2 - 2 p·e + |p|²|e|².
    """
    dot, square = (p * e).sum(-1), p.square().sum(-1) * e.square().sum(-1)
    half = 1 - dot + 0.5 * square
    return (half + (half.square() - (1 - dot).square()).clamp_min(0).sqrt()).clamp_min(1).sqrt()


def _scaled(x: Tensor, log_gate: Tensor, power: float) -> Tensor:
    """gate^power * x, in the type of ``x``."""
    return (x * (log_gate if power == 1 else power * log_gate).exp()).to(x.dtype)
