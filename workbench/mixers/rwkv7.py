"""RWKV-7 time mixing (arXiv 2503.14456): a delta rule that erases along one key and writes along another.

    S_t = (Diag(w) - (a * κ̂) κ̂ᵀ) S_{t-1} + k̃ vᵀ,  κ̂ = unit(κ * k),  k̃ = k * (1 + α (a - 1))
    o_t = S_tᵀ r_t        y = W_o [ (LayerNorm_head(o) + (r · (ρ * k̃)) v) * g ]

r, k, v, w, a and g each see another mixture of a token with the one before; w = exp(-0.606 σ(.)) lies in (0.545, 1),
a = σ(.) in (0, 1); w, a and g come through low ranks.

Published: all of it, with the initial values of α, ρ, κ and the ranks as in public code (flash-linear-attention). Ours:
initial values that depend on a layer's number in that code (mixtures, decay) take those of the middle of the model;
there is no value residual from the first layer. The recurrence is two edits of the delta rule per token: the first
decays and erases, with the erase key κ̂ / w because the decay comes first here; the second writes.

Legend: B batch, T time, D model width, H heads, K channels of a head, keys and values.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Cost, Mixer, Range, Role, VariantConfig, mixers
from workbench.layers import Linear, linear_flops
from workbench.mixers.families.delta_rule import DeltaCache, Operands, one_by_one, record_state
from workbench.ops.delta_rule import delta_rule, delta_rule_flops
from workbench.ops.short_convolution import to_length

INPUTS = ("r", "w", "k", "v", "a", "g")
EXPONENTS = {"r": 0.1, "w": 0.45, "k": 0.35, "v": 0.35, "a": 0.45, "g": 0.1}
"""Of the initial mixture, 1 - (channel / width)^exponent of the token before."""
LARGEST_DECAY = math.exp(-0.5)
"""Nats per token."""


@mixers.register
class RWKV7(Mixer):
    """RWKV-7 time mixing."""

    roles = {name: Role.VECTOR for name in ("mix", "key_scale", "key_rate", "bonus", "decay_bias", "rate_bias")} | {
        "norm_weight": Role.NORM,
        "norm_bias": Role.BIAS,
    }
    conformance_cases = ({}, {"head_dim": 16, "decay_rank": 8, "rate_rank": 8, "gate_rank": 8, "chunk": 16})

    class Config(VariantConfig):
        """RWKV-7 time mixing."""

        kind: Literal["rwkv7"] = "rwkv7"
        head_dim: Annotated[int, Field(ge=2)] = 64
        """Channels K of a head."""
        decay_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the decay w. Default: 2.5 √width, a multiple of 32."""
        rate_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the rate a. Default: as of the decay."""
        gate_rank: Annotated[int | None, Field(ge=1)] = None
        """Rank of the projection to the gate g. Default: 5 √width, a multiple of 32."""
        chunk: Annotated[int, Field(ge=1)] = 32
        """Edits per chunk of the training form, a power of two; changes speed and rounding, not the function."""
        backend: Literal["auto", "recurrent", "torch", "triton", "fla"] = "auto"
        """Implementation of the operation; changes speed and rounding, not the function."""

        implementation = frozenset({"chunk", "backend"})
        scales = {"tiny": {"head_dim": 32}}

        def resolved(self, width: int) -> Self:
            divides = width % self.head_dim == 0
            require(divides, "head_dim", got=self.head_dim, expected=f"a divisor of width={width}")
            require(self.chunk & (self.chunk - 1) == 0, "chunk", got=self.chunk, expected="a power of two")
            small, large = (max(32, round(factor * width**0.5 / 32) * 32) for factor in (2.5, 5))
            return self.changed(
                decay_rank=self.decay_rank or small,
                rate_rank=self.rate_rank or small,
                gate_rank=self.gate_rank or large,
            )

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config, self.K, self.H = config, config.head_dim, width // config.head_dim
        self.mix = nn.Parameter(torch.empty(len(INPUTS) * width))  # one vector after another
        self.r, self.k, self.v = (Linear(width, width, parts=((self.H, self.K),)) for _ in range(3))
        ranks = {"decay": config.decay_rank, "rate": config.rate_rank, "gate": config.gate_rank}
        self.down = nn.ModuleDict({name: Linear(width, rank) for name, rank in ranks.items()})
        self.up = nn.ModuleDict({name: Linear(rank, width) for name, rank in ranks.items()})
        for projections in (self.down, self.up):
            for name in ("decay", "rate"):  # they compound over a whole document
                projection = projections[name]
                assert isinstance(projection, Linear)
                projection.sensitive = True
        self.key_scale, self.key_rate, self.bonus, self.decay_bias, self.rate_bias, self.norm_weight, self.norm_bias = (
            nn.Parameter(torch.empty(width)) for _ in range(7)
        )
        self.out = Linear(width, width, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        D = self.out.in_features
        place = torch.arange(D, device=parameter.device, dtype=parameter.dtype)
        line = place / max(1, D - 1)
        zigzag = 2 * (place % self.K) / (self.K - 1) - 1
        values = {
            "key_scale": 0.76 - 0.1 * line,
            "key_rate": torch.full_like(line, 1.02),
            "bonus": torch.full_like(line, -0.04),
            "decay_bias": 6 * line**1.8 - 5.5 + 2.5 * zigzag * zigzag.abs(),
            "rate_bias": 0.3 * zigzag * zigzag.abs() + 0.4 * line - 0.39,
            "norm_weight": torch.ones_like(line),
            "norm_bias": torch.zeros_like(line),
        }
        if name == "mix":
            values["mix"] = torch.cat([1 - (place / D) ** EXPONENTS[name] for name in INPUTS])
        parameter.copy_(values[name])

    def transfer_constants(self) -> dict[str, float]:
        return {"initialisation": self.out.in_features}  # channels differ by their place

    def width_obstacle(self) -> str:
        return "mixtures and biases start with values that depend on a channel's place"

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": "keys erase at unit length and write with another", "vo": "a norm undoes any scale of the values"}

    def score_obstacle(self) -> str:
        return "a recurrent state has no softmax over keys"

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, DeltaCache)
        stepping = cache is not None and cache.positions_B is not None
        before_B1D = torch.zeros_like(x_BTD[:, :1]) if cache is None else cache.tail_BWC
        change_BTD = torch.cat((before_B1D, x_BTD[:, :-1]), dim=1) - x_BTD
        if segments is not None:
            starts_BT = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
            change_BTD = torch.where(starts_BT[..., None], -x_BTD, change_BTD)
        mixtures = self.mix.to(x_BTD.dtype).chunk(len(INPUTS))
        inputs = {name: x_BTD + change_BTD * mix for name, mix in zip(INPUTS, mixtures)}
        wide = torch.promote_types(x_BTD.dtype, torch.float32)

        def heads(x_BTD: Tensor) -> Tensor:  # (B, T, H, K)
            return x_BTD.to(wide).unflatten(-1, (self.H, self.K))

        raw_BTD = self.up["decay"](self.down["decay"](inputs["w"]).tanh()).to(wide) + self.decay_bias.to(wide)
        g_BTHK = heads(-LARGEST_DECAY * raw_BTD.sigmoid())
        a_BTHK = heads((self.up["rate"](self.down["rate"](inputs["a"])).to(wide) + self.rate_bias.to(wide)).sigmoid())
        r_BTHK, k_BTHK, v_BTHV = heads(self.r(inputs["r"])), heads(self.k(inputs["k"])), heads(self.v(inputs["v"]))
        unit_BTHK = to_length(k_BTHK * heads(self.key_scale), 1.0)
        k_BTHK = k_BTHK * (1 + heads(self.key_rate) * (a_BTHK - 1))
        zero = torch.zeros_like(k_BTHK)
        write_key, value = torch.cat((a_BTHK * unit_BTHK, k_BTHK), dim=2), torch.cat((zero, v_BTHV), dim=2)
        erase_key = torch.cat((unit_BTHK * (-g_BTHK).exp(), zero), dim=2)
        edits = one_by_one(Operands(r_BTHK, write_key, value, g_BTHK, erase_key, None), 2)
        assert edits.erase_key is not None
        o_BTHV, state_BHKV = delta_rule(
            edits.q_BTHK.to(x_BTD.dtype),
            edits.write_key.to(x_BTD.dtype),
            edits.value.to(x_BTD.dtype),
            edits.g,
            erase_key_BTHK=edits.erase_key.to(x_BTD.dtype),
            segments=None if segments is None else segments.repeat_interleave(2, dim=1),
            state_BHKV=None if cache is None else cache.state_BHKV,
            chunk=self.config.chunk,
            backend="recurrent" if stepping else self.config.backend,
        )
        o_BTHV = o_BTHV[:, 1::2].to(wide)
        if cache is not None:
            cache.state_BHKV.copy_(state_BHKV)
            cache.tail_BWC.copy_(x_BTD[:, -1:])
            cache.length += 0 if stepping else x_BTD.shape[1]
        if aux is not None and aux.collect_metrics:
            record_state(aux, state_BHKV, g_BTHK, segments)
        o_BTHV = F.layer_norm(o_BTHV, (self.K,), eps=1e-5 * self.K)
        o_BTHV = o_BTHV * heads(self.norm_weight) + heads(self.norm_bias)
        o_BTHV = o_BTHV + (r_BTHK * heads(self.bonus) * k_BTHK).sum(-1, keepdim=True) * v_BTHV
        gate_BTD = self.up["gate"](self.down["gate"](inputs["g"]).sigmoid())
        return self.out(o_BTHV.flatten(-2).to(x_BTD.dtype) * gate_BTD)

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> DeltaCache:
        wide, width = torch.promote_types(dtype, torch.float32), self.out.in_features
        state_BHKV = torch.zeros(batch, self.H, self.K, self.K, device=device, dtype=wide)
        return DeltaCache(state_BHKV, torch.zeros(batch, 1, width, device=device, dtype=dtype))

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        K, H = config.head_dim, width // config.head_dim
        ranks = config.decay_rank + config.rate_rank + config.gate_rank
        matrices = [(width, width)] * 4 + [(width, ranks), (ranks, width)]
        parameters = sum(a * b for a, b in matrices) + (len(INPUTS) + 7) * width
        flops = linear_flops(*matrices) + 2 * delta_rule_flops(H, K, K, 2 * length, config.chunk, by_channel=True)
        return Cost(parameters, parameters, flops, cache_bytes=4 * H * K * K + element_bytes * width)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"decay_rank": Range(values=(16, 32, 64)), "gate_rank": Range(values=(32, 64, 128))}
