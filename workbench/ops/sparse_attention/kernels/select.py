# mypy: allow-untyped-defs
"""Selection: scores of the blocks of every query, and the best of them.

Legend: B batch, Q queries that select, N slots of pooled blocks, J selection blocks, H query heads, G key–value heads,
R = H / G, K channels, n selected blocks, C queries whose scores are in memory at once; BQ and BJ tiles of queries and
blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.kernels.common import (
    LOG2E,
    Channels,
    constants,
    launch_settings,
    load_rows,
    padded,
    precision,
    visible_bounds,
)
from workbench.ops.sparse_attention.layout import Selection

SCORE_BYTES = 2**28
"""Largest size of the scores in memory."""

INFINITY = tl.constexpr(0x7F800000)
"""Bits of the fp32 infinity."""


class Inputs(NamedTuple):
    """Pointers of the inputs."""

    q: Tensor
    """(B, Q, H, K)"""
    ck: Tensor
    """(B, N, G, K) pooled keys."""
    lse: Tensor
    """(B, Q, H)"""
    start: Tensor
    """(B, Q) row at which the document of each query starts."""
    rows: Tensor
    """(B, Q) row of each query; -1 for none."""


class Sizes(NamedTuple):
    """Run-time numbers of a call."""

    first: int
    """First query whose scores are in memory."""
    Q: int
    C: int
    N: int
    J: int
    H: int
    G: int
    scale: float


class Rule(NamedTuple):
    """Compile-time constants of the scores."""

    R: int
    K: int
    KP: int
    """K padded to a power of two, at least 16."""
    LENGTH: int
    STRIDE: int
    BLOCK: int
    PRECISION: str


class Choice(NamedTuple):
    """Compile-time constants of the choice."""

    BLOCK: int
    INITIAL: int
    LOCAL: int
    JP: int
    """J padded to a power of two."""
    NP: int
    """n padded to a power of two."""


@triton.jit
def _block_scores(x, score, size, rule, BQ: tl.constexpr, BJ: tl.constexpr):
    """Scores (B, G, C, J) of selection blocks for the queries ``first`` to ``first + C - 1``; later blocks are not
    written."""
    i_b, i_g = (tl.program_id(2) // size.G).to(tl.int64), tl.program_id(2) % size.G
    o_c = tl.program_id(0) * BQ + tl.arange(0, BQ)
    o_q = size.first + o_c
    m_q = (o_c < size.C) & (o_q < size.Q)
    b_row = tl.load(x.rows + i_b * size.Q + o_q, mask=m_q, other=-1)
    m_q = m_q & (b_row >= 0)
    b_start = tl.load(x.start + i_b * size.Q + o_q, mask=m_q, other=0)
    low, high = visible_bounds(b_row, b_start, m_q, rule.LENGTH, rule.STRIDE, 0)
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    # [BQ, BJ]
    b_score = tl.zeros((BQ, BJ), tl.float32)
    if tl.program_id(1) * BJ <= tl.max(tl.where(m_q, (b_row - b_start) // rule.BLOCK, -1)):
        # the documents of the tile one after another: their blocks are in different slots
        base = tl.min(tl.where(m_q, low, size.N))
        while base < size.N:
            in_document = m_q & (low == base)
            # every pooled block that overlaps a selection block, weighted by the overlap
            for m in range(1 - rule.LENGTH // rule.STRIDE, rule.BLOCK // rule.STRIDE):
                o_n = o_j * (rule.BLOCK // rule.STRIDE) + m
                in_bounds = (o_n >= 0) & (base + o_n < size.N)
                weight = (
                    tl.minimum(m * rule.STRIDE + rule.LENGTH, rule.BLOCK) - tl.maximum(m * rule.STRIDE, 0)
                ) / rule.STRIDE
                # [BJ, KP]
                b_k = load_rows(
                    x.ck + i_b * size.N * size.G * rule.K + i_g * rule.K,
                    (base + o_n).to(tl.int64),
                    size.G * rule.K,
                    in_bounds,
                    rule.K,
                    rule.KP,
                )
                mask = in_document[:, None] & in_bounds[None, :] & (base + o_n[None, :] < high[:, None])
                for r in range(rule.R):
                    o_query = (i_b * size.Q + o_q) * size.H + i_g * rule.R + r
                    # [BQ, KP]
                    b_q = load_rows(x.q, o_query, rule.K, m_q, rule.K, rule.KP)
                    b_lse = tl.load(x.lse + o_query, mask=m_q, other=0.0).to(tl.float32)
                    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)
                    # [BQ, BJ]
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=rule.PRECISION) * size.scale
                    b_score += tl.where(mask, tl.exp2((b_s - b_lse[:, None]) * LOG2E) * weight, 0.0)
            base = tl.min(tl.where(m_q & (low > base), low, size.N))
        p_score = score + ((i_b * size.G + i_g) * size.C + o_c[:, None]) * size.J + o_j[None, :]
        tl.store(p_score, b_score, mask=(o_c < size.C)[:, None] & (o_j < size.J)[None, :])


@triton.jit
def _best_blocks(score, start, rows, budget, indices, size, n, choice):
    """Indices of the n largest scores of one query and group, ascending; of equal scores the lower index. A budget,
    read at run time, leaves so many of the n."""
    i_c = tl.program_id(0)
    i_b, i_g = (tl.program_id(1) // size.G).to(tl.int64), tl.program_id(1) % size.G
    row, begin = tl.load(rows + i_b * size.Q + size.first + i_c), tl.load(start + i_b * size.Q + size.first + i_c)
    query_block = tl.where(row >= 0, (row - begin) // choice.BLOCK, -1)
    count = n if budget is None else tl.load(budget)
    # 1. scores as integers of the same order: positive floats are ordered as their bits
    o_j = tl.arange(0, choice.JP)
    visible = (o_j <= query_block) & (o_j < size.J)
    p_score = score + ((i_b * size.G + i_g) * size.C + i_c) * size.J + o_j
    b_score = tl.load(p_score, mask=visible, other=0.0)
    forced = (o_j < choice.INITIAL) | (o_j > query_block - choice.LOCAL)
    b_key = tl.where(forced, INFINITY, b_score.to(tl.int32, bitcast=True))
    b_key = tl.where(visible, b_key, -1)
    # 2. the key of the last block to choose, by bisection from the highest bit down
    threshold = 0
    for bit in range(31):
        higher = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((b_key >= higher).to(tl.int32)) >= count, higher, threshold)
    # 3. all keys above it, and of those equal to it the first
    above, equal = b_key > threshold, b_key == threshold
    num_equal = count - tl.sum(above.to(tl.int32))
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= num_equal))
    o_out = tl.cumsum(chosen.to(tl.int32), 0) - 1
    indices += ((i_b * size.Q + size.first + i_c) * size.G + i_g) * n
    tl.store(indices + o_out, o_j, mask=chosen)
    o_n = tl.arange(0, choice.NP)
    unused = (o_n >= tl.sum(chosen.to(tl.int32))) & (o_n < n)
    tl.store(indices + o_n, tl.full((choice.NP,), -1, tl.int32), mask=unused)


def select(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    selection: Selection,
    budget: Tensor | None = None,
) -> Tensor:
    """(B, Q, G, n) int32 blocks, ascending, padded with -1; at most ``budget`` of them where one is given."""
    (B, Q, H, K), (N, G), n = q.shape, ck.shape[1:3], selection.selected
    J = triton.cdiv(selection.num_keys, selection.block)
    indices = torch.empty(B, Q, G, n, dtype=torch.int32, device=q.device)
    C = min(Q, max(64, SCORE_BYTES // (4 * B * G * J)))
    score = torch.empty(B, G, C, J, dtype=torch.float32, device=q.device)
    if N == 0:
        score.zero_()
    BJ, JP = min(64, padded(J)), triton.next_power_of_2(J)
    BQ = min(64 if K <= 128 else 32, padded(Q))
    inputs = Inputs(q, ck, lse_BQH, start_BQ, rows_BQ)
    rule = Rule(H // G, K, padded(K), selection.length, selection.stride, selection.block, precision(q))
    choice = Choice(selection.block, selection.initial, selection.local, JP, triton.next_power_of_2(n))
    settings = launch_settings("block_scores", Channels.of(q, q, K))
    for first in range(0, Q, C):
        count = min(C, Q - first)
        size = Sizes(first, Q, C, N, J, H, G, selection.scale)
        if N:
            grid = (triton.cdiv(count, BQ), triton.cdiv(J, BJ), B * G)
            _block_scores[grid](inputs, score, size, constants(rule), BQ=BQ, BJ=BJ, **settings)
        warps = 1 if JP <= 512 else 4
        arguments = (score, start_BQ, rows_BQ, budget, indices, size, n, constants(choice))
        _best_blocks[(count, B * G)](*arguments, num_warps=warps)
    return indices
