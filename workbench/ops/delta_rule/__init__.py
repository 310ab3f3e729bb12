"""The gated delta rule: a linear-attention state that is edited, not only added to."""

from workbench.ops.delta_rule.reference import gated_delta_rule_recurrent
from workbench.ops.delta_rule.torch import gated_delta_rule_chunked

__all__ = ["gated_delta_rule_chunked", "gated_delta_rule_recurrent"]
