"""Many small feed-forwards, each applied to its own rows."""

from workbench.ops.experts.routing import Routes, routed_experts, sort_choices
from workbench.ops.experts.torch import path, swiglu_experts

__all__ = ["Routes", "path", "routed_experts", "sort_choices", "swiglu_experts"]
