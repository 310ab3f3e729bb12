"""Cross-entropy of a linear head: the definition. Legend: N tokens, D width, V vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """(N,) −log softmax(W h)[target] in nats, in the precision of the input; 0 where the target is negative."""
    return F.cross_entropy(h_ND @ weight_VD.t(), targets_N.clamp_min(-100), ignore_index=-100, reduction="none")
