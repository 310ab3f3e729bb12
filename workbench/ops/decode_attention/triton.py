# mypy: allow-untyped-defs
"""Attention of one query per sequence over a cache on GPUs: split-KV in two passes.

A program of the first pass attends from the heads of one group to one part of a sequence's tokens; the second pass
combines the parts by their log-sum-exp (Flash-Decoding). How many parts there are follows from the capacity, which
tokens they have from the lengths on the device: a part behind the end reads nothing.

Legend as in the package; P parts, N tokens of a tile, M heads of a group (a tile of at least 16 rows, as tensor cores
need). Naming as in flash-linear-attention: ``i_`` program indices, ``o_`` offsets, ``m_`` masks, ``b_`` tiles in
registers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_PROCESSOR = 4
"""Programs of the first pass for every multiprocessor, at which an H200 reads at full rate."""
MIN_PART, MAX_PARTS = 64, 128
TILE_BYTES = 2**15
"""Keys or values of a tile, at most."""


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _tile(x, o_n, m_n, stride_s, o_c, m_c, dtype: tl.constexpr):
    """[N, channels] of tokens ``o_n``."""
    b_x = tl.load(x + o_n.to(tl.int64)[:, None] * stride_s + o_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0)
    return b_x.to(dtype)


@triton.jit
def _part_kernel(
    q,
    k,
    v,
    shared,
    k_steps,
    v_steps,
    lengths,
    o,
    lse,
    scale,
    softcap,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kg,
    stride_vb,
    stride_vs,
    stride_vg,
    stride_sb,
    stride_ss,
    stride_tb,
    stride_ts,
    stride_ub,
    stride_us,
    PART,
    WINDOW,
    P,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_p, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + i_b).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0) + i_p * PART
    last = tl.minimum(first + PART, length)
    o_m, o_k, o_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    m_m, m_k, m_v = o_m < R, o_k < K, o_v < V
    q += i_b * stride_qb + i_g * R * stride_qh
    k += i_b * stride_kb + i_g * stride_kg
    if HAS_V:
        v += i_b * stride_vb + i_g * stride_vg
    dtype: tl.constexpr = q.dtype.element_ty
    b_q = tl.load(q + o_m[:, None] * stride_qh + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
    if S > 0:
        o_s = tl.arange(0, BLOCK_S)
        m_s = o_s < S
        shared += i_b * stride_sb
        b_qs = tl.load(q + o_m[:, None] * stride_qh + K + o_s[None, :], mask=m_m[:, None] & m_s[None, :], other=0.0)
    if HAS_STEPS:
        k_steps += i_b * stride_tb + i_g
        if HAS_V:
            v_steps += i_b * stride_ub + i_g
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_k = _tile(k, o_n, m_n, stride_ks, o_k, m_k, dtype)
        b_s = _dot(b_q, tl.trans(b_k), EXACT)
        if HAS_STEPS:
            b_t = tl.load(k_steps + o_n.to(tl.int64) * stride_ts, mask=m_n, other=0.0).to(tl.float32)
            b_s *= b_t[None, :]
        if S > 0:
            b_s += _dot(b_qs, tl.trans(_tile(shared, o_n, m_n, stride_ss, o_s, m_s, dtype)), EXACT)
        b_s *= scale
        if SOFTCAP:
            b_s = b_s / softcap
            b_s = softcap * (2.0 / (1.0 + tl.exp(-2.0 * b_s)) - 1.0)
        b_s = tl.where(m_n[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))  # finite: a tile has at least one token
        b_p = tl.exp(b_s - b_new[:, None])
        b_factor = tl.exp(b_max - b_new)
        b_sum = b_sum * b_factor + tl.sum(b_p, 1)
        if HAS_V:
            b_v = _tile(v, o_n, m_n, stride_vs, o_v, m_v, dtype)
            if HAS_STEPS:
                b_u = tl.load(v_steps + o_n.to(tl.int64) * stride_us, mask=m_n, other=0.0).to(tl.float32)
                b_p *= b_u[None, :]
        else:
            b_v = b_k
            if HAS_STEPS:
                b_p *= b_t[None, :]
        b_o = b_o * b_factor[:, None] + _dot(b_p.to(dtype), b_v, EXACT)
        b_max = b_new
    # of a part without tokens: zero, and a log-sum-exp of -inf
    b_lse = tl.where(b_sum > 0, b_max + tl.log(tl.maximum(b_sum, 1e-38)), -float("inf"))
    b_o = b_o / tl.maximum(b_sum, 1e-38)[:, None]
    row = (i_b * H + i_g * R + o_m) * P + i_p
    tl.store(lse + row, b_lse, mask=m_m)
    tl.store(o + row[:, None] * V + o_v[None, :], b_o, mask=m_m[:, None] & m_v[None, :])


@triton.jit
def _combine_kernel(
    o_parts,
    lse_parts,
    sink,
    o,
    lse,
    P,
    H: tl.constexpr,
    V: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = i_b * H + i_h
    o_p, o_v = tl.arange(0, BLOCK_P), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_p, m_v = o_p < P, o_v < V
    b_lse = tl.load(lse_parts + row * P + o_p, mask=m_p, other=-float("inf"))
    largest = tl.max(b_lse, 0)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    b_weight = tl.exp(b_lse - finite)
    total = tl.sum(b_weight, 0)
    total_lse = tl.where(total > 0, finite + tl.log(tl.maximum(total, 1e-38)), -float("inf"))
    if i_v == 0:
        tl.store(lse + row, total_lse)
    b_o = tl.load(o_parts + (row * P + o_p)[:, None] * V + o_v[None, :], mask=m_p[:, None] & m_v[None, :], other=0.0)
    b_sum = tl.sum(b_o * b_weight[:, None], 0) / tl.maximum(total, 1e-38)
    if SINK:
        b_sum *= 1.0 / (1.0 + tl.exp(tl.load(sink + i_h).to(tl.float32) - total_lse))
    tl.store(o + row * V + o_v, b_sum.to(o.dtype.element_ty), mask=m_v)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _parts(tokens: int, programs: int, device: torch.device, tile: int) -> tuple[int, int]:
    """Tokens of a part, whole tiles, and how many parts a number of tokens has."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * _processors(device) // programs)
    number = max(1, min(wanted, -(-tokens // MIN_PART), MAX_PARTS))
    part = math.ceil(tokens / number / tile) * tile
    return part, -(-tokens // part)


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths_B: Tensor,
    shared: Tensor | None,
    k_steps: Tensor | None,
    v_steps: Tensor | None,
    sink_H: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.decode_attention.decode_attention`; products in the type of the queries, sums in fp32."""
    q = q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    v, shared = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (v, shared))
    (B, H), (S, G, K), V = q.shape[:2], k.shape[1:], (k if v is None else v).shape[-1]
    R, channels = H // G, 0 if shared is None else shared.shape[-1]
    o, lse = q.new_empty(B, H, V), q.new_empty(B, H, dtype=torch.float32)
    if S == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    block_k, block_v = (max(16, triton.next_power_of_2(x)) for x in (K, V))
    tile = max(16, min(128, TILE_BYTES // (max(block_k, block_v) * max(2, q.element_size()))))
    window = min(window or S, S)
    part, P = _parts(window, B * G, k.device, tile)
    o_parts, lse_parts = q.new_empty(B, H, P, V, dtype=torch.float32), q.new_empty(B, H, P, dtype=torch.float32)
    unused = lengths_B  # a pointer that is not read

    def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if x is None else x.stride()[:count]

    steps: tuple[Any, ...] = tuple(unused if x is None else x for x in (k_steps, v_steps))
    _part_kernel[(P, G, B)](
        q,
        k,
        unused if v is None else v,
        unused if shared is None else shared,
        *steps,
        lengths_B,
        o_parts,
        lse_parts,
        scale,
        softcap,
        *strides(q, 2),
        *strides(k, 3),
        *strides(v, 3),
        *strides(shared, 2),
        *strides(k_steps, 2),
        *strides(v_steps, 2),
        part,
        window,
        P,
        H=H,
        R=R,
        K=K,
        V=V,
        S=channels,
        HAS_V=v is not None,
        HAS_STEPS=k_steps is not None,
        SOFTCAP=softcap != 0,
        EXACT=q.dtype == torch.float32,
        BLOCK_M=max(16, triton.next_power_of_2(R)),
        BLOCK_N=tile,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        BLOCK_S=max(16, triton.next_power_of_2(channels)) if channels else 16,
        num_warps=4,
        num_stages=3,
    )
    piece = min(block_v, 64)
    _combine_kernel[(-(-V // piece), H, B)](
        o_parts,
        lse_parts,
        unused if sink_H is None else sink_H,
        o,
        lse,
        P,
        H=H,
        V=V,
        SINK=sink_H is not None,
        BLOCK_P=triton.next_power_of_2(P),
        BLOCK_V=piece,
        num_warps=4,
    )
    return o, lse
