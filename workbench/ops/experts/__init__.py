"""Routed experts: tokens to their experts, SwiGLU feed-forwards on rows sorted by expert, and back."""

from workbench.ops.experts.routing import Routes, routed_experts, sort_choices
from workbench.ops.experts.torch import swiglu_experts

__all__ = ["Routes", "routed_experts", "sort_choices", "swiglu_experts"]
