"""Gated DeltaProduct (arXiv 2502.10297): n edits of the state at every token, after one decay.

    S_{t,0} = exp(g) S_{t-1}        S_{t,j} = (I - β_j k_j k_jᵀ) S_{t,j-1} + β_j k_j v_jᵀ        S_t = S_{t,n}
    o_t = S_tᵀ q_t

Published: a product of n generalised Householder matrices per token, each with its key, value and β, the decay of Gated
DeltaNet once a token, and eigenvalues in (-1, 1), with which n edits reach any permutation of n + 1 elements. Read in
public code (flash-linear-attention): one convolution over all keys and values, a SiLU output gate of full rank, n = 2.
The state's operation runs over n T edits, so its cost grows n-fold, and so do keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from workbench.contract import Range, mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer, Operands, one_by_one
from workbench.mixers.families.recurrent import StateCache


@mixers.register
class GatedDeltaProduct(DeltaRuleMixer):
    """Gated DeltaProduct layer."""

    conformance_cases = (
        {},
        {"num_householder": 3, "heads": 3, "head_dim": 16, "value_dim": 24, "chunk": 16},
        {"num_householder": 1, "decay": "channel", "erase_gate_on": "address"},
    )

    class Config(DeltaRuleConfig):
        """Gated DeltaProduct."""

        kind: Literal["gated_deltaproduct"] = "gated_deltaproduct"
        num_householder: Annotated[int, Field(ge=1)] = 2
        """Edits n of the state at every token; 1 is Gated DeltaNet."""
        decay: Literal["none", "scalar", "channel"] = "scalar"
        """Decay of the state: none, one number per head, or one per key channel."""
        negative_eigenvalues: bool = True
        """Edit strength in (0, 2) instead of (0, 1)."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""

    @classmethod
    def edits(cls, config: Any) -> int:
        return config.num_householder

    def operate(
        self, operands: Operands, raw: Mapping[str, Tensor], segments: Tensor | None, cache: StateCache | None
    ) -> tuple[Tensor, Tensor | None]:
        n = self.edits(self.config)
        numbers = None if segments is None else segments.repeat_interleave(n, dim=1)
        out, state_BHKV = super().operate(one_by_one(operands, n), raw, numbers, cache)
        return out[:, n - 1 :: n], state_BHKV

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {**super().search_space(config, width), "num_householder": Range(values=(1, 2, 3))}
