"""The largest attention score of every head, tile by tile. Legend: B batch, T queries, S keys, H query heads, G
key–value heads, K channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_NUMBERS = 2**25
"""Scores in memory at once, at most."""
MIN_TILE = 64
"""Queries of a tile, at least."""


@torch.no_grad()
def score_maxima(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """max_{b, t, s} scale · q_t · k_s of every head over the visible keys s ≤ t, padding left out, without gradient.

    Tiles of queries meet the keys up to their last one, so that no more than :data:`TILE_NUMBERS` scores, or those of
    :data:`MIN_TILE` queries, exist at once; half the products of all pairs. Products in the dtype of the queries, which
    training attends with.

    Args:
        q_BTHK, k_BTGK: queries and keys, H a multiple of G.
        scale: factor of the scores; default 1/sqrt(K).
        window: each query sees the last ``window`` keys, its own included; None for all.
        segments: (B, T) document numbers, negative where padded; attention stays within a document.

    Returns:
        (H,) fp32 or wider; -inf of nothing.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    scale = 1 / math.sqrt(K) if scale is None else scale
    q, k = q_BTHK.detach().transpose(1, 2), k_BTGK.detach().to(q_BTHK.dtype).transpose(1, 2)
    q = q.reshape(B, G, H // G, T, K)
    tile = min(T, max(MIN_TILE, TILE_NUMBERS // (B * H * T)))
    position_T = torch.arange(T, device=q.device)
    largest = torch.full((H,), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for first in range(0, T, tile):
        last = min(T, first + tile)
        start = 0 if window is None else max(0, first - window + 1)
        rows, columns = position_T[first:last, None], position_T[None, start:last]
        visible = columns <= rows
        if window is not None:
            visible = visible & (columns > rows - window)
        if segments is not None:
            row, column = segments[:, first:last, None], segments[:, None, start:last]
            visible = (visible & (row == column) & (row >= 0))[:, None, None]
        scores = torch.matmul(q[..., first:last, :], k[:, :, None, start:last].mT)
        masked = torch.where(visible, scores, -math.inf).amax((0, -2, -1))
        largest = torch.maximum(largest, masked.flatten().to(largest.dtype))
    return largest * scale
