"""Simple gated linear attention: Gated DeltaNet that only adds, the additive baseline beside the delta rule.

    S_t = exp(g) S_{t-1} + β k vᵀ        o_t = S_tᵀ q_t

Published: a scalar decay per head on an additive state (RetNet arXiv 2307.08621 with a fixed one, Mamba-2 2405.21060
and the scalar form of GLA 2312.06635 with one per token). Ours: everything else is the `gdn` layer (convolutions, unit
keys, the parametrisation of decay and β, the gated output), so that an ablation of the two differs in the erasure
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from workbench.contract import AuxOutputs, Cost, Range, mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer, Operands
from workbench.mixers.families.recurrent import StateCache
from workbench.ops.delta_rule import delta_rule_flops
from workbench.ops.linear_attention import linear_attention, linear_attention_flops


@mixers.register
class SimpleGatedLinearAttention(DeltaRuleMixer):
    """Simple gated linear attention layer."""

    conformance_cases = ({}, {"heads": 3, "head_dim": 16, "value_dim": 24, "qk_norm": "none", "chunk": 16})

    class Config(DeltaRuleConfig):
        """Simple gated linear attention."""

        kind: Literal["simple_gla"] = "simple_gla"
        decay: Literal["scalar"] = "scalar"
        """Decay of the state: one number per head."""
        decay_rank: Literal[0] = 0
        """A constant: the projection to one number per head is a full matrix."""
        erase: Literal["scalar"] = "scalar"
        """A constant: nothing is erased."""
        write: Literal["scalar"] = "scalar"
        """Axis of the write gate: one number per head."""
        tied: Literal[True] = True
        """There is one gate, on what is written."""
        erase_gate_on: Literal["key"] = "key"
        """A constant: nothing is erased."""
        negative_eigenvalues: Literal[False] = False
        """A constant: nothing is erased."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""
        backend: Literal["auto", "recurrent", "torch"] = "auto"
        """Implementation of the operation; changes speed and rounding, not the function."""

    def operate(
        self, operands: Operands, raw: Mapping[str, Tensor], segments: Tensor | None, cache: StateCache | None
    ) -> tuple[Tensor, Tensor]:
        assert operands.g is not None and operands.beta is not None
        return linear_attention(
            operands.q_BTHK,
            operands.write_key * operands.beta[..., None].to(operands.write_key.dtype),
            operands.value,
            operands.g,
            **self.operation_options(segments, cache),
        )

    def record_metrics(
        self,
        aux: AuxOutputs,
        raw: Mapping[str, Tensor],
        state_BHKV: Tensor | None,
        operands: Operands,
        segments: Tensor | None,
    ) -> None:
        super().record_metrics(aux, raw, state_BHKV, operands, segments)
        del aux.metrics["step_norm"]  # nothing is erased

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        sizes = config.heads, config.head_dim, config.value_dim, length, config.chunk
        saved = delta_rule_flops(*sizes) - linear_attention_flops(*sizes)
        return super().cost(config, width, length, element_bytes).plus(flops=-saved)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        space = super().search_space(config, width)
        return {name: space[name] for name in space if name != "negative_eigenvalues"}
