"""Short convolution token by token, the definition. Legend: B batch, T time, C channels, W width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_reference(x_BTC: Tensor, weight_CW: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """y_t = silu(Σ_j w_j x_{t-j}) over inputs that are there and belong to the document of t."""
    outputs = []
    for t in range(x_BTC.shape[1]):
        total_BC = x_BTC[:, t] * weight_CW[:, 0]
        for back in range(1, min(weight_CW.shape[1], t + 1)):
            term_BC = x_BTC[:, t - back] * weight_CW[:, back]
            if segments is not None:
                term_BC = torch.where((segments[:, t] == segments[:, t - back])[:, None], term_BC, 0.0)
            total_BC = total_BC + term_BC
        outputs.append(F.silu(total_BC))
    return torch.stack(outputs, dim=1)
