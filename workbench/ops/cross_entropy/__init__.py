"""Next-token cross-entropy from hidden states, without materialising the logits of all tokens."""

from workbench.ops.cross_entropy.chunked import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
