"""Activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), as torch's softplus, whose gradient has wrong strides where compiled code is traced."""
    return -F.logsigmoid(-x)
