"""Log-linear attention on Mamba-2 (arXiv 2506.04761): O(log T) states, over buckets of 1, 2, 4, … tokens before.

    y_t = λ_t[0] (C_t · B_t) Δ_t x_t + Σ_ℓ λ_t[ℓ] S_t[ℓ]ᵀ C_t        λ_t = softplus(L * W x_t), J numbers per head

with the states S[ℓ] of the buckets of a Fenwick tree over the tokens before, each of which decays as the state of
Mamba-2 does (:mod:`workbench.ops.log_linear_attention`); the layer around it is Mamba-2's. Equal λ of all levels are
Mamba-2 with scaled outputs.

Published: the partition, λ from the input, Mamba-2 as one of the two layers (the other is
:mod:`workbench.mixers.log_linear_gdn`). Read in public code (flash-linear-attention): λ as above with L = 1 at the
start, J = 15 levels for up to 16,384 tokens. Ours: tokens beyond the last level belong to it, where that code ends, so
that ``levels`` bounds the cache; no bias of the projection and the convolution, as in ``mamba2``; a pass of several
tokens that continues a cache runs token by token.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from workbench.contract import Cost, Range, mixers
from workbench.layers import Linear, linear_flops
from workbench.mixers.families.log_linear import LevelsConfig, LogLinearMixer, level_range, with_levels
from workbench.mixers.families.mamba import MambaConfig, MambaMixer
from workbench.mixers.families.recurrent import StateCache
from workbench.ops.linear_attention import linear_attention_flops
from workbench.ops.log_linear_attention import log_linear_attention_flops


@mixers.register
class LogLinearMamba2(LogLinearMixer, MambaMixer):
    """Log-linear Mamba-2 layer."""

    roles = MambaMixer.roles | LogLinearMixer.level_roles
    conformance_cases = (
        {},
        {"expand": 1.5, "head_dim": 24, "state_dim": 16, "groups": 2, "chunk": 16, "levels": 15},
        {"levels": 3, "chunk": 8},
    )

    class Config(LevelsConfig, MambaConfig):
        """Log-linear attention on Mamba-2."""

        kind: Literal["log_linear"] = "log_linear"

        scales = {"tiny": {"head_dim": 32, "state_dim": 32, "levels": 10}}

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.level_gate = Linear(width, self.H * config.levels, parts=((self.H, config.levels),))
        self.add_levels(self.H, config.levels)

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
        return self.attend_to_levels((q_BTHN, k_BTHN, v_BTHP, g_BTH), self.level_gate(x_BTD), segments, cache)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, sizes = config.heads(width), (config.state_dim, config.head_dim)
        gate, of_operation = (width, H * config.levels), (H, *sizes, length, config.chunk)
        cost = super().cost(config, width, length, element_bytes)
        cost = cost.plus(parameters=gate[0] * gate[1], flops=linear_flops(gate))
        saved = linear_attention_flops(*of_operation) - log_linear_attention_flops(*of_operation)
        return with_levels(cost, config, H, *sizes, length, saved)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {**super().search_space(config, width), **level_range()}
