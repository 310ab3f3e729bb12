"""FG²-GDN (arXiv 2604.19021 eq. 10-11): KDA with a vector β too, in both factors of the edit.

    S_t = (I - (√β * k)(√β * k)ᵀ) Diag(exp g) S_{t-1} + (√β * k)(√β * v)ᵀ,  β = σ(W↑W↓ x) one per key channel

Published: the recurrence, with √β on k and v after the L2 norm of k, K = V, KDA's decay before the edit; with equal
channels it is KDA. The one-sided β k kᵀ (``erase_gate_on: address``) is discussed there and rejected, because the edit
is then not symmetric. **Ours**, since neither text nor code says: β = σ(.) in (0, 1), and its low rank V, as KDA's
other projections have; the parameters are called a marginal addition, which full matrices (9 % at 340M) are not
(``edit_rank: 0``).
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleMixer, LowRankEditsConfig


@mixers.register
class FineGrainedDeltaNet(DeltaRuleMixer):
    """FG²-GDN layer."""

    conformance_cases = ({}, {"erase_gate_on": "address", "value_dim": 24, "negative_eigenvalues": True})

    class Config(LowRankEditsConfig):
        """FG²-GDN."""

        kind: Literal["fg2_gdn"] = "fg2_gdn"
        erase: Literal["scalar", "channel"] = "channel"
        """Axis of the erase gate: one number per head, or one per key channel."""
        write: Literal["scalar", "channel"] = "channel"
        """Axis of the write gate: one number per head, or one per value channel."""
        erase_gate_on: Literal["key", "both", "address"] = "both"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e, both by its root, or the write key
        p."""
