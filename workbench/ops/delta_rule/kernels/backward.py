# mypy: allow-untyped-defs
"""Gradients of the inputs, chunk by chunk, from the states and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.delta_rule.kernels.chunk import (
    decays,
    documents,
    has_moderate_decay,
    head_decay,
    level_factors,
    level_pairs,
    load_beta,
    load_tile,
    selected_sums,
)


class Intermediates(NamedTuple):
    """Pointers of what the passes before have computed."""

    A: Tensor
    """(B·H, N·C, C)"""
    R: Tensor
    """(B·H, N·C, V)"""
    states: Tensor
    """(B·H, N, K, V) before each chunk."""
    dstates: Tensor
    """(B·H, N, K, V) after each chunk."""
    do: Tensor
    """(B, T, H, V)"""
    dR: Tensor
    """(B·H, N·C, V)"""
    dT: Tensor
    """(B·H, N·C, C)"""
    dM: Tensor
    """(B·H, N·C, C)"""


class Gradients(NamedTuple):
    """Pointers of the gradients of the inputs; some are summed over tiles of key channels afterwards."""

    dq: Tensor
    dk: Tensor
    de: Tensor
    """Unused where the erase keys are tied."""
    dg: Tensor
    """(tiles, B, T, H), or (B, T, H, K) per channel."""
    dbeta: Tensor
    """(tiles + 1, B, T, H); the last is from the values. Unused where there is no beta."""


@triton.jit
def matrix_gradients(x, y, u, saved, dv, dbeta, size, form):
    """dM = do Rᵀ; dṽ = Aᵀ dR; dT = -(dṽ Uᵀ + (Aᵀ dY) Yᵀ) with dY = -dR Sᵀ, which is -Aᵀ dA Aᵀ."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // form.H, i_bh % form.H
    dtype = y.dtype.element_ty
    o_c = tl.arange(0, form.C)
    o_t, o_i = i_n * form.C + o_c, i_n * form.C + o_c + i_bh * size.N * form.C
    m_t = o_t < size.T
    o_first = i_b * size.T * form.H + i_h
    v = x.v + (i_b * size.v_batch + i_h * form.V)
    do = saved.do + o_first * form.V
    same, _, _, _ = documents(x.segments + i_b * size.T, i_n, size.T, o_c, form.C, form.SEGMENTS)
    b_beta = load_beta(x.beta, o_first, o_t, m_t, form)
    # [C, C]
    b_AT = tl.load(saved.A + o_i[None, :] * form.C + o_c[:, None])
    b_dM = tl.zeros((form.C, form.C), tl.float32)
    b_dT = tl.zeros((form.C, form.C), tl.float32)
    b_dbeta = tl.zeros((form.C,), tl.float32)
    # 1. values: dM, dṽ, and their part of -dT
    for v0 in range(0, form.V, form.BV):
        o_v = v0 + tl.arange(0, form.BV)
        m_v = o_v < form.V
        # [BV, C], [C, BV]
        b_RT = tl.load(saved.R + o_i[None, :] * form.V + o_v[:, None], mask=m_v[:, None], other=0.0)
        b_do = load_tile(do, o_t, m_t, form.H * form.V, o_v, form.V)
        b_dM += tl.dot(b_do, b_RT, input_precision=form.PRECISION)
        b_dR = tl.load(saved.dR + o_i[:, None] * form.V + o_v[None, :], mask=m_v[None, :], other=0.0)
        b_dv = tl.dot(b_AT, b_dR, input_precision=form.PRECISION)
        b_uT = tl.load(u + o_i[None, :] * form.V + o_v[:, None], mask=m_v[:, None], other=0.0)
        b_dT += tl.dot(b_dv.to(dtype), b_uT, input_precision=form.PRECISION)
        if form.BETA:
            b_dbeta += tl.sum(b_dv * load_tile(v, o_t, m_t, size.v_row, o_v, form.V).to(tl.float32), axis=1)
        p_dv = dv + o_first * form.V + o_t.to(tl.int64)[:, None] * form.H * form.V + o_v[None, :]
        tl.store(p_dv, (b_dv * b_beta[:, None]).to(dtype), mask=m_t[:, None] & m_v[None, :])
    # 2. keys: their part of -dT
    for k0 in range(0, form.K, form.BK):
        o_k = k0 + tl.arange(0, form.BK)
        m_k = o_k < form.K
        # [C, BK]
        b_dy = tl.zeros((form.C, form.BK), tl.float32)
        for v0 in range(0, form.V, form.BV):
            o_v = v0 + tl.arange(0, form.BV)
            # [C, BV], [BV, BK]
            b_dR = tl.load(saved.dR + o_i[:, None] * form.V + o_v[None, :], mask=(o_v < form.V)[None, :], other=0.0)
            p_ST = saved.states + (i_bh * size.N + i_n) * form.K * form.V + o_k[None, :] * form.V + o_v[:, None]
            b_ST = tl.load(p_ST, mask=m_k[None, :] & (o_v < form.V)[:, None], other=0.0)
            b_dy -= tl.dot(b_dR, b_ST, input_precision=form.PRECISION)
        b_de = tl.dot(b_AT, b_dy.to(dtype), input_precision=form.PRECISION)
        # [BK, C]
        b_yT = tl.load(y + o_i[None, :] * form.K + o_k[:, None], mask=m_k[:, None], other=0.0)
        b_dT += tl.dot(b_de.to(dtype), b_yT, input_precision=form.PRECISION)
    o_cc = o_i[:, None] * form.C + o_c[None, :]
    tl.store(saved.dT + o_cc, tl.where((o_c[:, None] > o_c[None, :]) & same, -b_dT, 0.0).to(dtype))
    tl.store(saved.dM + o_cc, tl.where((o_c[:, None] >= o_c[None, :]) & same, b_dM, 0.0).to(dtype))
    if form.BETA:
        tl.store(dbeta + o_first + o_t.to(tl.int64) * form.H, b_dbeta, mask=m_t)


@triton.jit
def input_gradients(x, saved, out, size, stride_tile, form):
    """Gradients of q, k, e, g and β for BK channels of one chunk.

    dG = ẽ dẽ + q dq - k dk, plus, at the chunk's last row, the gradient of G_C; dg is the sum of dG over the rows from
    it on. In this sum the two contributions of a pair of tokens must cancel where both rows are in it. For decays per
    channel the factors of a pair are therefore used as the forward products saw them, rounded, in both rows; with a
    decay per head the pairs of the chunk itself cancel as they are.
    """
    i_n, i_bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // form.H, i_bh % form.H
    dtype = x.q.dtype.element_ty
    i_tile = tl.program_id(0).to(tl.int64)
    o_k = i_tile * form.BK + tl.arange(0, form.BK)
    m_k = o_k < form.K
    o_c = tl.arange(0, form.C)
    o_t, o_i = i_n * form.C + o_c, i_n * form.C + o_c + i_bh * size.N * form.C
    m_t = o_t < size.T
    o_first = i_b * size.T * form.H + i_h
    q = x.q + o_first * form.K
    k = x.k + o_first * form.K
    e = x.e + o_first * form.K
    do = saved.do + o_first * form.V
    g = x.g + (o_first * form.K if form.CHANNEL else o_first)
    _, enters, leaves, passes = documents(x.segments + i_b * size.T, i_n, size.T, o_c, form.C, form.SEGMENTS)
    b_beta = load_beta(x.beta, o_first, o_t, m_t, form)

    # 1. through the states, [C, BK]
    b_dq = tl.zeros((form.C, form.BK), tl.float32)
    b_dy = tl.zeros((form.C, form.BK), tl.float32)
    b_dk = tl.zeros((form.C, form.BK), tl.float32)
    b_dpassing = tl.zeros((form.BK,), tl.float32)
    for v0 in range(0, form.V, form.BV):
        o_v = v0 + tl.arange(0, form.BV)
        m_v = o_v < form.V
        # [BV, BK]
        o_state = (i_bh * size.N + i_n) * form.K * form.V + o_k[None, :] * form.V + o_v[:, None]
        b_ST = tl.load(saved.states + o_state, mask=m_k[None, :] & m_v[:, None], other=0.0)
        b_dST = tl.load(saved.dstates + o_state, mask=m_k[None, :] & m_v[:, None], other=0.0)
        b_dpassing += tl.sum(b_ST.to(tl.float32) * b_dST.to(tl.float32), axis=0)
        # [C, BV]
        b_do = load_tile(do, o_t, m_t, form.H * form.V, o_v, form.V)
        b_dq += tl.dot(b_do, b_ST, input_precision=form.PRECISION)
        b_dR = tl.load(saved.dR + o_i[:, None] * form.V + o_v[None, :], mask=m_v[None, :], other=0.0)
        b_dy -= tl.dot(b_dR, b_ST, input_precision=form.PRECISION)
        b_R = tl.load(saved.R + o_i[:, None] * form.V + o_v[None, :], mask=m_v[None, :], other=0.0)
        b_dk += tl.dot(b_R, b_dST, input_precision=form.PRECISION)
    b_AT = tl.load(saved.A + o_i[None, :] * form.C + o_c[:, None])
    b_de = tl.dot(b_AT, b_dy.to(dtype), input_precision=form.PRECISION)
    b_q = load_tile(q, o_t, m_t, form.H * form.K, o_k, form.K)
    b_k = load_tile(k, o_t, m_t, form.H * form.K, o_k, form.K)
    b_e = load_tile(e, o_t, m_t, form.H * form.K, o_k, form.K)
    b_edit = b_e * b_beta[:, None]
    b_entering, b_leaving, b_passing = decays(g, o_t, m_t, o_k, o_c, enters, leaves, passes, form)
    b_dq *= b_entering
    b_de *= b_entering
    b_dk *= b_leaving
    b_dlast = tl.sum(b_k * b_dk, axis=0) + b_passing * b_dpassing

    # 2. through the pairs of tokens of the chunk
    o_cc, o_ccT = o_i[:, None] * form.C + o_c[None, :], o_i[None, :] * form.C + o_c[:, None]
    if form.CHANNEL:
        b_dG = b_edit * b_de + b_q * b_dq - b_k * b_dk
        b_g = load_tile(g, o_t, m_t, form.H * form.K, o_k, form.K).to(tl.float32)
        is_whole = has_moderate_decay(b_g, o_c, form.C, dtype)
        for level in range(tl.where(is_whole, 5, 0), 6):
            b_since, b_until = level_factors(b_g, o_c, level, is_whole, form.PRECISION)
            m_pair = level_pairs(o_c[:, None], o_c[None, :], level, is_whole)
            m_pairT = level_pairs(o_c[None, :], o_c[:, None], level, is_whole)
            b_kl = (b_k * b_until).to(dtype)
            b_el, b_ql = (b_edit * b_since).to(dtype), (b_q * b_since).to(dtype)
            # masked loads: rows and columns of other levels get zeros from these products
            b_dT = tl.load(saved.dT + o_cc, mask=m_pair, other=0.0)
            b_del = tl.dot(b_dT, b_kl, input_precision=form.PRECISION)
            b_dG += b_el * b_del
            b_de += b_since * b_del
            b_dM = tl.load(saved.dM + o_cc, mask=m_pair, other=0.0)
            b_dql = tl.dot(b_dM, b_kl, input_precision=form.PRECISION)
            b_dG += b_ql * b_dql
            b_dq += b_since * b_dql
            b_dTT = tl.load(saved.dT + o_ccT, mask=m_pairT, other=0.0)
            b_dkl = tl.dot(b_dTT, b_el, input_precision=form.PRECISION)
            b_dMT = tl.load(saved.dM + o_ccT, mask=m_pairT, other=0.0)
            b_dkl += tl.dot(b_dMT, b_ql, input_precision=form.PRECISION)
            b_dG -= b_kl * b_dkl
            b_dk += b_until * b_dkl
        b_diagonal = tl.load(saved.dM + o_i * form.C + o_c).to(tl.float32)[:, None]
        b_dq += b_diagonal * b_k
        b_dk += b_diagonal * b_q
    else:
        _, b_G = head_decay(g, o_t, m_t, form.H)
        causal = o_c[:, None] >= o_c[None, :]
        b_decay = tl.exp(tl.where(causal, b_G[:, None] - b_G[None, :], 0.0))
        b_decayT = tl.exp(tl.where(o_c[:, None] <= o_c[None, :], b_G[None, :] - b_G[:, None], 0.0))
        b_dT = (tl.load(saved.dT + o_cc) * b_decay).to(dtype)
        b_de += tl.dot(b_dT, b_k, input_precision=form.PRECISION)
        b_dM = (tl.load(saved.dM + o_cc) * b_decay).to(dtype)
        b_dq += tl.dot(b_dM, b_k, input_precision=form.PRECISION)
        b_dTT = (tl.load(saved.dT + o_ccT) * b_decayT).to(dtype)
        b_dk += tl.dot(b_dTT, b_edit.to(dtype), input_precision=form.PRECISION)
        b_dMT = (tl.load(saved.dM + o_ccT) * b_decayT).to(dtype)
        b_dk += tl.dot(b_dMT, b_q, input_precision=form.PRECISION)
        b_dG = b_edit * b_de + b_q * b_dq - b_k * b_dk

    # 3. decay, β and the keys
    b_dG += tl.where((o_c == form.C - 1)[:, None], b_dlast[None, :], 0.0)
    o_out = o_first * form.K + o_t.to(tl.int64)[:, None] * form.H * form.K + o_k[None, :]
    m_out = m_t[:, None] & m_k[None, :]
    o_partial = i_tile * stride_tile + o_first + o_t.to(tl.int64) * form.H
    if form.CHANNEL:
        tl.store(out.dg + o_out, selected_sums(o_c[:, None] <= o_c[None, :], b_dG, form.PRECISION), mask=m_out)
    else:
        tl.store(out.dg + o_partial, tl.cumsum(tl.sum(b_dG, axis=1), axis=0, reverse=True), mask=m_t)
    if form.BETA:
        tl.store(out.dbeta + o_partial, tl.sum(b_e * b_de, axis=1), mask=m_t)
        b_de *= b_beta[:, None]
    if form.TIED:
        b_dk += b_de
    else:
        tl.store(out.de + o_out, b_de.to(dtype), mask=m_out)
    tl.store(out.dq + o_out, b_dq.to(dtype), mask=m_out)
    tl.store(out.dk + o_out, b_dk.to(dtype), mask=m_out)
