# mypy: allow-untyped-defs
"""Divergence of the index from attention, and its gradients, tile by tile of pairs of a query and a key.

Forward: the log-sum-exp of every head; then each tile has its part of Σ p (log p - I), and the log-sum-exp of its index
scores, which a few sums put together. Backward: the gradient of the index scores of a chunk of queries, computed once,
is read by the kernels of its queries and weights, and of its keys.

Legend as in the package, and C queries of a chunk, W words of 64 keys; BT and BN tiles of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.kernels.common import constants, load_lse, load_rows, store_rows
from workbench.ops.sparse_attention.kernels.marks import (
    KEYS,
    ROWS,
    Marked,
    has_bit,
    load_words,
    marked_chunks,
    token_words,
    visible_words,
)
from workbench.ops.sparse_attention.kernels.tokens import normalisers
from workbench.ops.sparse_attention.layout import row_starts
from workbench.ops.token_index.kernels.common import LAUNCH, PART_HEADS, Heads, Scored, head_sum, same_dtype


@triton.jit
def _divergence_tiles(
    attention, index, words, parts, T, S, scale, chunk, heads, index_heads, BT: tl.constexpr, BN: tl.constexpr
):
    """Parts (2, B, C, W) of a tile: Σ p (log p - I), and the log-sum-exp of I."""
    i_n, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_c, o_n = tl.program_id(1) * BT + tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_t, m_n = o_c < chunk.C, o_n < S
    o_t = chunk.first + o_c
    b_word = load_words(words, i_b, 0, o_c, m_t, i_n, chunk)
    b_sum = tl.zeros((BT,), tl.float32)
    b_lse = tl.full((BT,), -float("inf"), tl.float32)
    if tl.max((b_word != 0).to(tl.int32), axis=0) > 0:
        mask = has_bit(b_word[:, None], o_n[None, :])
        b_p = head_sum(attention, i_b, o_t, m_t, o_n, m_n, T, S, scale, heads, False, BT, BN) / heads.H
        b_p = tl.where(mask, b_p, 0.0)
        b_i = head_sum(index, i_b, o_t, m_t, o_n, m_n, T, S, 1.0, index_heads, True, BT, BN)
        b_sum = tl.sum(tl.where(b_p > 0, b_p * (tl.log(tl.where(b_p > 0, b_p, 1.0)) - b_i), 0.0), axis=1)
        b_i = tl.where(mask, b_i, -float("inf"))
        b_m = tl.max(b_i, axis=1)
        any_key = b_m > -float("inf")
        b_m = tl.where(any_key, b_m, 0.0)
        b_l = tl.sum(tl.exp(b_i - b_m[:, None]), axis=1)
        b_lse = tl.where(any_key, b_m + tl.log(tl.where(any_key, b_l, 1.0)), -float("inf"))
    p_part = parts + (i_b * chunk.C + o_c) * chunk.W + i_n
    tl.store(p_part, b_sum, mask=m_t)
    tl.store(p_part + tl.num_programs(2).to(tl.int64) * chunk.C * chunk.W, b_lse, mask=m_t)


@triton.jit
def _gradient_tiles(
    attention,
    index,
    words,
    index_lse,
    dkl,
    ds,
    T,
    S,
    scale,
    chunk,
    heads,
    index_heads,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients (B, C, W, 64) of index scores; tiles without a bit are not written, nor listed for those who read."""
    i_n, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_c, o_n = tl.program_id(1) * BT + tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_t, m_n = o_c < chunk.C, o_n < S
    o_t = chunk.first + o_c
    b_word = load_words(words, i_b, 0, o_c, m_t, i_n, chunk)
    if tl.max((b_word != 0).to(tl.int32), axis=0) > 0:
        mask = has_bit(b_word[:, None], o_n[None, :])
        b_p = head_sum(attention, i_b, o_t, m_t, o_n, m_n, T, S, scale, heads, False, BT, BN) / heads.H
        b_i = head_sum(index, i_b, o_t, m_t, o_n, m_n, T, S, 1.0, index_heads, True, BT, BN)
        b_pi = tl.exp(b_i - load_lse(index_lse, i_b * T + o_t, m_t)[:, None])
        b_dkl = tl.load(dkl + i_b * T + o_t, mask=m_t, other=0.0)
        b_ds = tl.where(mask, b_dkl[:, None] * (b_pi - b_p), 0.0)
        p_ds = ds + ((i_b * chunk.C + o_c) * chunk.W)[:, None] * BN + o_n[None, :]
        tl.store(p_ds, b_ds.to(ds.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def _index_queries(x, marks, ds, dq, dw, T, S, chunk, heads, BT: tl.constexpr, BN: tl.constexpr):
    """Gradients of a tile of queries of one index head, and of its weights."""
    i_t, i_j, i_b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c = i_t * BT + tl.arange(0, BT)
    m_t = o_c < chunk.C
    o_q = (i_b * T + chunk.first + o_c) * heads.H + i_j
    # [BT, DP]
    b_q = load_rows(x.q, o_q, heads.D, m_t, heads.D, heads.DP)
    b_dq = tl.zeros((BT, heads.DP), tl.float32)
    b_dw = tl.zeros((BT,), tl.float32)
    i_list = i_b * chunk.tiles + i_t * BT // ROWS
    for i in range(0, tl.load(marks.words_of + i_list)):
        o_n = tl.load(marks.by_query + i_list * chunk.W + i) * BN + tl.arange(0, BN)
        # [BN, DP], [BT, BN]
        b_k = load_rows(x.k, i_b * S + o_n, heads.D, o_n < S, heads.D, heads.DP)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=heads.PRECISION)
        p_ds = ds + ((i_b * chunk.C + o_c) * chunk.W)[:, None] * BN + o_n[None, :]
        b_ds = tl.load(p_ds, mask=m_t[:, None], other=0.0)
        b_dw += tl.sum(b_ds.to(tl.float32) * tl.maximum(b_s, 0.0), axis=1)
        b_dq += tl.dot(tl.where(b_s > 0, b_ds, 0.0).to(b_k.dtype), b_k, input_precision=heads.PRECISION)
    b_w = tl.load(x.w + o_q, mask=m_t, other=0.0).to(tl.float32)
    store_rows(dq, o_q, heads.D, m_t, b_dq * b_w[:, None], heads.D, heads.DP)
    tl.store(dw + o_q, b_dw.to(dw.dtype.element_ty), mask=m_t)


@triton.jit
def _index_keys(
    x,
    marks,
    ds,
    dk,
    T,
    S,
    chunk,
    heads,
    BT: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Gradients (B, S, parts, X) of a tile of keys, summed over HEADS index heads; added to those of earlier chunks of
    queries where ADDS."""
    i_n, i_part, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < S
    # [BN, DP]
    b_k = load_rows(x.k, i_b * S + o_n, heads.D, m_n, heads.D, heads.DP)
    b_dk = tl.zeros((BN, heads.DP), tl.float32)
    i_list = i_b * chunk.W + i_n
    PER_TILE: tl.constexpr = ROWS // BT * HEADS
    for i in range(0, tl.load(marks.tiles_of + i_list) * PER_TILE):
        i_tile, i_part_of_tile = i // PER_TILE, i // HEADS
        i_part_of_tile -= i_tile * (ROWS // BT)
        first = tl.load(marks.by_key + i_list * chunk.tiles + i_tile) * ROWS + i_part_of_tile * BT
        o_c = first + tl.arange(0, BT)
        m_t = o_c < chunk.C
        o_q = (i_b * T + chunk.first + o_c) * heads.H + i_part * HEADS + i % HEADS
        # [BT, DP], [BN, BT]
        b_q = load_rows(x.q, o_q, heads.D, m_t, heads.D, heads.DP)
        b_w = tl.load(x.w + o_q, mask=m_t, other=0.0).to(tl.float32)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=heads.PRECISION)
        p_ds = ds + ((i_b * chunk.C + o_c) * chunk.W)[:, None] * BN + o_n[None, :]
        b_ds = tl.trans(tl.load(p_ds, mask=m_t[:, None], other=0.0)).to(tl.float32)
        b_da = tl.where(b_s > 0, b_ds * b_w[None, :], 0.0)
        b_dk = tl.dot(b_da.to(b_q.dtype), b_q, b_dk, input_precision=heads.PRECISION)
    o_key = (i_b * S + o_n) * tl.num_programs(1) + i_part
    if ADDS:
        b_dk += load_rows(dk, o_key, heads.D, m_n, heads.D, heads.DP)
    store_rows(dk, o_key, heads.D, m_n, b_dk, heads.D, heads.DP)


class _Launch:
    """Arguments that the kernels of one call share; everything contiguous."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        queries: Tensor,
        keys: Tensor,
        tokens: Tensor | None,
        start_BT: Tensor,
        scale: float,
    ):
        self.q, self.k = same_dtype(q, k)
        self.queries, self.keys = same_dtype(queries, keys)
        (self.B, self.T), self.S, self.scale = q.shape[:2], k.shape[1], scale
        self.index, self.index_heads = Scored(self.q, self.k, w.contiguous()), Heads.of(self.q, 1)
        self.heads = constants(Heads.of(self.queries, keys.shape[2]))
        self.W = triton.cdiv(self.S, KEYS.value)
        if tokens is None:
            self.words = visible_words(start_BT, self.S)
        else:
            self.words = token_words(row_starts(tokens[:, :, None], start_BT, 1).contiguous(), 0, self.S)

    def chunks(self, bytes_per_key: int) -> Iterator[Marked]:
        """Marked chunks of queries, of which a tensor has so many bytes for every key."""
        return marked_chunks(self.words, self.T, self.B * self.W * KEYS.value * bytes_per_key)

    def by_tile(self, kernel: Any, name: str, marked: Marked, lse: Tensor, *arguments: Any) -> None:
        """Launches a program per tile of pairs."""
        settings, chunk = LAUNCH[name], marked.chunk
        # whole tiles of the lists: what a listed tile has is written, with bits or without
        assert settings["BT"] % ROWS.value == 0 and settings["BN"] == KEYS.value
        kernel[(self.W, triton.cdiv(chunk.C, settings["BT"]), self.B)](
            Scored(self.queries, self.keys, lse),
            self.index,
            marked.marks.words,
            *arguments,
            self.T,
            self.S,
            self.scale,
            chunk,
            self.heads,
            constants(self.index_heads),
            **settings,
        )


def divergence(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    start_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(B, T), and log-sum-exps (B, T, H + 1). Arguments as of :func:`workbench.ops.token_index.index_divergence`."""
    launch = _Launch(q, k, w, queries, keys, tokens, start_BT, scale)
    B, T, H = queries.shape[:3]
    lse_BTH = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    out, index_lse = (torch.empty(B, T, dtype=torch.float32, device=q.device) for _ in range(2))
    for marked in launch.chunks(bytes_per_key=1):
        normalisers(launch.queries, launch.keys, lse_BTH, marked, scale)
        parts = torch.empty(2, B, marked.chunk.C, launch.W, dtype=torch.float32, device=q.device)
        launch.by_tile(_divergence_tiles, "divergence", marked, lse_BTH, parts)
        index_lse[:, marked.span] = lse = parts[1].logsumexp(-1)
        out[:, marked.span] = parts[0].sum(-1) + torch.where(lse > -math.inf, lse, 0.0)
    return out, torch.cat((lse_BTH, index_lse[..., None]), -1)


def divergence_backward(
    dkl: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    start_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of index queries, index keys and weights. ``lse``: log-sum-exps of :func:`divergence`."""
    launch = _Launch(q, k, w, queries, keys, tokens, start_BT, scale)
    (B, T, J, X), S, index = q.shape, k.shape[1], launch.index
    heads = launch.index_heads._replace(DP=max(64, triton.next_power_of_2(X)))
    shared, per_part = (T, S), J // math.gcd(J, PART_HEADS)
    lse_BTH, index_lse, dkl = lse[..., :-1].contiguous(), lse[..., -1].contiguous(), dkl.contiguous()
    dq, dw = torch.empty_like(index.q), torch.empty_like(index.w)
    dk = torch.empty(B, S, J // per_part, X, dtype=torch.float32, device=q.device)
    for marked in launch.chunks(bytes_per_key=index.q.element_size()):
        ds = torch.empty(B, marked.chunk.C, launch.W, KEYS.value, dtype=index.q.dtype, device=q.device)
        launch.by_tile(_gradient_tiles, "gradients", marked, lse_BTH, index_lse, dkl, ds)
        of_marks, settings = (index, marked.marks, ds), LAUNCH["index_queries"]
        _index_queries[(triton.cdiv(marked.chunk.C, settings["BT"]), J, B)](
            *of_marks, dq, dw, *shared, marked.chunk, constants(heads), BN=KEYS.value, **settings
        )
        _index_keys[(launch.W, J // per_part, B)](
            *of_marks,
            dk,
            *shared,
            marked.chunk,
            constants(heads),
            HEADS=per_part,
            ADDS=marked.span.start > 0,
            BN=KEYS.value,
            **LAUNCH["index_keys"],
        )
    return dq.to(q.dtype), dk.sum(2).to(k.dtype), dw.to(w.dtype)
