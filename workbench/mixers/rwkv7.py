"""RWKV-7 time mixing (arXiv 2503.14456): a delta rule that erases along one key and writes along another.

    v ← v + σ(ν) (v¹ - v),  v¹ of the first layer          κ̂ = unit(κ * k),  k̃ = k * (1 + α (a - 1))
    S_t = (Diag(w) - (a * κ̂) κ̂ᵀ) S_{t-1} + k̃ vᵀ            o_t = S_tᵀ r_t
    y = W_o [ (LayerNorm_head(o) + (r · (ρ * k̃)) v) * g ]

r, k, v, w, a and g each see another mixture of a token with the one before; w = exp(-0.606 σ(.)) lies in (0.545, 1),
a = σ(.) in (0, 1); w, a, ν and g come through low ranks, ν from v's mixture.

Published: all of it, with the initial values of α, ρ, κ and ν and the ranks as in public code (flash-linear-attention).
Ours: initial values that depend on a layer's number in that code (mixtures, decay) take those of the middle of the
model; the gains of the norm start at 1, and matrices as everywhere here. The first layer of this kind gives its values;
there ν has no effect, so that ``value_residual: false`` saves its parameters.

Legend: B batch, T time, D model width, H heads, K channels of a head, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Cost, Range, Role, Shared, Taken, mixers
from workbench.layers import linear_flops
from workbench.mixers.families.delta_rule import erase_and_write
from workbench.mixers.families.recurrent import RecurrentConfig, StateCache, record_state
from workbench.mixers.families.rwkv import LowRank, TimeMixing, places
from workbench.ops.delta_rule import delta_rule_flops
from workbench.ops.short_convolution import to_length

EXPONENTS = {"r": 0.1, "w": 0.45, "k": 0.35, "v": 0.35, "a": 0.45, "g": 0.1}
"""Of the initial mixtures."""
LARGEST_DECAY = math.exp(-0.5)
"""Nats per token."""
VALUES = "values of rwkv7"
"""Name of the values that later layers mix in."""
ACTIVATIONS = {"decay": torch.tanh, "gate": torch.sigmoid}
RANKS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}
"""Projection of low rank -> its default rank divided by √width, at 64 channels of a head."""


@mixers.register
class RWKV7(TimeMixing):
    """RWKV-7 time mixing."""

    key_scale: Tensor
    key_rate: Tensor
    bonus: Tensor
    vectors = ("key_scale", "key_rate", "bonus", "decay_bias", "rate_bias", "value_bias")
    roles = dict.fromkeys(vectors, Role.VECTOR)
    conformance_cases = (
        {},
        {"head_dim": 16, "decay_rank": 8, "rate_rank": 8, "gate_rank": 8, "value_residual": False, "chunk": 16},
    )

    class Config(RecurrentConfig):
        """RWKV-7 time mixing."""

        kind: Literal["rwkv7"] = "rwkv7"
        head_dim: Annotated[int, Field(ge=2)] = 64
        """Channels K of a head."""
        decay_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the decay w. Default: 2.5 √width · head_dim / 64, a multiple of 32."""
        rate_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the rate a. Default: as of the decay."""
        gate_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the gate g. Default: 5 √width, a multiple of 32."""
        value_residual: bool = True
        """Whether the values of the first layer of this kind are mixed into this layer's."""
        value_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the share of the first layer's values. Default: 1.7 √width · head_dim / 64, a
        multiple of 32."""

        scales = {"tiny": {"head_dim": 32}}

        def resolved(self, width: int) -> Self:
            divides = width % self.head_dim == 0
            require(divides, "head_dim", got=self.head_dim, expected=f"a divisor of width={width}")
            by_head = self.head_dim / 64
            exact = {name: r * width**0.5 * (1 if name == "gate" else by_head) for name, r in RANKS.items()}
            sizes = {f"{name}_rank": max(32, round(rank / 32) * 32) for name, rank in exact.items()}
            return super().resolved(width).changed(**{n: getattr(self, n) or size for n, size in sizes.items()})

        @property
        def ranks(self) -> dict[str, int]:
            """Rank of every projection of low rank."""
            return {n: getattr(self, f"{n}_rank") for n in RANKS if self.value_residual or n != "value"}

    def __init__(self, config: Any, width: int):
        super().__init__(config, width, EXPONENTS)
        self.low_rank = nn.ModuleDict(  # decay and rate compound over a whole document
            {
                name: LowRank(width, rank, width, ACTIVATIONS.get(name), sensitive=name in ("decay", "rate"))
                for name, rank in config.ranks.items()
            }
        )
        if not config.value_residual:
            del self.value_bias

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        line, bend = places(len(parameter), self.K, parameter)
        values = {
            "key_scale": 0.76 - 0.1 * line,
            "key_rate": 1.02,
            "bonus": -0.04,
            "decay_bias": 6 * line**1.8 - 5.5 + 2.5 * bend,
            "rate_bias": 0.3 * bend + 0.4 * line - 0.39,
            "value_bias": 0.93 - 0.4 * line,
        }
        parameter.copy_(values[name])  # type: ignore[arg-type]

    @classmethod
    def gives(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        return {VALUES: {}}

    @classmethod
    def takes(cls, config: Any) -> Mapping[str, Taken]:
        return {VALUES: Taken("first", False, {})} if config.value_residual else {}

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": "keys erase at unit length and write with another", "vo": "a norm undoes any scale of the values"}

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, StateCache)
        inputs = self.mixtures(x_BTD, segments, None if cache is None else cache.tail_BWC)
        wide, heads = torch.promote_types(x_BTD.dtype, torch.float32), self.heads

        def share(name: str, source: str) -> Tensor:  # (B, T, D) in (0, 1)
            return (self.low_rank[name](inputs[source]).to(wide) + getattr(self, f"{name}_bias").to(wide)).sigmoid()

        g_BTHK, a_BTHK = heads(-LARGEST_DECAY * share("decay", "w")), heads(share("rate", "a"))
        v_BTD = self.v(inputs["v"])
        first_BTD = v_BTD if shared is None else shared.taken.get(VALUES, v_BTD)
        if shared is not None and VALUES in self.given_to_later:
            shared.given[VALUES] = v_BTD
        if self.config.value_residual:
            v_BTD = v_BTD + (first_BTD - v_BTD) * share("value", "v").to(v_BTD.dtype)
        r_BTHK, k_BTHK, v_BTHV = heads(self.r(inputs["r"])), heads(self.k(inputs["k"])), heads(v_BTD)
        unit_BTHK = to_length(k_BTHK * heads(self.key_scale), 1.0)
        k_BTHK = k_BTHK * (1 + heads(self.key_rate) * (a_BTHK - 1))
        o_BTHV, state_BHKV = erase_and_write(
            r_BTHK.to(x_BTD.dtype),
            k_BTHK,
            v_BTHV,
            g_BTHK,
            a_BTHK * unit_BTHK,
            unit_BTHK,
            **self.operation_options(segments, cache),
        )
        if cache is not None:
            cache.update(x_BTD.shape[1], state_BHKV, x_BTD[:, -1:])
        record_state(aux, state_BHKV, g_BTHK, segments)
        bonus_BTH1 = (r_BTHK * heads(self.bonus) * k_BTHK).sum(-1, keepdim=True)
        o_BTHV = self.norm(o_BTHV.to(wide)) + bonus_BTH1 * v_BTHV
        return self.out(o_BTHV.flatten(-2).to(x_BTD.dtype) * self.low_rank["gate"](inputs["g"]))

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        K, H, ranks = config.head_dim, width // config.head_dim, sum(config.ranks.values())
        matrices = [(width, width)] * 4 + [(width, ranks), (ranks, width)]
        vectors = len(EXPONENTS) + 7 + config.value_residual
        parameters = sum(a * b for a, b in matrices) + vectors * width
        flops = linear_flops(*matrices) + 2 * delta_rule_flops(H, K, K, 2 * length, config.chunk, by_channel=True)
        return Cost(parameters, parameters, flops, cache_bytes=4 * H * K * K + element_bytes * width)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"decay_rank": Range(values=(16, 32, 64)), "gate_rank": Range(values=(32, 64, 128))}
