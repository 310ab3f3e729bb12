"""Softmax attention with grouped heads, a window and packed documents."""

from workbench.ops.attention.torch import attention

__all__ = ["attention"]
