"""Log-linear Gated DeltaNet (arXiv 2506.04761): O(log T) states, all of them edited by the gated delta rule.

    S_t[ℓ] = (I - β k kᵀ) exp(g) S_{t-1}[ℓ] of every bucket of 1, 2, 4, … tokens before
    o_t = λ_t[0] (q · k) β v + Σ_ℓ λ_t[ℓ] S_t[ℓ]ᵀ q        λ_t = softplus(L * W x_t), J numbers per head

with the buckets of :mod:`workbench.mixers.log_linear`. Equal λ of all levels are the `gdn` layer with scaled outputs:
the states sum to its state.

Published: the mask of levels on the attention matrix of Gated DeltaNet, which is the equation above. Read in public
code (a copy of the authors' log-linear-attention): λ as above with L = 1 at the start, the layer of Gated DeltaNet
around it. Ours: tokens beyond the last level belong to it, so that ``levels`` bounds the cache; a pass of several
tokens that continues a cache runs token by token; plain torch on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from workbench.contract import Cost, Range, mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer, GateShape, Operands
from workbench.mixers.families.log_linear import LevelsConfig, LogLinearMixer, level_range, with_levels
from workbench.mixers.families.recurrent import StateCache
from workbench.ops.delta_rule import delta_rule_flops
from workbench.ops.log_linear_attention import log_linear_delta_rule_flops


@mixers.register
class LogLinearGatedDeltaNet(LogLinearMixer, DeltaRuleMixer):
    """Log-linear Gated DeltaNet layer."""

    roles = DeltaRuleMixer.roles | LogLinearMixer.level_roles
    conformance_cases = (
        {},
        {"heads": 3, "head_dim": 16, "value_dim": 24, "negative_eigenvalues": True, "chunk": 16, "levels": 15},
        {"levels": 3, "chunk": 8},
    )

    class Config(LevelsConfig, DeltaRuleConfig):
        """Log-linear Gated DeltaNet."""

        kind: Literal["log_linear_gdn"] = "log_linear_gdn"
        decay: Literal["scalar"] = "scalar"
        """Decay of the states: one number per head."""
        decay_rank: Literal[0] = 0
        """A constant: the projection to one number per head is a full matrix."""
        erase: Literal["scalar"] = "scalar"
        """Axis of the erase gate: one number per head."""
        write: Literal["scalar"] = "scalar"
        """Axis of the write gate: one number per head."""
        tied: Literal[True] = True
        """Erase and write gate are one gate."""
        erase_gate_on: Literal["key"] = "key"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""
        chunk: Annotated[int, Field(ge=1)] = 64
        """Tokens of the smallest block of the training form, a power of two; changes speed and rounding, not the
        function."""
        backend: Literal["auto", "recurrent", "torch"] = "auto"
        """Implementation of the operation; changes speed and rounding, not the function."""

        scales = {
            scale: fields | ({"levels": 10} if scale == "tiny" else {})
            for scale, fields in DeltaRuleConfig.scales.items()
        }

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.add_levels(self.H, config.levels)

    @classmethod
    def gate_shapes(cls, config: Any) -> dict[str, GateShape]:
        return super().gate_shapes(config) | {"levels": GateShape(config.heads * config.levels)}

    def operate(
        self, operands: Operands, raw: Mapping[str, Tensor], segments: Tensor | None, cache: StateCache | None
    ) -> tuple[Tensor, Tensor | None]:
        q_BTHK, k_BTHK, v_BTHV, g_BTH, _, beta_BTH = operands
        assert g_BTH is not None
        return self.attend_to_levels((q_BTHK, k_BTHK, v_BTHV, g_BTH), raw["levels"], segments, cache, beta_BTH)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        sizes = config.heads, config.head_dim, config.value_dim
        saved = delta_rule_flops(*sizes, length, config.chunk) - log_linear_delta_rule_flops(
            *sizes, length, config.chunk
        )
        return with_levels(super().cost(config, width, length, element_bytes), config, *sizes, length, saved)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {**super().search_space(config, width), **level_range()}
