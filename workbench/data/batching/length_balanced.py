"""Length-balanced batching, LBB: ranks have equal loads, which depend on lengths alone.

The mandatory baseline of sparsity-aware batching (SparseBalance, arXiv 2604.13847, table I).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from workbench.data.batching import batch_plans
from workbench.data.batching.balanced import BalancedPlan, BalancedPlanConfig
from workbench.data.loads import LoadSetting


@batch_plans.register
class LengthBalanced(BalancedPlan):
    """Balances loads that depend on lengths alone."""

    class Config(BalancedPlanConfig):
        """Loads that depend on lengths alone."""

        kind: Literal["length_balanced"] = "length_balanced"
        loads: LoadSetting = Field(default="tokens", validate_default=True)
        """What is balanced: tokens, flops, or measured seconds at the configured blocks per query ({kind: measured,
        table: …})."""

    def load(self, documents: np.ndarray, state: Any) -> float:
        return self.load_model.load(documents, self.run.budgets)
