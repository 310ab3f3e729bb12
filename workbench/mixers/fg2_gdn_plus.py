"""FG²-GDN+ (arXiv 2604.19021), our reading: FG²-GDN with separate gates for erasing and writing.

    S_t = (I - (√βᵏ * k)(√βᵏ * k)ᵀ) Diag(exp g) S_{t-1} + (√βᵏ * k)(√βᵛ * v)ᵀ,  βᵏ = σ(W_k x), βᵛ = σ(W_v x) independent

Published (abstract): the + variant decouples the scaling of keys and values. Second-hand: both factors of the edit
carry √βᵏ. **Ours**: the power 1/2 of βᵛ, both gates in (0, 1) from full matrices, everything else as in KDA. No code
is published; no result of this variant is a reproduction.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class FineGrainedDeltaNetPlus(DeltaRuleMixer):
    """FG²-GDN+ layer, our reading."""

    conformance_cases = ({}, {"erase": "scalar", "erase_gate_on": "key", "value_dim": 24})

    class Config(DeltaRuleConfig):
        """FG²-GDN+, our reading."""

        kind: Literal["fg2_gdn_plus"] = "fg2_gdn_plus"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number per head, or one per key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number per head, or one per value channel."""
        tied: bool = False
        """Whether erase and write gate are one gate."""
        erase_gate_on: Literal["key", "both", "address"] = "both"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e, both by its root, or the write key
        p."""
