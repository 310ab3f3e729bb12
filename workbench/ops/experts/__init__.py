"""Routed experts: tokens to their experts, SwiGLU feed-forwards on rows sorted by expert, and back."""

from workbench.ops.experts.routed import routed_experts, swiglu_experts
from workbench.ops.experts.routing import Routes, sort_choices

__all__ = ["Routes", "routed_experts", "sort_choices", "swiglu_experts"]
