# mypy: allow-untyped-defs
"""From chunk to chunk: the states in the forward direction, their gradients in the backward direction."""

from __future__ import annotations

import triton
import triton.language as tl

from workbench.ops.delta_rule.kernels.chunk import load_tile


@triton.jit
def scan_states(chunks, R, states, start, end, N, form, KP: tl.constexpr, BS: tl.constexpr, START: tl.constexpr):
    """The state before each chunk, and R = U - Y S. A program holds BS columns of one head's state."""
    o_v, i_bh = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1).to(tl.int64)
    dtype = chunks.y.dtype.element_ty
    o_c, o_k = tl.arange(0, form.C), tl.arange(0, KP)
    m_k, m_v = o_k < form.K, (o_v < form.V)[None, :]
    o_state = i_bh * form.K * form.V + o_k[:, None] * form.V + o_v[None, :]
    m_state = m_k[:, None] & m_v
    # [KP, BS]
    b_S = tl.zeros((KP, BS), tl.float32)
    if START:
        b_S += tl.load(start + o_state, mask=m_state, other=0.0)
    passing = chunks.passing + (i_bh * N * form.K + o_k)
    b_passing = tl.load(passing, mask=m_k, other=0.0)
    for i_n in range(N):
        # loaded one chunk ahead: the compiler prefetches only factors of products, and the step would wait for this one
        b_next = tl.load(passing + tl.minimum(i_n + 1, N - 1) * form.K, mask=m_k, other=0.0)
        o_i = (i_bh * N + i_n) * form.C + o_c
        p_states = states + (i_bh * N + i_n) * form.K * form.V + o_k[:, None] * form.V + o_v[None, :]
        tl.store(p_states, b_S.to(dtype), mask=m_state)
        # [C, KP], [C, BS]
        b_y = tl.load(chunks.y + o_i[:, None] * form.K + o_k[None, :], mask=m_k[None, :], other=0.0)
        b_u = tl.load(chunks.u + o_i[:, None] * form.V + o_v[None, :], mask=m_v, other=0.0)
        b_R = (b_u - tl.dot(b_y, b_S.to(dtype), input_precision=form.PRECISION)).to(dtype)
        tl.store(R + o_i[:, None] * form.V + o_v[None, :], b_R, mask=m_v)
        # [KP, C]
        b_kT = tl.load(chunks.k_out + o_i[None, :] * form.K + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_S = b_S * b_passing[:, None] + tl.dot(b_kT, b_R, input_precision=form.PRECISION)
        b_passing = b_next
    tl.store(end + o_state, b_S, mask=m_state)


@triton.jit
def outputs(q_in, M, R, states, o, T, N, form):
    """o = (q exp G) S + M R."""
    i_n, i_bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_v = tl.program_id(0) * form.BV + tl.arange(0, form.BV)
    o_c = tl.arange(0, form.C)
    o_t, o_i = i_n * form.C + o_c, i_n * form.C + o_c + i_bh * N * form.C
    m_v = (o_v < form.V)[None, :]
    # [C, C], [C, BV]
    b_M = tl.load(M + o_i[:, None] * form.C + o_c[None, :])
    b_R = tl.load(R + o_i[:, None] * form.V + o_v[None, :], mask=m_v, other=0.0)
    b_o = tl.dot(b_M, b_R, input_precision=form.PRECISION)
    for k0 in range(0, form.K, form.BK):
        o_k = k0 + tl.arange(0, form.BK)
        # [C, BK], [BK, BV]
        b_q = tl.load(q_in + o_i[:, None] * form.K + o_k[None, :], mask=(o_k < form.K)[None, :], other=0.0)
        p_state = states + (i_bh * N + i_n) * form.K * form.V + o_k[:, None] * form.V + o_v[None, :]
        b_S = tl.load(p_state, mask=(o_k < form.K)[:, None] & m_v, other=0.0)
        b_o += tl.dot(b_q, b_S, input_precision=form.PRECISION)
    o_first = ((i_bh // form.H) * T * form.H + i_bh % form.H) * form.V
    p_o = o + o_first + o_t.to(tl.int64)[:, None] * form.H * form.V + o_v[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=(o_t < T)[:, None] & m_v)


@triton.jit
def local_gradient(M, do, dR, T, N, form):
    """dR = Mᵀ do, the part of dR that comes from the chunk itself."""
    i_n, i_bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_v = tl.program_id(0) * form.BV + tl.arange(0, form.BV)
    o_c = tl.arange(0, form.C)
    o_t, o_i = i_n * form.C + o_c, i_n * form.C + o_c + i_bh * N * form.C
    # [C, C], [C, BV]
    b_MT = tl.load(M + o_i[None, :] * form.C + o_c[:, None])
    o_first = ((i_bh // form.H) * T * form.H + i_bh % form.H) * form.V
    b_do = load_tile(do + o_first, o_t, o_t < T, form.H * form.V, o_v, form.V)
    b_dR = tl.dot(b_MT, b_do, input_precision=form.PRECISION)
    tl.store(dR + o_i[:, None] * form.V + o_v[None, :], b_dR.to(dR.dtype.element_ty), mask=(o_v < form.V)[None, :])


@triton.jit
def scan_gradients(
    chunks, do, dR, dstates, dend, dstart, T, N, form, KP: tl.constexpr, BS: tl.constexpr, END: tl.constexpr
):
    """From the last chunk to the first: the gradient of the state after each, and dR completed in place."""
    o_v, i_bh = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1).to(tl.int64)
    dtype = chunks.y.dtype.element_ty
    o_c, o_k = tl.arange(0, form.C), tl.arange(0, KP)
    m_k, m_v = o_k < form.K, (o_v < form.V)[None, :]
    o_state = i_bh * form.K * form.V + o_k[:, None] * form.V + o_v[None, :]
    m_state = m_k[:, None] & m_v
    do += ((i_bh // form.H) * T * form.H + i_bh % form.H) * form.V
    # [KP, BS]
    b_dS = tl.zeros((KP, BS), tl.float32)
    if END:
        b_dS += tl.load(dend + o_state, mask=m_state, other=0.0)
    passing = chunks.passing + (i_bh * N * form.K + o_k)
    dR += i_bh * N * form.C * form.V + o_c[:, None] * form.V + o_v[None, :]
    b_passing = tl.load(passing + (N - 1) * form.K, mask=m_k, other=0.0)
    b_dR_local = tl.load(dR + (N - 1) * form.C * form.V, mask=m_v, other=0.0)
    for i in range(N):
        i_n = N - 1 - i
        # loaded one chunk ahead, as in the forward scan
        i_before = tl.maximum(i_n - 1, 0)
        b_passing_next = tl.load(passing + i_before * form.K, mask=m_k, other=0.0)
        b_dR_next = tl.load(dR + i_before * form.C * form.V, mask=m_v, other=0.0)
        o_t, o_i = i_n * form.C + o_c, (i_bh * N + i_n) * form.C + o_c
        p_dstates = dstates + (i_bh * N + i_n) * form.K * form.V + o_k[:, None] * form.V + o_v[None, :]
        tl.store(p_dstates, b_dS.to(dtype), mask=m_state)
        # [C, KP], [C, BS]
        b_k = tl.load(chunks.k_out + o_i[:, None] * form.K + o_k[None, :], mask=m_k[None, :], other=0.0)
        b_dR = (b_dR_local.to(tl.float32) + tl.dot(b_k, b_dS.to(dtype), input_precision=form.PRECISION)).to(dtype)
        tl.store(dR + i_n * form.C * form.V, b_dR, mask=m_v)
        # [KP, C]
        b_qT = tl.load(chunks.q_in + o_i[None, :] * form.K + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_yT = tl.load(chunks.y + o_i[None, :] * form.K + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_do = load_tile(do, o_t, o_t < T, form.H * form.V, o_v, form.V)
        b_dS = b_dS * b_passing[:, None] + tl.dot(b_qT, b_do, input_precision=form.PRECISION)
        b_dS -= tl.dot(b_yT, b_dR, input_precision=form.PRECISION)
        b_passing, b_dR_local = b_passing_next, b_dR_next
    tl.store(dstart + o_state, b_dS, mask=m_state)
