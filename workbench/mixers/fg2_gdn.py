"""FG²-GDN (arXiv 2604.19021), our reading: KDA with a vector for the learning rate β as well, in both factors of the edit.

    S_t = (I - (√β * k)(√β * k)ᵀ) Diag(exp g) S_{t-1} + (√β * k)(√β * v)ᵀ,  β = σ(W_β x) one a key channel

Published (abstract): the number β becomes a vector, on top of a channel-wise decay. Second-hand (notes on its sections 3.1-3.6):
both sides carry √β, which keeps the edit symmetric and its norm at most 1. **Ours**: v scaled by √β too (so that equal
channels give KDA; needs K = V), β in (0, 1) from a full matrix, k gated after its L2 norm, everything else as in KDA. No code is
published; no result of this variant is a reproduction. ``sides: left`` is the plain reading of the abstract, β k kᵀ, which the
paper is said to reject.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class FineGrainedDeltaNet(DeltaRuleMixer):
    """FG²-GDN layer, our reading."""

    conformance_cases = ({}, {"sides": "left", "value_dim": 24, "negative_eigenvalues": True})

    class Config(DeltaRuleConfig):
        """FG²-GDN, our reading."""

        kind: Literal["fg2_gdn"] = "fg2_gdn"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number a head, or one a key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number a head, or one a value channel."""
        sides: Literal["right", "two", "left"] = "two"
        """Where the erase gate stands in (I - p eᵀ): in e, as its root in both, or in p."""
