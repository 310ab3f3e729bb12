# mypy: allow-untyped-defs
"""Attention over chosen tokens, in parts that are combined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.common import LOG2E, padded, precision, settings_of
from workbench.ops.sparse_decoding.layout import Pool


@triton.jit
def _combine_kernel(
    partial,
    sums,
    sink,
    o,
    HAS_SINK: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """Output of a head, in some of its channels, from its parts."""
    o_h, o_v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BV + tl.arange(0, BV)
    o_s = tl.arange(0, SP)
    p_sums = sums + (o_h * SPLITS + o_s) * 2
    b_max = tl.load(p_sums, mask=o_s < SPLITS, other=-float("inf"))
    b_sum = tl.load(p_sums + 1, mask=o_s < SPLITS, other=0.0)
    largest = tl.max(b_max, axis=0)
    if HAS_SINK:
        b_sink = tl.load(sink + o_h % HAS_SINK).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, b_sink)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    b_factor = tl.exp2(b_max - largest)
    total = tl.sum(b_sum * b_factor, axis=0)
    if HAS_SINK:
        total += tl.exp2(b_sink - largest)
    p_part = partial + (o_h * SPLITS + o_s)[:, None] * V + o_v[None, :]
    mask = (b_sum > 0)[:, None] & (o_v < V)[None, :]
    b_o = tl.sum(tl.load(p_part, mask=mask, other=0.0) * b_factor[:, None], axis=0)
    b_o = b_o / tl.where(total > 0, total, 1.0)
    tl.store(o + o_h * V + o_v, b_o.to(o.dtype.element_ty), mask=o_v < V)


@triton.jit
def _attend_kernel(
    q,
    k,
    v,
    shared,
    tokens,
    lengths,
    counts,
    slots,
    partial,
    sums,
    q_b,
    q_h,
    k_b,
    k_s,
    k_g,
    v_b,
    v_s,
    v_g,
    shared_b,
    shared_s,
    n,
    part,
    num_slots,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    SHARING: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    SEPARATE_VALUES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UNIT: tl.constexpr,
    SLOT: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
):
    """Attention of up to HEADS heads of a group over ``part`` of its tokens, not normalised."""
    PIECES: tl.constexpr = (R + HEADS - 1) // HEADS
    i_split, i_piece = tl.program_id(0), tl.program_id(1) % PIECES
    i_bg = (tl.program_id(1) // PIECES).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    o_r = i_piece * HEADS + tl.arange(0, HP)
    m_r = (tl.arange(0, HP) < HEADS) & (o_r < R)
    o_h = i_b * GROUPS * R + i_g * R + o_r
    o_a, o_v = tl.arange(0, AP), tl.arange(0, VP)
    p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h
    b_q = tl.load(p_q + o_a[None, :], mask=m_r[:, None] & (o_a < A)[None, :], other=0.0)
    if E > 0:
        o_e = tl.arange(0, EP)
        b_q_shared = tl.load(p_q + A + o_e[None, :], mask=m_r[:, None] & (o_e < E)[None, :], other=0.0)
    end = tl.minimum((i_split + 1) * part, n)
    if HAS_COUNTS:
        end = tl.minimum(end, tl.load(counts + i_bg).to(tl.int32))
    if UNIT > 1:
        length = tl.load(lengths + i_b)
    b_max, b_sum = tl.full((HP,), -float("inf"), tl.float32), tl.zeros((HP,), tl.float32)
    b_o = tl.zeros((HP, VP), tl.float32)
    for start in range(i_split * part, end, BT):
        o_t = start + tl.arange(0, BT)
        b_row = tl.load(tokens + i_bg * (n // UNIT) + o_t // UNIT, mask=o_t < end, other=-1)
        if UNIT > 1:
            b_row = tl.where(b_row >= 0, b_row * UNIT + o_t % UNIT, -1)
            b_row = tl.where(b_row < length, b_row, -1)
        if SLOT > 0:
            b_slot = tl.load(slots + i_bg * num_slots + b_row // SLOT, mask=b_row >= 0, other=-1).to(tl.int64)
            b_row = tl.where(b_slot >= 0, b_slot * SLOT + b_row % SLOT, -1)
        m_t = b_row >= 0
        b_row = tl.where(m_t, b_row, 0)
        p_k = k + i_b * k_b + i_g // SHARING * k_g + b_row[:, None] * k_s
        b_k = tl.load(p_k + o_a[None, :], mask=m_t[:, None] & (o_a < A)[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if E > 0:
            p_shared = shared + i_b * shared_b + b_row[:, None] * shared_s
            b_e = tl.load(p_shared + o_e[None, :], mask=m_t[:, None] & (o_e < E)[None, :], other=0.0)
            b_s = tl.dot(b_q_shared, tl.trans(b_e), b_s, input_precision=PRECISION)
        b_s *= scale
        if SOFTCAP:
            b_s = softcap * (2.0 * tl.sigmoid(2.0 * b_s / softcap) - 1.0)
        b_s = tl.where(m_t[None, :], b_s * LOG2E, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_rescale = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        b_max = b_new
        if SEPARATE_VALUES:
            p_v = v + i_b * v_b + i_g // SHARING * v_g + b_row[:, None] * v_s
            b_v = tl.load(p_v + o_v[None, :], mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
        else:
            b_v = b_k
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None], input_precision=PRECISION)
    p_sums = sums + (o_h * SPLITS + i_split) * 2
    tl.store(p_sums, b_max, mask=m_r)
    tl.store(p_sums + 1, b_sum, mask=m_r)
    p_part = partial + (o_h * SPLITS + i_split)[:, None] * V + o_v[None, :]
    tl.store(p_part, b_o, mask=(m_r & (b_sum > 0))[:, None] & (o_v < V)[None, :])


def attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    tokens_BGn: Tensor,
    block: int,
    lengths_B: Tensor | None,
    counts_BG: Tensor | None,
    pool: Pool | None,
    shared_BS1R: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    (B, H, _), G, A = q_BHK.shape, tokens_BGn.shape[1], k_BSGK.shape[-1]
    V, n, R = A if v_BSGV is None else v_BSGV.shape[-1], tokens_BGn.shape[-1] * block, H // G
    E = 0 if shared_BS1R is None else shared_BS1R.shape[-1]
    settings = settings_of("attend", v_BSGV is None)
    heads, programs = settings.pop("heads"), settings.pop("programs")
    heads, BT = min(heads, R), settings["BT"]
    pieces = triton.cdiv(R, heads)
    tiles = triton.cdiv(n, BT)
    part = triton.cdiv(tiles, min(tiles, max(1, programs // (B * G * pieces)))) * BT
    splits = triton.cdiv(n, part)
    q_BHK, tokens_BGn = q_BHK.contiguous(), tokens_BGn.contiguous()
    o = torch.empty(B, H, V, dtype=k_BSGK.dtype, device=q_BHK.device)
    partial = torch.empty(B, H, splits, V, dtype=torch.float32, device=q_BHK.device)
    sums = torch.empty(B, H, splits, 2, dtype=torch.float32, device=q_BHK.device)
    if q_BHK.dtype != k_BSGK.dtype:
        q_BHK = q_BHK.to(k_BSGK.dtype)
    v = k_BSGK if v_BSGV is None else v_BSGV
    shared = k_BSGK if shared_BS1R is None else shared_BS1R
    _attend_kernel[(splits, B * G * pieces)](
        q_BHK,
        k_BSGK,
        v,
        shared,
        tokens_BGn,
        lengths_B,
        counts_BG,
        None if pool is None else pool.slots_BGN,
        partial,
        sums,
        *q_BHK.stride()[:2],
        *k_BSGK.stride()[:3],
        *v.stride()[:3],
        *shared.stride()[:2],
        n,
        part,
        0 if pool is None else pool.slots_BGN.shape[-1],
        scale,
        softcap or 0.0,
        GROUPS=G,
        SHARING=G // k_BSGK.shape[2],
        R=R,
        HEADS=heads,
        HP=padded(heads),
        A=A,
        AP=padded(A),
        E=E,
        EP=padded(E) if E else 0,
        V=V,
        VP=padded(V),
        SEPARATE_VALUES=v_BSGV is not None,
        SOFTCAP=bool(softcap),
        HAS_COUNTS=counts_BG is not None,
        UNIT=block,
        SLOT=0 if pool is None else pool.block,
        PRECISION=precision(q_BHK),
        SPLITS=splits,
        **settings,
    )
    combine = settings_of("combine")
    combine["BV"] = min(combine["BV"], padded(V))
    _combine_kernel[(B * H, triton.cdiv(V, combine["BV"]))](
        partial,
        sums,
        sink_H,
        o,
        HAS_SINK=0 if sink_H is None else H,
        SPLITS=splits,
        SP=triton.next_power_of_2(splits),
        V=V,
        **combine,
    )
    return o
