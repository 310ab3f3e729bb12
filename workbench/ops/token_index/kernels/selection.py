# mypy: allow-untyped-defs
"""Selection: index scores of a chunk of queries, and the best of them.

Legend: B batch, T queries, S keys, C queries of a chunk, E rows up to the last of a chunk, J index heads, X index
channels, n selected tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.chunked import spans
from workbench.ops.sparse_attention.kernels.common import constants
from workbench.ops.sparse_decoding.kernels.choice import select as choose
from workbench.ops.sparse_decoding.layout import Forced
from workbench.ops.token_index.kernels.common import LAUNCH, Heads, Scored, head_sum, same_dtype

LEAST_BYTES = 1025
"""Bytes of a query in the size of chunks: CUDA launches at most 65,535 programs along the axis of queries."""


@triton.jit
def _token_scores(x, start, scores, first, offset, T, S, C, E, heads, BT: tl.constexpr, BN: tl.constexpr):
    """Scores (B, C, E) of the visible keys, counted from the start of the query's document; others are not written."""
    i_t, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c = i_t * BT + tl.arange(0, BT)
    m_t = o_c < C
    o_t = first + o_c
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_start = tl.load(start + i_b * T + o_t, mask=m_t, other=S)
    mask = m_t[:, None] & (o_n[None, :] >= b_start[:, None]) & (o_n[None, :] <= offset + o_t[:, None])
    if tl.max(tl.max(mask.to(tl.int32), axis=1), axis=0) > 0:
        b_score = head_sum(x, i_b, o_t, m_t, o_n, o_n < S, T, S, 1.0, heads, True, BT, BN)
        p_score = scores + ((i_b * C + o_c) * E - b_start)[:, None] + o_n[None, :]
        tl.store(p_score, b_score, mask=mask)


def select(
    q: Tensor, k: Tensor, w: Tensor, start_BT: Tensor, count: int, offset: int, initial: int, local: int
) -> Tensor:
    """(B, T, n) int32. Arguments as of :func:`workbench.ops.token_index.select_tokens`."""
    (B, T), S, (q, k) = q.shape[:2], k.shape[1], same_dtype(q, k)
    start_BT, x, heads = start_BT.contiguous(), Scored(q, k, w.contiguous()), constants(Heads.of(q, 1))
    out = torch.empty(B, T, count, dtype=torch.int32, device=q.device)
    for span in spans(T, B * max(S * 4, LEAST_BYTES)):
        C, E = span.stop - span.start, offset + span.stop
        row_C = torch.arange(offset + span.start, E, dtype=torch.int32, device=q.device)
        length_BC = row_C + 1 - start_BT[:, span]
        if count >= E:  # these queries see no more tokens than they select
            token_n = torch.arange(count, dtype=torch.int32, device=q.device)
            out[:, span] = torch.where(token_n < length_BC[..., None], token_n, -1)
            continue
        scores = torch.empty(B, C, E, dtype=torch.float32, device=q.device)
        settings = LAUNCH["scores"]
        grid = (triton.cdiv(E, settings["BN"]), triton.cdiv(C, settings["BT"]), B)
        _token_scores[grid](x, start_BT, scores, span.start, offset, T, S, C, E, heads, **settings)
        chosen = choose(scores.view(B * C, 1, E), length_BC.flatten(), count, Forced(initial, local), 1)
        out[:, span] = chosen.view(B, C, count)
    return out
