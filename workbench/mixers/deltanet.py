"""DeltaNet (arXiv 2406.06484): the delta rule without decay. What is written stays until it is overwritten.

    S_t = (I - β k kᵀ) S_{t-1} + β k vᵀ,  β = σ(W_β x) one number per head

Published: the recurrence (restated in 2605.22791 eq. 5). Our reading: no output gate, as flash-linear-attention's layer
has none unless asked.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer


@mixers.register
class DeltaNet(DeltaRuleMixer):
    """DeltaNet layer."""

    conformance_cases = (
        {},
        {
            "negative_eigenvalues": True,
            "short_convolution": False,
            "heads": 3,
            "head_dim": 16,
            "value_dim": 24,
            "chunk": 8,
        },
    )

    class Config(DeltaRuleConfig):
        """DeltaNet."""

        kind: Literal["deltanet"] = "deltanet"
        decay: Literal["none", "scalar", "channel"] = "none"
        """Decay of the state: none, one number per head, or one per key channel."""
        output_gate: Literal["sigmoid", "silu", "none"] = "none"
        """Activation of the gate on the output."""
