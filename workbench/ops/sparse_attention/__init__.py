"""Attention over few keys: runs of keys or of pooled blocks, and blocks that every query selects (arXiv 2502.11089).

Three steps that can be used, and tested, by themselves:

    o, lse = visible_block_attention(q, ck, cv, …, length=l, stride=d)     over pooled blocks (or, with l = d = 1, over tokens)
    indices = select_blocks(q, ck, lse, …)                                 which blocks; any other indices may stand in their place
    o, lse = selected_attention(q, k, v, indices, …)                over the tokens of those blocks

Legend: B batch, T queries (the last T of S rows), S keys, N slots of pooled blocks (see :mod:`.layout`), H query heads,
G key–value heads (H a multiple), K key channels, V value channels, n selected blocks.
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

__all__ = [
    "Blocks",
    "block_overlaps",
    "block_starts",
    "document_starts",
    "group_query_pairs",
    "num_blocks",
    "num_visible_blocks",
    "select_blocks",
    "selected_attention",
    "selected_pairs",
    "unfold_blocks",
    "unique_blocks",
    "visible_block_attention",
    "visible_pairs",
]


class Blocks(NamedTuple):
    """Sizes of pooled and selected blocks, in tokens unless said otherwise."""

    length: int
    """Tokens l of a pooled block."""
    stride: int
    """Distance d between the starts of pooled blocks; divides ``length`` and ``block``."""
    block: int
    """Tokens l' of a selection block."""
    selected: int
    """Selected blocks n, the forced ones included."""
    initial: int = 1
    """First blocks of the document that are always selected."""
    local: int = 2
    """Last blocks up to the query's own that are always selected."""
    reuse: int = 1
    """Consecutive positions that go by the selection of the first of them; divides ``block``."""


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
    """Softmax attention over the blocks that lie wholly at or before the query in its document.

    Args:
        q_BTHK: queries at the rows ``offset`` to ``offset + T - 1``.
        k_BNGK, v_BNGV: a key and a value for every slot; with ``length`` and ``stride`` 1, for every row. Without values,
            the first ``value_dim`` channels of the keys are the values.
        start_BT: from :func:`document_starts`; the rows where the queries' documents begin.
        window: only the last so many visible blocks; None for all.
        scale: default 1/sqrt(K).
        softcap: scores s become c·tanh(s/c) (arXiv 2408.00118, §2).
        sink_H: a learned score for every head that takes part in the softmax and has the value zero (arXiv 2309.17453 names
            attention sinks; this form is that of gpt-oss, arXiv 2508.10925).

    Returns:
        (B, T, H, V), zero where nothing is visible; and (B, T, H), the natural log-sum-exp of the scores (without the sink),
        -inf where nothing is visible. Both have gradients.
    """
    q, k, v = _cast(q_BTHK, k_BNGK, v_BNGV)
    V = v.shape[-1] if v is not None else value_dim
    assert V is not None, "values, or how many channels of the keys they are"
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, lse = operators._range(q, k, v, start_BT, V, offset, length, stride, window or 0, scale, softcap or 0.0)
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
    """Softmax attention over the tokens s ≤ p of chosen blocks.

    Args:
        q_BTHK, k_BSGK, v_BSGV, start_BT, offset, scale, value_dim: as in :func:`visible_block_attention`, keys by row.
        block_indices: (B, T, G, n) int32, blocks of ``block`` tokens counted from the start of the query's document; -1 for
            none. Each at most once (see :func:`unique_blocks`).
        reuse: a promise that positions with equal floor(p / reuse) hold the same indices.

    Returns:
        as :func:`visible_block_attention`.
    """
    q, k, v = _cast(q_BTHK, k_BSGK, v_BSGV)
    V = v.shape[-1] if v is not None else value_dim
    assert V is not None, "values, or how many channels of the keys they are"
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
) -> Tensor:
    """The blocks that each query selects: those with the greatest summed probability, and the forced ones.

    The probabilities of the pooled blocks, exp(q·k·scale - lse), are summed over the heads of a group and spread over
    selection blocks by their overlap; everything in fp32 at least.

    Args:
        lse_BTH: from :func:`visible_block_attention` with the same scale.
        num_keys: rows S seen so far, offset + T.
        previous_BGn: where ``reuse`` > 1 and ``offset`` > 0, the selection of the last position seen.

    Returns:
        (B, T, G, n) int32 indices within the document, ascending, -1 behind them.
    """
    q, ck, _ = _cast(q_BTHK.detach(), ck_BNGK.detach(), None)
    B, T = start_BT.shape
    G, n, reuse = ck.shape[2], blocks.selected, blocks.reuse
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    start_BT = start_BT.to(torch.int32).contiguous()

    def select(q: Tensor, lse: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        return operators._select(
            q,
            ck,
            lse.detach(),
            start,
            rows,
            num_keys,
            blocks.length,
            blocks.stride,
            blocks.block,
            n,
            blocks.initial,
            blocks.local,
            scale,
            reuse,
        )

    row_T = torch.arange(offset, offset + T, dtype=torch.int32, device=q.device)
    if reuse == 1:
        return select(q, lse_BTH, start_BT, row_T.expand(B, T).contiguous())
    rows_BQ = group_query_rows(start_BT, offset, reuse)
    at_BQ = (rows_BQ - offset).clamp_min(0).long()
    by_leader_BQGn = select(
        q.gather(1, at_BQ[:, :, None, None].expand(-1, -1, *q.shape[2:])),
        lse_BTH.gather(1, at_BQ[..., None].expand(-1, -1, q.shape[2])),
        start_BT.gather(1, at_BQ),
        rows_BQ,
    )
    p_BT = row_T - start_BT
    leader_BT = row_T - p_BT % reuse
    slot_BT = (leader_BT // reuse - offset // reuse).clamp_min(0).long()
    out = by_leader_BQGn.gather(1, slot_BT[:, :, None, None].expand(B, T, G, n))
    first = torch.full((n,), -1, dtype=torch.int32, device=q.device)
    first[:1] = 0  # the first group of a document can only choose its first block
    out = torch.where((p_BT < reuse)[:, :, None, None], first, out)
    if previous_BGn is not None:
        out = torch.where((leader_BT < offset)[:, :, None, None], previous_BGn[:, None], out)
    return out


def _cast(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = matmul_dtype(k)
    return q.to(dtype), k.to(dtype), None if v is None else v.to(dtype)
