"""Short convolution token by token: the definition. Legend: B batch, T time, C channels, W width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Heads(NamedTuple):
    """A range of channels that becomes a tensor (B, T, heads, channels)."""

    heads: int
    channels: int
    length: float | None = None
    """L2 norm to which every head is scaled; None for no scaling."""


def to_length(x: Tensor, length: float) -> Tensor:
    """(…, channels) with this L2 norm over the channels; a zero vector stays zero, with a finite gradient."""
    return x * (length * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6))


def split_heads(x_BTC: Tensor, part: Heads) -> Tensor:
    """(B, T, heads, channels), scaled to the length."""
    x = x_BTC.unflatten(-1, (part.heads, part.channels))
    return x if part.length is None else to_length(x, part.length)


def short_convolution_reference(
    x_BTC: Tensor,
    weight_CW: Tensor,
    parts: Sequence[Heads],
    *,
    segments: Tensor | None = None,
    silu: bool = True,
) -> list[Tensor]:
    """y_t = silu(Σ_j w_j x_{t-j}) over the inputs x_{t-j} of the row that belong to the document of t, split into
    parts."""
    outputs = []
    for t in range(x_BTC.shape[1]):
        total_BC = x_BTC[:, t] * weight_CW[:, 0]
        for back in range(1, min(weight_CW.shape[1], t + 1)):
            term_BC = x_BTC[:, t - back] * weight_CW[:, back]
            if segments is not None:
                term_BC = torch.where((segments[:, t] == segments[:, t - back])[:, None], term_BC, 0.0)
            total_BC = total_BC + term_BC
        outputs.append(F.silu(total_BC) if silu else total_BC)
    pieces = torch.stack(outputs, dim=1).split([part.heads * part.channels for part in parts], dim=-1)
    return [split_heads(piece, part) for piece, part in zip(pieces, parts)]
