"""Log-linear attention on Mamba-2 (arXiv 2506.04761): O(log T) states, over buckets of 1, 2, 4, … tokens before.

    y_t = λ_t[0] (C_t · B_t) Δ_t x_t + Σ_ℓ λ_t[ℓ] S_t[ℓ]ᵀ C_t        λ_t = softplus(L * W x_t), J numbers per head

with the states S[ℓ] of the buckets of a Fenwick tree over the tokens before, each of which decays as the state of
Mamba-2 does (:mod:`workbench.ops.log_linear_attention`); the layer around it is Mamba-2's. Equal λ of all levels are
Mamba-2 with scaled outputs.

Published: the partition, λ from the input, Mamba-2 as one of the two layers (the other, Gated DeltaNet, is not built).
Read in public code (flash-linear-attention): λ as above with L = 1 at the start, J = 15 levels for up to 16,384 tokens.
Ours: tokens beyond the last level belong to it, where that code ends, so that ``levels`` bounds the cache; no bias of
the projection and the convolution, as in ``mamba2``; a pass of several tokens that continues a cache runs token by
token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import Cost, Range, Role, mixers
from workbench.layers import Linear, linear_flops
from workbench.mixers.families.mamba import MambaConfig, MambaMixer
from workbench.mixers.families.recurrent import StateCache
from workbench.ops.linear_attention import linear_attention_flops
from workbench.ops.log_linear_attention import log_linear_attention, log_linear_attention_flops, state_count


@mixers.register
class LogLinearMamba2(MambaMixer):
    """Log-linear Mamba-2 layer. The cache has a state for every bit of the number of tokens."""

    roles = MambaMixer.roles | {"level_scale": Role.VECTOR}
    conformance_cases = (
        {},
        {"expand": 1.5, "head_dim": 24, "state_dim": 16, "groups": 2, "chunk": 16, "levels": 15},
        {"levels": 3, "chunk": 8},
    )

    class Config(MambaConfig):
        """Log-linear attention on Mamba-2."""

        kind: Literal["log_linear"] = "log_linear"
        levels: Annotated[int, Field(ge=2, le=32)] = 15
        """Levels J, that of the token itself included; tokens 2^(J-2) or more positions away share the last one."""

        scales = {"tiny": {"head_dim": 32, "state_dim": 32, "levels": 10}}

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.level_gate = Linear(width, self.H * config.levels, parts=((self.H, config.levels),))
        self.level_scale = nn.Parameter(torch.empty(self.H, config.levels))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "level_scale":
            parameter.fill_(1.0)
        else:
            super().init_parameter(name, parameter, generator)

    def operate(
        self,
        x_BTD: Tensor,
        q_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        g_BTH: Tensor,
        segments: Tensor | None,
        cache: StateCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        raw_BTHJ = self.level_gate(x_BTD).to(g_BTH.dtype).unflatten(-1, (self.H, -1))
        scales_BTHJ = -F.logsigmoid(-self.level_scale.to(g_BTH.dtype) * raw_BTHJ)  # softplus
        options, N = self.operation_options(segments, cache), self.config.state_dim
        states_BHJP = options.pop("state_BHKV")
        positions_B = None
        if cache is not None and not cache.is_empty:
            positions_B = cache.positions_B
            if positions_B is None:
                positions_B = torch.full((len(x_BTD),), cache.length, device=x_BTD.device)
        y_BTHP, states = log_linear_attention(
            q_BTHN,
            k_BTHN,
            v_BTHP,
            g_BTH,
            scales_BTHJ,
            states_BHIKV=None if states_BHJP is None else states_BHJP.unflatten(2, (-1, N)),
            positions_B=positions_B,
            **options,
        )
        return y_BTHP, None if states is None else states.flatten(2, 3)

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        cache = super().new_cache(batch, length, device, dtype)
        states = state_count(length, self.config.levels)
        return StateCache(cache.state_BHKV.repeat(1, 1, states, 1), cache.tail_BWC)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, sizes = config.heads(width), (config.state_dim, config.head_dim)
        gate = (width, H * config.levels)
        flops = log_linear_attention_flops(H, *sizes, length, config.chunk)
        flops -= linear_attention_flops(H, *sizes, length, config.chunk)
        states = 4 * H * sizes[0] * sizes[1] * (state_count(length, config.levels) - 1)
        return (
            super()
            .cost(config, width, length, element_bytes)
            .plus(parameters=gate[0] * gate[1] + gate[1], flops=flops + linear_flops(gate), cache_bytes=states)
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {**super().search_space(config, width), "levels": Range(values=(2, 5, 10, 15))}
