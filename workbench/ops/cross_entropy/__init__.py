"""Next-token cross-entropy straight from hidden states: the scores of all tokens are never held at once."""

from workbench.ops.cross_entropy.chunked import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
