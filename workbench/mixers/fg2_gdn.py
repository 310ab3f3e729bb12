"""FG²-GDN (arXiv 2604.19021), our reading: KDA with a vector β too, in both factors of the edit.

    S_t = (I - (√β * k)(√β * k)ᵀ) Diag(exp g) S_{t-1} + (√β * k)(√β * v)ᵀ,  β = σ(W_β x) one per key channel

Published (abstract): the number β becomes a vector, on top of a channel-wise decay. Second-hand (notes on its sections
3.1-3.6): both sides carry √β, which keeps the edit symmetric and its norm at most 1. **Ours**: v scaled by √β too (so
that equal channels give KDA; needs K = V), β in (0, 1) from a full matrix, k gated after its L2 norm, everything else
as in KDA. No code is published; no result of this variant is a reproduction. ``erase_gate_on: address`` is the plain
reading of the abstract, β k kᵀ, which the paper is said to reject.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class FineGrainedDeltaNet(DeltaRuleMixer):
    """FG²-GDN layer, our reading."""

    conformance_cases = ({}, {"erase_gate_on": "address", "value_dim": 24, "negative_eigenvalues": True})

    class Config(DeltaRuleConfig):
        """FG²-GDN, our reading."""

        kind: Literal["fg2_gdn"] = "fg2_gdn"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number per head, or one per key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number per head, or one per value channel."""
        erase_gate_on: Literal["key", "both", "address"] = "both"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e, both by its root, or the write key
        p."""
