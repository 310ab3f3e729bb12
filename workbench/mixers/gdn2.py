"""GDN-2 (arXiv 2605.22791 eq. 8-10): separate channel-wise gates for erasing and writing, with KDA's decay.

    S_t = (I - k (b * k)ᵀ) Diag(exp g) S_{t-1} + k (w * v)ᵀ
    b = σ(W_b x) one per key channel, w = σ(W_w x) one per value channel

Published: the recurrence, full-rank gates, the Xavier initialisation, the SiLU output gate; with negative eigenvalues b
lies in [0, 2] and w does not. Our reading: decay and output gate of low rank as in KDA (flash-linear-attention's port;
the paper says "projection"), which makes it as large as FG²-GDN+. One step is not a contraction: ‖I - k (b * k)ᵀ‖
reaches 2/√3.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class GatedDeltaNet2(DeltaRuleMixer):
    """GDN-2 layer."""

    conformance_cases = (
        {},
        {"erase": "scalar", "output_gate_rank": 0, "value_dim": 24, "negative_eigenvalues": True},
    )

    class Config(DeltaRuleConfig):
        """GDN-2."""

        kind: Literal["gdn2"] = "gdn2"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number per head, or one per key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number per head, or one per value channel."""
        tied: bool = False
        """Whether erase and write gate are one gate."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        initialisation: Literal["model", "xavier"] = "xavier"
        """Initial values of the matrices: those of all other variants, or Xavier-uniform with gain 2^-2.5."""
