"""Kimi Delta Attention (arXiv 2510.26692 eq. 1): the gated delta rule with one decay per key channel.

    S_t = (I - β k kᵀ) Diag(exp g) S_{t-1} + β k vᵀ
    β = σ(W_β x) one number per head, g = -exp(A_log) · softplus(W↑W↓ x + dt_bias)

Published: the recurrence, the low-rank decay, the sigmoid output gate of low rank, which was the best of those compared
there. Read in public code (MoonshotAI/Kimi-Linear, flash-linear-attention): rank V, one A_log per head, the bias of the
output gate.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class KimiDeltaAttention(DeltaRuleMixer):
    """Kimi Delta Attention layer."""

    conformance_cases = (
        {},
        {"bounded_decay": True, "decay_rank": 0, "output_gate": "none", "value_dim": 24, "chunk": 16},
    )

    class Config(DeltaRuleConfig):
        """Kimi Delta Attention."""

        kind: Literal["kda"] = "kda"
