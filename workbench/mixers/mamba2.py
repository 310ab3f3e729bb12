"""Mamba-2 (arXiv 2405.21060): a state-space layer with one decay per head, whose keys and queries heads share.

    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ        y_t = S_tᵀ C_t + d x_t        out = W_o RMSNorm(y * silu(z))

Published: the state-space dual form, the gated norm before the output, one convolution over x, B and C, expansion 2,
heads of 64 channels, a state of 128 channels, one group of B and C. Read in public code (state-spaces/mamba): Δ =
softplus(W x + dt_bias), A = -exp(A_log) with -A uniform in (1, 16), d = 1 per head at the start, a norm for every
group. Ours: the convolution has no bias, as everywhere here.

Legend: B batch, T time, D width, H heads, P channels of a head, N of the state, G groups, C convolved channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Cost, Mixer, Range, Role, VariantConfig, mixers
from workbench.layers import Linear, RMSNorm, ShortConvolution, linear_flops
from workbench.mixers.families.delta_rule import DeltaCache, fill_time_steps, record_state
from workbench.ops.linear_attention import linear_attention, linear_attention_flops
from workbench.ops.short_convolution import Heads

CONV_WIDTH = 4


@mixers.register
class Mamba2(Mixer):
    """Mamba-2 layer."""

    roles = {"A_log": Role.VECTOR, "dt_bias": Role.VECTOR, "skip": Role.VECTOR}
    conformance_cases = ({}, {"expand": 1.5, "head_dim": 24, "state_dim": 16, "groups": 2, "chunk": 16})

    class Config(VariantConfig):
        """Mamba-2."""

        kind: Literal["mamba2"] = "mamba2"
        expand: Annotated[float, Field(gt=0)] = 2.0
        """Inner channels HP divided by the width."""
        head_dim: Annotated[int, Field(ge=1)] = 64
        """Channels P of a head."""
        state_dim: Annotated[int, Field(ge=1)] = 128
        """Channels N of keys and queries (B and C)."""
        groups: Annotated[int, Field(ge=1)] = 1
        """Groups G of heads that share B and C."""
        chunk: Annotated[int, Field(ge=1)] = 64
        """Tokens per chunk of the training form, a power of two; changes speed and rounding, not the function."""
        backend: Literal["auto", "recurrent", "torch"] = "auto"
        """Implementation of the operation; changes speed and rounding, not the function."""

        implementation = frozenset({"chunk", "backend"})
        scales = {"tiny": {"head_dim": 32, "state_dim": 32}}

        def heads(self, width: int) -> int:
            """Heads H at a model width."""
            return round(self.expand * width) // self.head_dim

        def resolved(self, width: int) -> Self:
            inner, H = self.expand * width, self.heads(width)
            do = "Change expand or head_dim."
            whole = H >= 1 and inner == H * self.head_dim
            require(whole, "expand", got=self.expand, expected=f"heads of {self.head_dim} channels", do=do)
            require(H % self.groups == 0, "groups", got=self.groups, expected=f"a divisor of the {H} heads")
            require(self.chunk & (self.chunk - 1) == 0, "chunk", got=self.chunk, expected="a power of two")
            return self

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config, self.H = config, config.heads(width)
        self.inner = self.H * config.head_dim
        shared = config.groups, config.state_dim
        parts = ((self.H, config.head_dim),) * 2 + (shared, shared, (self.H, 1))
        self.project = Linear(width, sum(heads * channels for heads, channels in parts), parts=parts)
        self.conv = ShortConvolution(self.inner + 2 * config.groups * config.state_dim, CONV_WIDTH)
        self.A_log, self.dt_bias, self.skip = (nn.Parameter(torch.empty(self.H)) for _ in range(3))
        self.norm = RMSNorm(self.inner)
        self.out = Linear(self.inner, width, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "A_log":
            parameter.uniform_(1.0, 16.0, generator=generator).log_()
        elif name == "skip":
            parameter.fill_(1.0)
        else:
            fill_time_steps(parameter, generator)

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": "B and C pass a SiLU", "vo": "an RMS norm before `out` undoes any scale of the values"}

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
        config, H, G = self.config, self.H, self.config.groups
        z, raw_BTC, step_BTH = self.project(x_BTD).split([self.inner, self.conv.weight.shape[0], H], dim=-1)
        stepping = cache is not None and cache.positions_B is not None
        tail_BWC = cache.tail_BWC if cache is not None and (cache.length or stepping) else None
        parts = (Heads(H, config.head_dim), Heads(G, config.state_dim), Heads(G, config.state_dim))
        x_BTHP, k_BTGN, q_BTGN = self.conv(raw_BTC, parts, segments=segments, tail_BWC=tail_BWC)
        k_BTHN, q_BTHN = (x.repeat_interleave(H // G, dim=2) for x in (k_BTGN, q_BTGN))
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        step_BTH = -F.logsigmoid(-(step_BTH.to(wide) + self.dt_bias.to(wide)))  # softplus
        g_BTH = -self.A_log.to(wide).exp() * step_BTH
        y_BTHP, state_BHNP = linear_attention(
            q_BTHN,
            k_BTHN,
            x_BTHP.to(wide) * step_BTH[..., None],
            g_BTH,
            segments=segments,
            state_BHKV=None if cache is None else cache.state_BHKV,
            chunk=config.chunk,
            backend="recurrent" if stepping else config.backend,
        )
        if cache is not None:
            cache.state_BHKV.copy_(state_BHNP)
            cache.tail_BWC.copy_(self.conv.next_tail(raw_BTC, cache.tail_BWC))
            cache.length += 0 if stepping else x_BTD.shape[1]
        if aux is not None and aux.collect_metrics:
            record_state(aux, state_BHNP, g_BTH, segments)
        y_BTHP = (y_BTHP + self.skip.to(wide)[:, None] * x_BTHP).to(x_BTD.dtype)
        gated_BTGC = (y_BTHP.flatten(-2) * F.silu(z)).unflatten(-1, (G, -1))
        normed_BTC = F.rms_norm(gated_BTGC, gated_BTGC.shape[-1:], eps=self.norm.eps).flatten(-2)
        return self.out(normed_BTC * self.norm.weight.to(normed_BTC.dtype))

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> DeltaCache:
        config, wide = self.config, torch.promote_types(dtype, torch.float32)
        state = torch.zeros(batch, self.H, config.state_dim, config.head_dim, device=device, dtype=wide)
        tail = torch.zeros(batch, CONV_WIDTH - 1, self.conv.weight.shape[0], device=device, dtype=dtype)
        return DeltaCache(state, tail)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, P, N = config.heads(width), config.head_dim, config.state_dim
        C = H * P + 2 * config.groups * N
        matrices = (width, H * P + C + H), (H * P, width)
        parameters = sum(a * b for a, b in matrices) + CONV_WIDTH * C + 3 * H + H * P
        flops = linear_flops(*matrices) + linear_attention_flops(H, N, P, length, config.chunk)
        cache_bytes = 4 * H * N * P + element_bytes * (CONV_WIDTH - 1) * C
        return Cost(parameters, parameters, flops, cache_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"state_dim": Range(values=(16, 32, 64, 128))}
