"""Running sums that are the same bit for bit at every call: torch.cumsum is not on CUDA."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def running_sum(x_BTX: Tensor, *, modulo: float | None = None) -> Tensor:
    """Sums of (B, T, …) up to every position of the second axis, in log2 T steps.

    Args:
        modulo: the sums are only needed up to multiples of this number, as angles are: they stay small, so that long
            rows lose no digits.
    """
    T, reach = x_BTX.shape[1], 1
    sums = x_BTX
    while reach < T:
        earlier = F.pad(sums[:, :-reach], (0, 0) * (x_BTX.dim() - 2) + (reach, 0))
        sums = sums + earlier if modulo is None else (sums + earlier).remainder(modulo)
        reach *= 2
    return sums
