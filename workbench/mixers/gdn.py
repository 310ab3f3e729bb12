"""Gated DeltaNet (arXiv 2412.06464): a recurrent state per head, decayed and edited by the gated delta rule.

    S_t = (I - β k kᵀ) exp(g) S_{t-1} + β k vᵀ
    β = σ(W_β x) and g = -exp(A_log) · softplus(W_a x + dt_bias), one number per head

Published: the recurrence (restated in 2605.22791 eq. 6). Read in public code (NVlabs/GatedDeltaNet): the layer around
it, with a SiLU output gate of full rank.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class GatedDeltaNet(DeltaRuleMixer):
    """Gated DeltaNet layer."""

    conformance_cases = ({}, {"negative_eigenvalues": True, "heads": 3, "head_dim": 16, "value_dim": 24, "chunk": 8})

    class Config(DeltaRuleConfig):
        """Gated DeltaNet."""

        kind: Literal["gdn"] = "gdn"
        decay: Literal["none", "scalar", "channel"] = "scalar"
        """Decay of the state: none, one number per head, or one per key channel."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""
