"""Blocks in rows of packed documents. Everything has a fixed shape; nothing synchronises with the device.

Positions p, pooled (compression) blocks i and selection blocks j count from 0 within a document; "rows" count within
the packed row. Pooled block i of a document that starts at row a covers the rows a + i·d to a + i·d + l - 1. Whole
blocks of one row start at least d apart (a stride d within a document, a length l ≥ d between documents), so the slot
floor(start / d) holds at most one: slot = floor(a / d) + i. A block is visible to a query at position p when i·d + l -
1 ≤ p, hence

    N_cmp(p) = 0 if p + 1 < l else floor((p + 1 - l) / d) + 1        (arXiv 2502.11089, the size of the set in eq. 7)

Selection block j covers the rows a + j·l' to a + (j + 1)·l' - 1, cut off at the query (and so at the end of the
document).

Legend: B batch, T queries, S keys, N slots of pooled blocks, Q queries that select, G key–value heads, n selected
blocks.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class VisibleBlocks(NamedTuple):
    """Arguments of attention over visible blocks."""

    offset: int
    """Row of the first query."""
    length: int
    stride: int
    window: int
    """Last so many visible blocks; 0 for all."""
    scale: float
    softcap: float
    """0 for none."""


class SelectedBlocks(NamedTuple):
    """Arguments of attention over selected blocks."""

    offset: int
    block: int
    reuse: int
    scale: float


class Selection(NamedTuple):
    """Arguments of the selection."""

    num_keys: int
    length: int
    stride: int
    block: int
    selected: int
    initial: int
    local: int
    scale: float


def document_starts(segments_BT: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, T) int32: the row at which each position's document starts. Tokens of a document are contiguous."""
    if segments_BT is None:
        return torch.zeros(batch, length, dtype=torch.int32, device=device)
    row_T = torch.arange(length, dtype=torch.int32, device=device)
    is_first_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return torch.where(is_first_BT, row_T, 0).cummax(dim=1).values.to(torch.int32)


def num_blocks(num_keys: int, length: int, stride: int) -> int:
    """Slots N in which whole pooled blocks of ``num_keys`` rows can start."""
    return (num_keys - length) // stride + 1 if num_keys >= length else 0


def block_starts(start_BT: Tensor, segments_BT: Tensor | None, length: int, stride: int) -> Tensor:
    """(B, N) int64: the row at which the whole pooled block of each slot starts; -1 for an empty slot."""
    B, T = start_BT.shape
    N = num_blocks(T, length, stride)
    if segments_BT is None:
        return (torch.arange(N, device=start_BT.device) * stride).expand(B, N)
    if N == 0:
        return start_BT.new_empty((B, 0), dtype=torch.int64)
    row_T = torch.arange(T, device=start_BT.device)
    end = T - length + 1  # rows at which l tokens are left
    is_whole_BT = ((row_T - start_BT) % stride == 0)[:, :end] & (start_BT[:, length - 1 :] == start_BT[:, :end])
    rows_BT = torch.where(is_whole_BT, row_T[:end], -1)
    padded = torch.nn.functional.pad(rows_BT, (0, N * stride - end), value=-1)
    return padded.view(B, N, stride).amax(-1)


def block_overlaps(length: int, stride: int, block: int) -> list[tuple[int, float]]:
    """Weights of pooled blocks in the score of a selection block: eq. 9 of arXiv 2502.11089, written as overlaps.

    p_slc[j] = Σ_i |[i·d, i·d + l) ∩ [j·l', (j + 1)·l')| / d · p_cmp[i], for d | l and d | l'; every block i of the sum
    is j·l'/d + m. The printed sum is this one with j and i counted from 1.

    Returns:
        the pairs (m, weight).
    """
    pairs = []
    for m in range(1 - length // stride, block // stride):
        overlap = min(m * stride + length, block) - max(m * stride, 0)
        pairs.append((m, overlap / stride))
    return pairs


def num_visible_blocks(position: int, length: int, stride: int) -> int:
    """N_cmp of a position."""
    return 0 if position + 1 < length else (position + 1 - length) // stride + 1


def visible_pairs(queries: int, num_keys: int, length: int, stride: int, window: int) -> int:
    """Pairs (query, visible block) of one document, of its last ``queries`` of ``num_keys`` rows; window 0 for none."""
    return _pairs_before(num_keys, length, stride, window) - _pairs_before(num_keys - queries, length, stride, window)


def _pairs_before(positions: int, length: int, stride: int, window: int) -> int:
    seeing = max(0, positions - length + 1)
    rising = min(seeing, window * stride) if window else seeing  # beyond, every query sees the whole window
    groups, rest = divmod(rising, stride)
    return stride * groups * (groups + 1) // 2 + rest * (groups + 1) + (seeing - rising) * window


def selected_pairs(queries: int, num_keys: int, block: int, selected: int) -> int:
    """Pairs (query, selected token) of one document, of its last ``queries`` of ``num_keys`` rows.

    A query at position p sees p mod l' + 1 tokens of its own block, which is always selected, and all tokens of
    min(n - 1, floor(p / l')) earlier ones.
    """
    before = num_keys - queries
    return _selected_before(num_keys, block, selected) - _selected_before(before, block, selected)


def _selected_before(positions: int, block: int, selected: int) -> int:
    whole, rest = divmod(positions, block)
    rising = min(whole, selected - 1)  # blocks whose queries select every earlier block
    earlier = rising * (rising - 1) // 2 + (whole - rising) * (selected - 1)
    own = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    return own + block * (block * earlier + rest * rising)


@cache
def group_query_pairs(num_keys: int, length: int, stride: int, reuse: int) -> int:
    """Pairs (query, visible block) of the queries that select for ``reuse`` positions."""
    if reuse == 1:
        return visible_pairs(num_keys, num_keys, length, stride, 0)
    return sum(num_visible_blocks(p, length, stride) for p in range(0, num_keys, reuse))


def unfold_blocks(x_BTGC: Tensor, rows_BN: Tensor | None, length: int, stride: int) -> Tensor:
    """The tokens of every slot's block, (B, N, G, C, l).

    Args:
        rows_BN: from :func:`block_starts`; None for one document. Empty slots hold arbitrary tokens.
    """
    if x_BTGC.shape[1] < length:
        return x_BTGC.new_zeros(x_BTGC.shape[0], 0, *x_BTGC.shape[2:], length)
    if rows_BN is None:
        return x_BTGC.unfold(1, length, stride)
    N = rows_BN.shape[1]
    # no token is read twice within the window of a slot, so the gradient is summed in one order
    wide = torch.nn.functional.pad(x_BTGC, (0, 0, 0, 0, 0, stride - 1)).unfold(1, length + stride - 1, stride)[:, :N]
    shift_BN = (rows_BN - torch.arange(N, device=rows_BN.device) * stride).clamp_min(0)
    index = shift_BN[:, :, None] + torch.arange(length, device=rows_BN.device)
    return wide.gather(-1, index[:, :, None, None].expand(*wide.shape[:-1], length))


def row_starts(indices_BTGn: Tensor, start_BT: Tensor, block: int) -> Tensor:
    """Block indices within the document as the rows at which the blocks start, int32; -1 for none in both."""
    rows = start_BT[:, :, None, None] + indices_BTGn * block
    return torch.where(indices_BTGn >= 0, rows, -1).to(torch.int32)


def unique_blocks(indices_BTGn: Tensor) -> Tensor:
    """Indices in ascending order without duplicates, padded with -1."""
    ordered = indices_BTGn.sort(dim=-1, stable=True).values
    is_duplicate = torch.zeros_like(ordered, dtype=torch.bool)
    is_duplicate[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    last = torch.iinfo(ordered.dtype).max
    ordered = torch.where(is_duplicate | (ordered < 0), last, ordered).sort(dim=-1, stable=True).values
    return torch.where(ordered == last, -1, ordered)


def group_query_rows(start_BT: Tensor, offset: int, reuse: int) -> Tensor:
    """(B, Q) int32 rows of the queries that select for ``reuse`` consecutive positions of their document; -1 for none.

    The first group of a document is left out: it can only select block 0. The other selecting queries are at least
    ``reuse`` rows apart, so slot floor(row / reuse) holds at most one; slots count from that of row ``offset``.
    """
    B, T = start_BT.shape
    row_T = torch.arange(offset, offset + T, dtype=torch.int32, device=start_BT.device)
    p_BT = row_T - start_BT
    rows_BT = torch.where((p_BT % reuse == 0) & (p_BT > 0), row_T, -1)
    before = offset % reuse
    Q = (before + T + reuse - 1) // reuse
    padded = torch.nn.functional.pad(rows_BT, (before, Q * reuse - before - T), value=-1)
    return padded.view(B, Q, reuse).amax(-1)
