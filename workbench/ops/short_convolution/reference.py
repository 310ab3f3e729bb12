"""Short convolution token by token, the definition. Legend: B batch, T time, C channels, W width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Heads(NamedTuple):
    """Channels that become a tensor (B, T, heads, channels) of their own."""

    heads: int
    channels: int
    length: float | None = None
    """Length to which every head's vector is scaled; None leaves it as it is."""


def of_length(x_BTC: Tensor, part: Heads) -> Tensor:
    """(B, T, heads, channels); a zero vector stays zero with a finite gradient."""
    x = x_BTC.unflatten(-1, (part.heads, part.channels))
    return x if part.length is None else x * (part.length * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6))


def short_convolution_reference(
    x_BTC: Tensor, weight_CW: Tensor, parts: Sequence[Heads], *, segments: Tensor | None = None
) -> list[Tensor]:
    """y_t = silu(Σ_j w_j x_{t-j}) over inputs that are there and belong to the document of t, by parts."""
    outputs = []
    for t in range(x_BTC.shape[1]):
        total_BC = x_BTC[:, t] * weight_CW[:, 0]
        for back in range(1, min(weight_CW.shape[1], t + 1)):
            term_BC = x_BTC[:, t - back] * weight_CW[:, back]
            if segments is not None:
                term_BC = torch.where((segments[:, t] == segments[:, t - back])[:, None], term_BC, 0.0)
            total_BC = total_BC + term_BC
        outputs.append(F.silu(total_BC))
    pieces = torch.stack(outputs, dim=1).split([part.heads * part.channels for part in parts], dim=-1)
    return [of_length(piece, part) for piece, part in zip(pieces, parts)]
