"""What the mixers of the delta-rule family share: one layer, whose configuration says which member it is.

    q, k, v = silu(conv(W x)), q and k L2-normalised per head, q scaled by K^-1/2
    S_t = (I - p eᵀ) Diag(exp g) S_{t-1} + p zᵀ,  o_t = S_tᵀ q_t       y = W_o [ RMSNorm_head(o) * gate(W_g x) ]

A member is a choice of p, e, z from k, v and edit gates b (erase) and w (write), each a number or a vector a head:

    sides   right: p = k,   e = b * k        two: p = e = √b * k        left: p = b * k,   e = k        z = w^power * v

and of the decay g: none, a number or a vector a head, -exp(A_log) · softplus(W_a x + dt_bias). Tied gates are one, w = b.
The power of the write gate is what makes a tied number mean the same everywhere (DeltaNet's β): 1, 1/2, 0.

Sources: DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, Kimi Delta Attention 2510.26692, GDN-2 2605.22791; FG²-GDN
2604.19021 by its abstract and second-hand notes only. The files of the members say what is whose.

Legend: B batch, T time, D model width, H heads, K key channels, V value channels, C = H(2K + V) convolved channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench import seeding
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Mixer, Range, Role, VariantConfig
from workbench.layers import Linear, RMSNorm, ShortConvolution, linear_flops
from workbench.ops.delta_rule import delta_rule, delta_rule_flops
from workbench.ops.short_convolution import Heads, short_convolution

CONV_WIDTH = 4
XAVIER_GAIN = 2**-2.5
"""Of GDN-2's initialisation (arXiv 2605.22791)."""
SAFE_STEP = 5.0
"""Nats that a token decays at most with the safe gate (flash-linear-attention's bound)."""
WATCHED = 2**16
"""Elements of a large tensor that a metric looks at."""


class DeltaRuleConfig(VariantConfig):
    """Fields that the delta-rule family shares; the defaults are Kimi Delta Attention's."""

    heads: int | None = None
    """Heads H. Default: width / head_dim."""
    head_dim: int | None = None
    """Key channels K of one head. Default: width / heads, or 128 where neither is given."""
    value_dim: int | None = None
    """Value channels V of one head. Default: K."""
    decay: Literal["none", "scalar", "channel"] = "channel"
    """Decay of the state: none, one number a head, or one a key channel."""
    decay_rank: int | None = None
    """Rank of the projection to a channel-wise decay; 0 is a full matrix. Default: V."""
    safe_gate: bool = False
    """Decay of at most 5 nats a token, -5 σ(exp(A_log) · (W x + dt_bias)), A_log starting at 0."""
    erase: Literal["scalar", "channel"] = "scalar"
    """Axis of the erase gate: one number a head, or one a key channel."""
    write: Literal["scalar", "channel"] = "scalar"
    """Axis of the write gate: one number a head, or one a value channel."""
    tied: bool = True
    """Whether erase and write gate are one gate; they then have the same axis, and K = V where that is channels."""
    sides: Literal["right", "two", "left"] = "right"
    """Where the erase gate stands in (I - p eᵀ): in e, as its root in both, or in p."""
    write_gate_power: float | None = None
    """Power of the write gate in front of v: 0, 0.5 or 1. Default: 1 (right), 0.5 (two), 0 (left)."""
    scalarise_erase: bool = False
    """The mean of the erase gate over its channels in place of the channels; as many parameters as before."""
    scalarise_write: bool = False
    """The mean of the write gate over its channels in place of the channels; as many parameters as before."""
    beta_rank: int = 0
    """Rank of the projections to channel-wise edit gates; 0 is a full matrix."""
    negative_eigenvalues: bool = False
    """Edit strength in (0, 2) instead of (0, 1): the state may flip sign along a key (arXiv 2411.12537). A gate that is one
    number for erasing and writing (right, tied, scalar) is doubled as a whole, any other only on the key's side."""
    output_gate: Literal["sigmoid", "silu", "none"] = "sigmoid"
    """Activation of the gate on the output."""
    output_gate_rank: int | None = None
    """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one. Default: V."""
    short_convolution: bool = True
    """Whether q, k and v pass a causal convolution over four tokens before their SiLU."""
    qk_norm: Literal["l2", "none"] = "l2"
    """Normalisation of q and k per head. Without it a step may stretch the state without bound."""
    initialisation: Literal["model", "xavier"] = "model"
    """How matrices start: as all others of the workbench, or Xavier-uniform with gain 2^-2.5."""
    chunk: int = 32
    """Tokens in a chunk of the training form, a power of two; changes speed and rounding, not the function."""
    backend: Literal["auto", "recurrent", "torch", "triton", "fla"] = "auto"
    """Implementation of the operation; changes speed and rounding, not the function. fla is flash-linear-attention."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"head_dim": 32},
        "340m": {"head_dim": 128},
        "1.3b": {"head_dim": 128},
    }

    def resolved(self, width: int) -> Self:
        for name in ("heads", "head_dim", "value_dim", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.at(name, got=value, expected="at least 1")
        for name in ("decay_rank", "beta_rank", "output_gate_rank"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError.at(name, got=value, expected="a rank, or 0 for a full matrix")
        if self.chunk & (self.chunk - 1):
            raise ConfigError.at("chunk", got=self.chunk, expected="a power of two")
        head_dim = self.head_dim or (width // self.heads if self.heads else min(128, width))
        heads = self.heads or width // head_dim
        if self.heads is None and width % head_dim:
            raise ConfigError.at("head_dim", got=head_dim, expected=f"a divisor of width={width}, or heads given")
        if heads < 1 or head_dim < 1:
            raise ConfigError.at("heads", got=heads, expected=f"at least one head of width {width} or less")
        value_dim = self.value_dim or head_dim
        power = self.write_gate_power
        if power is None:
            power = {"right": 1.0, "two": 0.5, "left": 0.0}[self.sides]
        if power not in (0, 0.5, 1):
            raise ConfigError.at("write_gate_power", got=power, expected="0, 0.5 or 1")
        if self.tied and self.erase != self.write:
            raise ConfigError.at(
                "write",
                got=f"{self.write!r} with erase={self.erase!r}",
                expected="one axis for tied gates",
                do="Set both, or tied: false.",
            )
        if self.tied and self.erase == "channel" and not self.scalarise_erase and power and value_dim != head_dim:
            raise ConfigError.at(
                "value_dim",
                got=value_dim,
                expected=f"head_dim ({head_dim}), since one gate of K channels scales keys and values",
                do="Leave value_dim out, or set tied: false.",
            )
        if self.tied and self.scalarise_write != self.scalarise_erase:
            raise ConfigError.at(
                "scalarise_write",
                got=self.scalarise_write,
                expected="as scalarise_erase, since the gates are tied",
                do="Set both, or tied: false.",
            )
        if not self.tied and not power:
            raise ConfigError.at(
                "write_gate_power",
                got=power,
                expected="0.5 or 1, since the write gate is its own",
                do="Set it, or tied: true.",
            )
        return self.changed(
            heads=heads,
            head_dim=head_dim,
            value_dim=value_dim,
            write_gate_power=power,
            decay_rank=value_dim if self.decay_rank is None else self.decay_rank,
            output_gate_rank=value_dim if self.output_gate_rank is None else self.output_gate_rank,
        )


class Part(NamedTuple):
    """One projection of the layer's input, straight or through ``rank`` channels."""

    channels: int
    rank: int = 0
    bias: bool = False


def parts(config: Any) -> dict[str, Part]:
    """The gates that ``config`` asks for, by name."""
    H, K, V, rank = config.heads, config.head_dim, config.value_dim, config.beta_rank
    found: dict[str, Part] = {}
    if config.decay != "none":
        found["decay"] = Part(H) if config.decay == "scalar" else Part(H * K, config.decay_rank)
    erase, write = ("edit", "edit") if config.tied else ("erase", "write")
    found[write] = Part(H) if config.write == "scalar" else Part(H * V, rank)
    found[erase] = Part(H) if config.erase == "scalar" else Part(H * K, rank)
    if config.output_gate != "none":
        found["output"] = Part(H * V, config.output_gate_rank, bias=config.output_gate_rank > 0)
    return found


class Stacked(Linear):
    """Several projections of one input in one product. Each starts by its own name, and so the same whatever stands beside it.

    Args:
        sizes: output channels by name.
        xavier: start Xavier-uniform with GDN-2's gain.
    """

    def __init__(self, d_in: int, sizes: Mapping[str, int], *, xavier: bool, **more: Any):
        super().__init__(d_in, sum(sizes.values()), **more)
        self.sizes, self.xavier = dict(sizes), xavier

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        for part, piece in zip(self.sizes, parameter.split(list(self.sizes.values()))):
            own = seeding.generator(generator.initial_seed(), part)
            if self.xavier and name == "weight":
                bound = XAVIER_GAIN * math.sqrt(6 / (self.in_features + len(piece)))
                piece.uniform_(-bound, bound, generator=own)
            else:
                super().init_parameter(name, piece, own)


def _projection(d_in: int, sizes: Mapping[str, int], xavier: bool, **more: Any) -> Linear:
    """One product; without Xavier it starts as any other mixer's of its name and shape."""
    return Stacked(d_in, sizes, xavier=True, **more) if xavier else Linear(d_in, sum(sizes.values()), **more)


class Gates(nn.Module):
    """All gates of a layer: one product with the input, and one more for each that is of low rank."""

    def __init__(self, width: int, parts: Mapping[str, Part], xavier: bool):
        super().__init__()
        self.first = Stacked(width, {name: part.rank or part.channels for name, part in parts.items()}, xavier=xavier)
        self.second = nn.ModuleDict(
            {
                name: Stacked(part.rank, {name: part.channels}, xavier=xavier, bias=part.bias)
                for name, part in parts.items()
                if part.rank
            }
        )

    def forward(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Name -> (B, T, channels), before any activation."""
        pieces = self.first(x_BTD).split(list(self.first.sizes.values()), dim=-1)
        return {
            name: self.second[name](piece) if name in self.second else piece
            for name, piece in zip(self.first.sizes, pieces)
        }


class DeltaCache(Cache):
    """``state_BHKV`` (fp32) and ``tail_BWC``, the last W - 1 inputs of the short convolution (W = 1 without one)."""

    def __init__(self, state_BHKV: Tensor, tail_BWC: Tensor):
        self.state_BHKV, self.tail_BWC, self.length = state_BHKV, tail_BWC, 0

    def tensors(self) -> list[Tensor]:
        return [self.state_BHKV, self.tail_BWC]


class DeltaRuleMixer(Mixer):
    """A layer of the family; constant state in decode."""

    capabilities = Capabilities(flops_check="forward")
    roles = {"A_log": Role.VECTOR, "dt_bias": Role.VECTOR}

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        H, K, V = self.H, self.K, self.V = config.heads, config.head_dim, config.value_dim
        xavier = config.initialisation == "xavier"
        self.qkv = _projection(width, {"q": H * K, "k": H * K, "v": H * V}, xavier)
        self.conv = ShortConvolution(H * (2 * K + V), CONV_WIDTH) if config.short_convolution else None
        self.gates = Gates(width, parts(config), xavier)
        if config.decay != "none":
            self.A_log = nn.Parameter(torch.empty(H))
            self.dt_bias = nn.Parameter(torch.empty(H if config.decay == "scalar" else H * K))
        self.norm = RMSNorm(V)
        self.out = _projection(H * V, {"out": width}, xavier, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "A_log" and self.config.safe_gate:
            parameter.zero_()
        elif name == "A_log":  # exp(A_log) uniform; a number a head from 1e-4, not 0: the logarithm must be finite
            lowest = 1e-4 if self.config.decay == "scalar" else 1.0
            parameter.uniform_(lowest, 16.0, generator=generator).log_()
        else:  # dt_bias: softplus(dt_bias) is log-uniform in (0.001, 0.1)
            step = parameter.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp().clamp_min(1e-4)
            parameter.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        config, H, K, V = self.config, self.H, self.K, self.V
        assert cache is None or isinstance(cache, DeltaCache)
        raw_BTC = self.qkv(x_BTD)
        tail_BWC = None if cache is None else cache.tail_BWC
        q_length, k_length = (K**-0.5, 1.0) if config.qk_norm == "l2" else (None, None)
        heads = (Heads(H, K, q_length), Heads(H, K, k_length), Heads(H, V))
        if self.conv is None:  # one token wide
            q_BTHK, k_BTHK, v_BTHV = short_convolution(raw_BTC, raw_BTC.new_ones(raw_BTC.shape[-1], 1), heads)
        else:
            q_BTHK, k_BTHK, v_BTHV = self.conv(raw_BTC, heads, segments=segments, tail_BWC=tail_BWC)
        if config.qk_norm != "l2":
            q_BTHK = q_BTHK * K**-0.5
        raw = self.gates(x_BTD)
        g = self._log_decay(raw.get("decay"))
        write_key_BTHK, erase_key_BTHK, value_BTHV, beta_BTH = self._edit(k_BTHK, v_BTHV, *self._log_gates(raw))
        o_BTHV, state_BHKV = delta_rule(
            q_BTHK,
            write_key_BTHK,
            value_BTHV,
            g,
            erase_key_BTHK=erase_key_BTHK,
            beta_BTH=beta_BTH,
            segments=segments,
            state_BHKV=None if cache is None else cache.state_BHKV,
            chunk=config.chunk,
            backend=config.backend,
        )
        if cache is not None:
            cache.state_BHKV = state_BHKV
            if self.conv is not None:
                cache.tail_BWC = self.conv.next_tail(raw_BTC, cache.tail_BWC)
            cache.length += x_BTD.shape[1]
        if aux is not None and aux.collect_metrics:
            self._watch(aux, raw, g, state_BHKV, write_key_BTHK, erase_key_BTHK, beta_BTH)
        y = self.norm(o_BTHV.to(x_BTD.dtype)).flatten(-2)
        if config.output_gate != "none":
            y = y * (F.silu if config.output_gate == "silu" else torch.sigmoid)(raw["output"])
        return self.out(y)

    def _log_decay(self, raw: Tensor | None) -> Tensor | None:
        """(B, T, H) or (B, T, H, K), fp32 whatever the model's type: small steps decide what is remembered."""
        if raw is None:
            return None
        wide = torch.promote_types(raw.dtype, torch.float32)
        step = (raw.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (self.H, -1))
        rate_H1 = self.A_log.to(wide).exp()[:, None]
        # -softplus(x) = logsigmoid(-x); softplus's own traced gradient has wrong strides
        g = -SAFE_STEP * torch.sigmoid(rate_H1 * step) if self.config.safe_gate else rate_H1 * F.logsigmoid(-step)
        return g[..., 0] if self.config.decay == "scalar" else g

    def _log_gates(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logarithms of the erase and the write gate, (B, T, H, 1 or channels), fp32: powers of a gate that has underflowed
        keep a finite gradient."""

        def log_gate(name: str, mean: bool) -> Tensor:
            x = raw[name]
            log = F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))).unflatten(-1, (self.H, -1))
            return log.logsumexp(-1, keepdim=True) - math.log(log.shape[-1]) if mean else log

        config = self.config
        erase = log_gate("edit" if config.tied else "erase", config.scalarise_erase)
        return erase, erase if config.tied else log_gate("write", config.scalarise_write)

    def _edit(
        self, k_BTHK: Tensor, v_BTHV: Tensor, erase: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """p, e (None for p), z and strength (None for 1) of the operation, from keys, values and log-gates."""
        config = self.config
        if config.negative_eigenvalues:
            erase = erase + math.log(2)
        power = config.write_gate_power
        if config.sides == "right" and config.tied and power == 1 and erase.shape[-1] == 1:
            return k_BTHK, None, v_BTHV, erase[..., 0].exp()
        value_BTHV = _scaled(v_BTHV, write, power) if power else v_BTHV
        if config.sides == "two":
            return _scaled(k_BTHK, erase, 0.5), None, value_BTHV, None
        gated_BTHK = _scaled(k_BTHK, erase, 1)
        return (
            (k_BTHK, gated_BTHK, value_BTHV, None)
            if config.sides == "right"
            else (gated_BTHK, k_BTHK, value_BTHV, None)
        )

    @torch.no_grad()
    def _watch(
        self,
        aux: AuxOutputs,
        raw: Mapping[str, Tensor],
        g: Tensor | None,
        state_BHKV: Tensor,
        write_key_BTHK: Tensor,
        erase_key_BTHK: Tensor | None,
        beta_BTH: Tensor | None,
    ) -> None:
        """What a dashboard can show: state, memory in tokens, gates, and how far one edit can stretch the state."""
        metrics = aux.metrics
        metrics["state_norm"] = state_BHKV.norm(dim=(-2, -1)).mean()
        if g is not None:
            _spread(metrics, "half_life", math.log(0.5) / g.clamp_max(-1e-6))
        for name in ("edit", "erase", "write"):
            if name in raw:
                _spread(metrics, f"{name}_gate", raw[name].float().sigmoid())
        erase_key_BTHK = write_key_BTHK if erase_key_BTHK is None else erase_key_BTHK
        if beta_BTH is not None:
            erase_key_BTHK = beta_BTH[..., None] * erase_key_BTHK
        metrics["step_norm"] = step_norm(write_key_BTHK.float(), erase_key_BTHK.float()).max()

    # No rescaling pairs: q, k and v pass a SiLU (and q and k an L2 norm), o an RMS norm.

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> DeltaCache:
        wide = torch.promote_types(dtype, torch.float32)
        past = CONV_WIDTH - 1 if self.config.short_convolution else 0
        return DeltaCache(
            torch.zeros(batch, self.H, self.K, self.V, device=device, dtype=wide),
            torch.zeros(batch, past, self.H * (2 * self.K + self.V), device=device, dtype=dtype),
        )

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, K, V = config.heads, config.head_dim, config.value_dim
        C = H * (2 * K + V)
        matrices, vectors = [(width, C), (H * V, width)], V
        for part in parts(config).values():
            matrices += [(width, part.rank), (part.rank, part.channels)] if part.rank else [(width, part.channels)]
            vectors += part.channels if part.bias else 0
        if config.decay != "none":
            vectors += H + (H if config.decay == "scalar" else H * K)
        convolution = CONV_WIDTH * C if config.short_convolution else 0
        parameters = sum(a * b for a, b in matrices) + vectors + convolution
        by_channel = config.decay == "channel"
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops(*matrices) + delta_rule_flops(H, K, V, length, config.chunk, by_channel=by_channel),
            cache_bytes=4 * H * K * V + (element_bytes * (CONV_WIDTH - 1) * C if config.short_convolution else 0),
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {
            "negative_eigenvalues": Range(values=(False, True)),
            "output_gate": Range(values=("sigmoid", "silu", "none")),
        }


def step_norm(p: Tensor, e: Tensor) -> Tensor:
    """(…) largest singular value of I - p eᵀ, which bounds one step of the state: the decay only makes it smaller.

    Off the plane of p and e the matrix is the identity; on it, its singular values σ1 σ2 = |1 - p·e| and
    σ1² + σ2² = 2 - 2 p·e + |p|²|e|².
    """
    across, square = (p * e).sum(-1), p.square().sum(-1) * e.square().sum(-1)
    half = 1 - across + 0.5 * square
    return (half + (half.square() - (1 - across).square()).clamp_min(0).sqrt()).clamp_min(1).sqrt()


def _scaled(x: Tensor, log_gate: Tensor, power: float) -> Tensor:
    """gate^power * x, in the type of ``x``."""
    return (x * (log_gate if power == 1 else power * log_gate).exp()).to(x.dtype)


def _spread(metrics: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Mean, and the tenth and ninetieth percentile of a sample."""
    sample = x.flatten()[:: max(1, x.numel() // WATCHED)].float()
    low, median, high = sample.quantile(torch.tensor([0.1, 0.5, 0.9], device=x.device))
    metrics.update({f"{name}_low": low, name: median, f"{name}_high": high})
