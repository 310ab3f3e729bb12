"""FG²-GDN+ (arXiv 2604.19021), our reading: FG²-GDN with strengths of their own for keys (erasing) and values (writing).

    S_t = (I - (√βᵏ * k)(√βᵏ * k)ᵀ) Diag(exp g) S_{t-1} + (√βᵏ * k)(√βᵛ * v)ᵀ,  βᵏ = σ(W_k x), βᵛ = σ(W_v x) independent

Published (abstract): the + variant decouples the scaling of keys and values. Second-hand: both factors of the edit carry √βᵏ.
**Ours**: the power 1/2 of βᵛ (``write_gate_power``), both gates in (0, 1) from full matrices, everything else as in KDA. No code
is published; no result of this variant is a reproduction.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class FineGrainedDeltaNetPlus(DeltaRuleMixer):
    """FG²-GDN+ layer, our reading."""

    conformance_cases = ({}, {"erase": "scalar", "write_gate_power": 1.0, "scalarise_write": True, "value_dim": 24})

    class Config(DeltaRuleConfig):
        """FG²-GDN+, our reading."""

        kind: Literal["fg2_gdn_plus"] = "fg2_gdn_plus"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number a head, or one a key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number a head, or one a value channel."""
        tied: bool = False
        """Whether erase and write gate are one gate."""
        sides: Literal["right", "two", "left"] = "two"
        """Where the erase gate stands in (I - p eᵀ): in e, as its root in both, or in p."""
