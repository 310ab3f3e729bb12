"""Sparse attention: over pooled blocks or a window, and over blocks that every query selects (NSA, arXiv 2502.11089,
§3).

Three steps that can be used, and tested, on their own:

    o, lse = visible_block_attention(q, ck, cv, …, length=l, stride=d)  over pooled blocks (with l = d = 1, over tokens)
    indices = select_blocks(q, ck, lse, …)                              or any other indices
    o, lse = selected_attention(q, k, v, indices, …)                    over the tokens of those blocks

Legend: B batch, T queries (the last T of S rows), S keys, N slots of pooled blocks (see :mod:`.layout`), H query heads,
G key–value heads (H a multiple), K key channels, V value channels, n selected blocks, Q queries that select.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.ops.dispatch import matmul_dtype
from workbench.ops.sparse_attention import operators
from workbench.ops.sparse_attention.layout import (
    block_overlaps,
    block_starts,
    document_starts,
    group_query_pairs,
    group_query_rows,
    num_blocks,
    num_visible_blocks,
    row_starts,
    selected_pairs,
    unfold_blocks,
    unique_blocks,
    visible_pairs,
)
from workbench.ops.sparse_attention.single import chosen_block_attention, select_for_step, visible_counts

__all__ = [
    "Blocks",
    "block_coverage",
    "block_overlaps",
    "block_starts",
    "chosen_block_attention",
    "document_starts",
    "group_query_pairs",
    "num_blocks",
    "num_visible_blocks",
    "select_blocks",
    "select_for_step",
    "selected_attention",
    "selected_pairs",
    "unfold_blocks",
    "unique_blocks",
    "visible_block_attention",
    "visible_counts",
    "visible_pairs",
]


class Blocks(NamedTuple):
    """Sizes of pooled and selected blocks, in tokens, and how many blocks are selected."""

    length: int
    """Tokens l of a pooled block."""
    stride: int
    """Distance d between the starts of pooled blocks; divides ``length`` and ``block``."""
    block: int
    """Tokens l' of a selection block."""
    selected: int
    """Selected blocks n per query, including the forced ones."""
    initial: int = 1
    """First blocks of the document, always selected."""
    local: int = 2
    """Last blocks up to the query's own, always selected."""
    reuse: int = 1
    """Consecutive positions that use the selection of the first of them; divides ``block``."""


def visible_block_attention(
    q_BTHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor | None = None,
    *,
    start_BT: Tensor,
    offset: int = 0,
    length: int = 1,
    stride: int = 1,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks that end at or before the query in its document.

    Args:
        q_BTHK: queries of the rows ``offset`` to ``offset + T - 1``.
        k_BNGK, v_BNGV: a key and a value per slot; with ``length`` and ``stride`` 1, per row. Without values, the first
            ``value_dim`` channels of the keys are the values.
        start_BT: rows at which the queries' documents start, from :func:`document_starts`.
        window: only the last so many visible blocks; None for all.
        scale: factor on the scores; default 1/sqrt(K).
        softcap: c, scores s become c·tanh(s/c) (arXiv 2408.00118, §2).
        sink_H: a learned score per head that takes part in the softmax with the value zero (arXiv 2309.17453 names
            attention sinks; this form is that of gpt-oss, arXiv 2508.10925).

    Returns:
        (B, T, H, V), zero where nothing is visible; and (B, T, H), the natural log-sum-exp of the scores (without the
            sink),
        -inf where nothing is visible. Both have gradients.
    """
    q, k, v = _cast(q_BTHK, k_BNGK, v_BNGV)
    V = _value_channels(v, value_dim)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, lse = operators._visible(q, k, v, start_BT, V, offset, length, stride, window or 0, scale, softcap or 0.0)
    if sink_H is not None:
        o = (o * (lse - sink_H.to(lse.dtype)).sigmoid()[..., None]).to(o.dtype)
    return o, lse


def selected_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    block_indices: Tensor,
    *,
    block: int,
    start_BT: Tensor,
    offset: int = 0,
    reuse: int = 1,
    scale: float | None = None,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens of selected blocks, up to the query.

    Args:
        q_BTHK, k_BSGK, v_BSGV, start_BT, offset, scale, value_dim: as in :func:`visible_block_attention`; one key per
            row.
        block_indices: (B, T, G, n) int32, or (B, T, 1, n) for one selection of all groups: blocks of ``block`` tokens
            counted from the start of the query's document; -1 for none. No duplicates (see :func:`unique_blocks`).
        reuse: asserts that positions with equal floor(p / reuse) have equal indices.

    Returns:
        as :func:`visible_block_attention`.

    Raises:
        ValueError: if the indices have another number of groups.
    """
    groups, G = block_indices.shape[2], k_BSGK.shape[2]
    if groups not in (1, G):
        raise ValueError(f"selected_attention: block_indices: got {groups} groups; expected 1, or the {G} of the keys.")
    q, k, v = _cast(q_BTHK, k_BSGK, v_BSGV)
    V = _value_channels(v, value_dim)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    starts = row_starts(block_indices, start_BT, block)
    return operators._selected(q, k, v, starts, start_BT, V, offset, block, reuse, scale)


@torch.no_grad()
def select_blocks(
    q_BTHK: Tensor,
    ck_BNGK: Tensor,
    lse_BTH: Tensor,
    *,
    blocks: Blocks,
    start_BT: Tensor,
    num_keys: int,
    offset: int = 0,
    scale: float | None = None,
    previous_BGn: Tensor | None = None,
    budget: Tensor | None = None,
) -> Tensor:
    """The blocks that each query selects: the forced ones, and those with the largest summed probability.

    Probabilities of the pooled blocks, exp(q·k·scale - lse), are summed over the heads of a group and distributed over
    selection blocks by their overlap (:func:`block_overlaps`), in float32 at least.

    Args:
        q_BTHK, start_BT, offset: as in :func:`visible_block_attention`.
        ck_BNGK: pooled keys.
        lse_BTH: from :func:`visible_block_attention` with the same scale.
        num_keys: rows S seen so far, offset + T.
        previous_BGn: the selection of the last position seen, where ``reuse`` > 1 and ``offset`` > 0.
        budget: how many blocks are selected, at most ``blocks.selected``: int32, a scalar on the device, read when the
            operator runs. Default: ``blocks.selected``.

    Returns:
        (B, T, G, n) int32 indices within the document, ascending, padded with -1; n is ``blocks.selected`` whatever the
            budget, and attention over them takes the time of the blocks that are not -1.
    """
    q, ck, _ = _cast(q_BTHK.detach(), ck_BNGK.detach(), None)
    B, T = start_BT.shape
    G, n, reuse = ck.shape[2], blocks.selected, blocks.reuse
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    start_BT = start_BT.to(torch.int32).contiguous()

    def select(q: Tensor, lse: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        sizes = (blocks.length, blocks.stride, blocks.block, n, blocks.initial, blocks.local)
        return operators._select(q, ck, lse.detach(), start, rows, num_keys, *sizes, scale, reuse, budget)

    row_T = torch.arange(offset, offset + T, dtype=torch.int32, device=q.device)
    if reuse == 1:
        return select(q, lse_BTH, start_BT, row_T.expand(B, T).contiguous())
    # the first query of every group of `reuse` positions selects
    rows_BQ = group_query_rows(start_BT, offset, reuse)
    index_BQ = (rows_BQ - offset).clamp_min(0).long()
    by_group_BQGn = select(
        q.gather(1, index_BQ[:, :, None, None].expand(-1, -1, *q.shape[2:])),
        lse_BTH.gather(1, index_BQ[..., None].expand(-1, -1, q.shape[2])),
        start_BT.gather(1, index_BQ),
        rows_BQ,
    )
    # and its selection is copied to the others
    p_BT = row_T - start_BT
    query_row_BT = row_T - p_BT % reuse
    slot_BT = (query_row_BT // reuse - offset // reuse).clamp_min(0).long()
    out = by_group_BQGn.gather(1, slot_BT[:, :, None, None].expand(B, T, G, n))
    first = torch.full((n,), -1, dtype=torch.int32, device=q.device)
    first[:1] = 0  # the first group of a document can only select its first block
    out = torch.where((p_BT < reuse)[:, :, None, None], first, out)
    if previous_BGn is not None:
        out = torch.where((query_row_BT < offset)[:, :, None, None], previous_BGn[:, None], out)
    return out


@torch.no_grad()
def block_coverage(
    q_BTHK: Tensor,
    ck_BNGK: Tensor,
    lse_BTH: Tensor,
    counts_K: Tensor,
    *,
    blocks: Blocks,
    start_BT: Tensor,
    queries: int,
    scale: float | None = None,
    valid_BT: Tensor | None = None,
) -> Tensor:
    """Share of the selection scores that the selected blocks would cover, for several numbers of them.

    Blocks are taken in the order of :func:`select_blocks`, the forced ones first. A query whose blocks have no score
    yet is covered.

    Args:
        q_BTHK, ck_BNGK, lse_BTH, blocks, start_BT, scale: as of :func:`select_blocks`, without an offset.
        counts_K: (K,) numbers of blocks, int32.
        queries: positions of a row, evenly spaced and the last one among them, over which the mean is taken; all of a
            shorter row. With ``blocks.reuse`` the position that selects for each of them.
        valid_BT: positions that count. Default: all.

    Returns:
        (K,) means over queries and groups, fp32 at least.
    """
    q, ck, _ = _cast(q_BTHK.detach(), ck_BNGK.detach(), None)
    T = start_BT.shape[1]
    step = -(-T // queries)
    position_Q = torch.arange((T - 1) % step, T, step, dtype=torch.int32, device=q.device)
    start_BQ = start_BT[:, position_Q].to(torch.int32)
    rows_BQ = position_Q - (position_Q - start_BQ) % blocks.reuse
    index_BQ = rows_BQ.long()
    sizes = (blocks.length, blocks.stride, blocks.block, blocks.initial, blocks.local)
    share_BQGK = operators._coverage(
        q.gather(1, index_BQ[:, :, None, None].expand(-1, -1, *q.shape[2:])),
        ck,
        lse_BTH.detach().gather(1, index_BQ[..., None].expand(-1, -1, q.shape[2])),
        start_BQ,
        rows_BQ,
        counts_K,
        T,
        *sizes,
        1 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )
    if valid_BT is None:
        return share_BQGK.mean((0, 1, 2))
    is_valid_BQ11 = valid_BT[:, position_Q, None, None]
    total = torch.where(is_valid_BQ11, share_BQGK, 0.0).sum((0, 1, 2))
    return total / (is_valid_BQ11.sum() * share_BQGK.shape[2]).clamp_min(1)


def _cast(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = matmul_dtype(k)
    return q.to(dtype), k.to(dtype), None if v is None else v.to(dtype)


def _value_channels(v: Tensor | None, value_dim: int | None) -> int:
    V = v.shape[-1] if v is not None else value_dim
    assert V is not None, "pass values, or value_dim: how many channels of the keys are the values"
    return V
