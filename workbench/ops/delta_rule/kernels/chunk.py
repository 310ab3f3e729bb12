# mypy: allow-untyped-defs
"""What a chunk needs before its incoming state is known, and the device code that all kernels of the delta rule
share."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MAX_NATS = tl.constexpr(64.0)
"""Largest decay between the middle of a chunk and its ends for which the middle can be the reference of all its pairs:
their two factors, e^±64, stay far inside the range of bf16."""


class Inputs(NamedTuple):
    """Pointers of the inputs."""

    q: Tensor
    """(B, T, H, K)"""
    k: Tensor
    """(B, T, H, K) write keys."""
    e: Tensor
    """(B, T, H, K) erase keys; the write keys where these are tied."""
    v: Tensor
    """(B, T, H, V), heads contiguous."""
    g: Tensor
    """(B, T, H) or (B, T, H, K) log-decay."""
    beta: Tensor
    """(B, T, H); unused where there is none."""
    segments: Tensor
    """(B, T); unused where there are none."""


class Chunks(NamedTuple):
    """Pointers of what :func:`prepare_chunks` computes. Channels are those of one head; rows are padded to whole
    chunks."""

    q_in: Tensor
    """(B·H, N·C, K) queries as they meet the incoming state, q exp G."""
    y: Tensor
    """(B·H, N·C, K)"""
    u: Tensor
    """(B·H, N·C, V)"""
    k_out: Tensor
    """(B·H, N·C, K) write keys as they enter the outgoing state, k exp(G_C - G)."""
    passing: Tensor
    """(B·H, N, K) decay of the state over the chunk, exp G_C."""


class Sizes(NamedTuple):
    """Run-time numbers of a call."""

    T: int
    N: int
    v_batch: int
    """Stride of the values from sequence to sequence."""
    v_row: int
    """Stride of the values from token to token."""


class Form(NamedTuple):
    """Compile-time constants of a call."""

    H: int
    K: int
    V: int
    C: int
    BK: int
    """Key channels of a tile."""
    BV: int
    """Value channels of a tile."""
    CHANNEL: bool
    """Whether the decay is per channel."""
    BETA: bool
    TIED: bool
    """Whether the erase keys are the write keys."""
    SEGMENTS: bool
    PRECISION: str
    """Input precision of products."""


@triton.jit
def selected_sums(selection, b_x, PRECISION: tl.constexpr):
    """Σ_i selection[r, i] x[i]: (C, C) of -1, 0 and 1, (C, D) fp32 -> (C, D); to 16 bits of the sum of magnitudes, or
    fp32."""
    if PRECISION == "tf32x3":
        return tl.dot(selection.to(tl.float32), b_x, input_precision="tf32x3")
    else:
        b_selection = selection.to(tl.bfloat16)
        b_high = b_x.to(tl.bfloat16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(b_selection, b_high) + tl.dot(b_selection, b_low)


@triton.jit
def load_tile(x, o_t, m_t, row_stride, o_d, D):
    """(rows, columns) of x, zero where masked or beyond D columns."""
    p = x + o_t.to(tl.int64)[:, None] * row_stride + o_d[None, :]
    return tl.load(p, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def head_decay(g, o_t, m_t, H):
    """(C,) g of one head and its running sum."""
    b_g = tl.load(g + o_t.to(tl.int64) * H, mask=m_t, other=0.0).to(tl.float32)
    return b_g, tl.cumsum(b_g, axis=0)


@triton.jit
def load_beta(beta, o_first, o_t, m_t, form):
    """(C,) β, 1 where there is none."""
    b_beta = tl.full((form.C,), 1.0, tl.float32)
    if form.BETA:
        b_beta = tl.load(beta + o_first + o_t.to(tl.int64) * form.H, mask=m_t, other=0.0).to(tl.float32)
    return b_beta


@triton.jit
def documents(segments, i_n, T, o_c, C: tl.constexpr, SEGMENTS: tl.constexpr):
    """(C, C) whether two rows share a document; (C,) whether a row shares it with the incoming and with the outgoing
    state; and whether these two share it."""
    if SEGMENTS:
        o_t = i_n * C + o_c
        b_segment = tl.load(segments + tl.minimum(o_t, T - 1))
        before = tl.load(segments + tl.maximum(i_n * C - 1, 0))
        last = tl.load(segments + tl.minimum(i_n * C + C, T) - 1)
        return b_segment[:, None] == b_segment[None, :], b_segment == before, b_segment == last, before == last
    else:
        return (o_c >= 0)[:, None] & (o_c >= 0)[None, :], o_c >= 0, o_c >= 0, C > 0


@triton.jit
def decays(g, o_t, m_t, o_k, o_c, enters, leaves, passes, form):
    """exp(G) for rows that see the incoming state, exp(G_C - G) for rows that enter the outgoing one, both (C, BK);
    exp(G_C), (BK,), where the state passes through."""
    if form.CHANNEL:
        b_g = load_tile(g, o_t, m_t, form.H * form.K, o_k, form.K).to(tl.float32)
        b_entering = tl.exp(selected_sums(o_c[:, None] >= o_c[None, :], b_g, form.PRECISION))
        b_leaving = tl.exp(selected_sums(o_c[:, None] < o_c[None, :], b_g, form.PRECISION))
        b_passing = tl.exp(tl.sum(b_g, axis=0))
    else:
        b_g, b_G = head_decay(g, o_t, m_t, form.H)
        total = tl.sum(b_g, axis=0)
        b_entering = tl.exp(b_G)[:, None] + tl.zeros_like(o_k).to(tl.float32)[None, :]
        b_leaving = tl.exp(total - b_G)[:, None] + tl.zeros_like(o_k).to(tl.float32)[None, :]
        b_passing = tl.exp(total) + tl.zeros_like(o_k).to(tl.float32)
    return (
        tl.where(enters[:, None], b_entering, 0.0),
        tl.where(leaves[:, None], b_leaving, 0.0),
        tl.where(passes, b_passing, 0.0),
    )


@triton.jit
def joins(o_row, o_column, level):
    """Whether the row is in an odd block of 2^level tokens and the column in the even one before it."""
    i_block = o_row >> level
    return ((i_block & 1) == 1) & (i_block - 1 == (o_column >> level))


@triton.jit
def level_pairs(o_row, o_column, level, is_whole):
    """Pairs of tokens that a level computes, all of the chunk with ``is_whole``."""
    return tl.where(is_whole, (o_row > o_column).to(tl.int32), joins(o_row, o_column, level).to(tl.int32)) != 0


@triton.jit
def has_moderate_decay(b_g, o_c, C: tl.constexpr, dtype: tl.constexpr):
    """Whether no channel loses more than MAX_NATS between the middle of the chunk and either end."""
    b_early = tl.sum(tl.where((o_c < C // 2)[:, None], b_g, 0.0), axis=0)
    b_late = tl.sum(tl.where((o_c < C // 2)[:, None], 0.0, b_g), axis=0)
    most = 0.0 if dtype == tl.float16 else MAX_NATS  # the exponents of fp16 are too small
    return tl.min(tl.minimum(b_early, b_late), axis=0) >= -most


@triton.jit
def level_factors(b_g, o_c, level, is_whole, PRECISION: tl.constexpr):
    """(C, BK) decay of a row since the boundary of its pair of blocks, and of a column up to it. With ``is_whole`` a
    factor is > 1 on the other side of the boundary; the product of the two is the decay between two tokens all the
    same."""
    i_block = o_c >> level
    since = ((i_block & 1) == 1)[:, None]
    sign = tl.where(since, (o_c[None, :] <= o_c[:, None]).to(tl.int32), -(o_c[None, :] > o_c[:, None]).to(tl.int32))
    b_sum = selected_sums(tl.where(i_block[:, None] == i_block[None, :], sign, 0), b_g, PRECISION)
    most = tl.where(is_whole, MAX_NATS + 1, 0.0)
    return tl.exp(tl.minimum(b_sum, most)), tl.exp(tl.minimum(-b_sum, most))


@triton.jit
def prepare_chunks(x, A, M, chunks, size, form, SOLVE: tl.constexpr, INVERSE: tl.constexpr):
    """Everything of a chunk that does not need its incoming state. With SOLVE computes A and M, otherwise reads A."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // form.H, i_bh % form.H
    dtype = x.q.dtype.element_ty
    o_c = tl.arange(0, form.C)
    o_t, o_i = i_n * form.C + o_c, i_n * form.C + o_c + i_bh * size.N * form.C
    m_t = o_t < size.T
    o_first = i_b * size.T * form.H + i_h
    q = x.q + o_first * form.K
    k = x.k + o_first * form.K
    e = x.e + o_first * form.K
    v = x.v + (i_b * size.v_batch + i_h * form.V)
    g = x.g + (o_first * form.K if form.CHANNEL else o_first)
    same, enters, leaves, passes = documents(x.segments + i_b * size.T, i_n, size.T, o_c, form.C, form.SEGMENTS)
    b_beta = load_beta(x.beta, o_first, o_t, m_t, form)
    if SOLVE:
        # 1. T and M, [C, C]
        b_T = tl.zeros((form.C, form.C), tl.float32)
        b_M = tl.zeros((form.C, form.C), tl.float32)
        b_diagonal = tl.zeros((form.C,), tl.float32)
        for k0 in range(0, form.K, form.BK):
            o_k = k0 + tl.arange(0, form.BK)
            # [C, BK]
            b_q = load_tile(q, o_t, m_t, form.H * form.K, o_k, form.K)
            b_k = load_tile(k, o_t, m_t, form.H * form.K, o_k, form.K)
            b_e = load_tile(e, o_t, m_t, form.H * form.K, o_k, form.K)
            if form.CHANNEL:
                b_g = load_tile(g, o_t, m_t, form.H * form.K, o_k, form.K).to(tl.float32)
                is_whole = has_moderate_decay(b_g, o_c, form.C, dtype)
                for level in range(tl.where(is_whole, 5, 0), 6):
                    b_since, b_until = level_factors(b_g, o_c, level, is_whole, form.PRECISION)
                    m_pair = level_pairs(o_c[:, None], o_c[None, :], level, is_whole)
                    b_kT = tl.trans((b_k * b_until).to(dtype))
                    b_eT = tl.dot((b_e * b_since).to(dtype), b_kT, input_precision=form.PRECISION)
                    b_T += tl.where(m_pair, b_eT, 0.0)
                    b_qT = tl.dot((b_q * b_since).to(dtype), b_kT, input_precision=form.PRECISION)
                    b_M += tl.where(m_pair, b_qT, 0.0)
                b_diagonal += tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1)
            else:
                b_T += tl.dot(b_e, tl.trans(b_k), input_precision=form.PRECISION)
                b_M += tl.dot(b_q, tl.trans(b_k), input_precision=form.PRECISION)
        causal = o_c[:, None] >= o_c[None, :]
        if form.CHANNEL:
            b_M += tl.where(o_c[:, None] == o_c[None, :], b_diagonal[:, None], 0.0)
        else:
            _, b_G = head_decay(g, o_t, m_t, form.H)
            b_decay = tl.exp(tl.where(causal, b_G[:, None] - b_G[None, :], 0.0))
            b_T *= b_decay
            b_M *= b_decay
        b_T = tl.where((o_c[:, None] > o_c[None, :]) & same, b_T * b_beta[:, None], 0.0)
        b_M = tl.where(causal & same, b_M, 0.0)
        # 2. A = (I + T)⁻¹ from blocks of 1 to blocks of 64, [C, C]
        b_A = tl.where(o_c[:, None] == o_c[None, :], 1.0, 0.0) - tl.where(
            joins(o_c[:, None], o_c[None, :], 0), b_T, 0.0
        )
        for level in range(1, 6):
            b_part = tl.where(joins(o_c[:, None], o_c[None, :], level), b_T, 0.0)
            b_A -= tl.dot(tl.dot(b_A, b_part, input_precision=INVERSE), b_A, input_precision=INVERSE)
        b_A = b_A.to(dtype)
        tl.store(A + o_i[:, None] * form.C + o_c[None, :], b_A)
        tl.store(M + o_i[:, None] * form.C + o_c[None, :], b_M.to(dtype))
    else:
        b_A = tl.load(A + o_i[:, None] * form.C + o_c[None, :])
    # 3. Y, and queries and keys as they meet the state, [C, BK]
    for k0 in range(0, form.K, form.BK):
        o_k = k0 + tl.arange(0, form.BK)
        m_k = (o_k < form.K)[None, :]
        b_entering, b_leaving, b_passing = decays(g, o_t, m_t, o_k, o_c, enters, leaves, passes, form)
        b_e = load_tile(e, o_t, m_t, form.H * form.K, o_k, form.K)
        b_y = tl.dot(b_A, (b_e * b_entering * b_beta[:, None]).to(dtype), input_precision=form.PRECISION)
        o_ik = o_i[:, None] * form.K + o_k[None, :]
        tl.store(chunks.y + o_ik, b_y.to(dtype), mask=m_k)
        b_q_in = load_tile(q, o_t, m_t, form.H * form.K, o_k, form.K) * b_entering
        tl.store(chunks.q_in + o_ik, b_q_in.to(dtype), mask=m_k)
        b_k_out = load_tile(k, o_t, m_t, form.H * form.K, o_k, form.K) * b_leaving
        tl.store(chunks.k_out + o_ik, b_k_out.to(dtype), mask=m_k)
        tl.store(chunks.passing + (i_bh * size.N + i_n) * form.K + o_k, b_passing, mask=o_k < form.K)
    # 4. U, [C, BV]
    for v0 in range(0, form.V, form.BV):
        o_v = v0 + tl.arange(0, form.BV)
        b_v = (load_tile(v, o_t, m_t, size.v_row, o_v, form.V) * b_beta[:, None]).to(dtype)
        b_u = tl.dot(b_A, b_v, input_precision=form.PRECISION)
        tl.store(chunks.u + o_i[:, None] * form.V + o_v[None, :], b_u.to(dtype), mask=(o_v < form.V)[None, :])
