"""Many small feed-forwards, each applied to its own rows."""

from workbench.ops.experts.torch import swiglu_experts

__all__ = ["swiglu_experts"]
