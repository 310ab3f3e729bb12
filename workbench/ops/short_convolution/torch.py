"""Short convolution as a sum of shifted rows, on any device. Legend: B batch, T time, C channels, W width, P = W -
1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.short_convolution.reference import Heads, split_heads


def short_convolution_torch(
    x_BTC: Tensor,
    weight_CW: Tensor,
    parts: Sequence[Heads],
    *,
    segments: Tensor | None = None,
    tail_BPC: Tensor | None = None,
    silu: bool = True,
) -> list[Tensor]:
    """As :func:`workbench.ops.short_convolution.short_convolution`."""
    B, T, C = x_BTC.shape
    past = weight_CW.shape[1] - 1
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    x, weight = x_BTC.to(wide), weight_CW.to(wide)
    tail = x.new_zeros(B, past, C) if tail_BPC is None else tail_BPC.to(wide)
    padded = torch.cat((tail, x), dim=1)
    y = x * weight[:, 0]
    for back in range(1, past + 1):
        shifted = padded[:, past - back : past - back + T]
        if segments is not None:
            same = F.pad(segments[:, back:] == segments[:, :-back], (min(back, T), 0)) if back < T else None
            shifted = shifted * same[..., None] if same is not None else torch.zeros_like(shifted)
        y = y + shifted * weight[:, back]
    pieces = (F.silu(y) if silu else y).split([part.heads * part.channels for part in parts], dim=-1)
    return [split_heads(piece, part).to(x_BTC.dtype) for piece, part in zip(pieces, parts)]
