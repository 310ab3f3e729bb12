"""FG²-GDN+ (arXiv 2604.19021 eq. 13): FG²-GDN with separate gates for erasing and writing.

    S_t = (I - (√βᵏ * k)(√βᵏ * k)ᵀ) Diag(exp g) S_{t-1} + (√βᵏ * k)(√βᵛ * v)ᵀ,  βᵏ = σ(W↑W↓ x), βᵛ = σ(V↑V↓ x)

Published: the recurrence, with K = V. **Ours**: K ≠ V, and, as in `fg2_gdn`, gates in (0, 1) of low rank.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleMixer, LowRankEditsConfig


@mixers.register
class FineGrainedDeltaNetPlus(DeltaRuleMixer):
    """FG²-GDN+ layer."""

    conformance_cases = ({}, {"erase": "scalar", "erase_gate_on": "key", "value_dim": 24})

    class Config(LowRankEditsConfig):
        """FG²-GDN+."""

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
