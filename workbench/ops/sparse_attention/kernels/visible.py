# mypy: allow-untyped-defs
"""Attention over the blocks visible to each query: flash attention with bounds per query.

Legend: B batch, T queries, N keys (slots of blocks), H query heads, G key–value heads, R = H / G, K and V channels of
keys and values; BT and BN tiles of queries and keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.kernels.common import (
    LOG2E,
    Channels,
    Inputs,
    Sizes,
    Upstream,
    constants,
    launch_settings,
    load_lse,
    load_rows,
    load_values,
    online_softmax_step,
    output_products,
    scores,
    store_attention,
    store_rows,
    visible_bounds,
)
from workbench.ops.sparse_attention.layout import VisibleBlocks


class Rule(NamedTuple):
    """Compile-time constants: which blocks a query sees."""

    R: int
    """Query heads of a key–value head."""
    LENGTH: int
    STRIDE: int
    WINDOW: int
    """Last so many visible blocks; 0 for all."""
    CAPPED: bool
    """Whether scores have a soft cap."""


@triton.jit
def _softcap(b_s, softcap):
    return softcap * (1 - 2 / (1 + tl.exp(2 * b_s / softcap)))


@triton.jit
def _query_bounds(start, i_b, o_t, m_t, size, rule):
    """Bounds of the slots visible to each query of a tile."""
    o_row = size.offset + o_t
    b_start = tl.load(start + i_b * size.T + o_t, mask=m_t, other=0)
    return visible_bounds(o_row, b_start, m_t, rule.LENGTH, rule.STRIDE, rule.WINDOW)


@triton.jit
def _visible_forward(x, o, lse, size, softcap, rule, channels, BT: tl.constexpr, BN: tl.constexpr):
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    i_b, i_h = (tl.program_id(1) // size.H).to(tl.int64), tl.program_id(1) % size.H
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < size.T
    low, high = _query_bounds(x.start, i_b, o_t, m_t, size, rule)
    o_query = (i_b * size.T + o_t) * size.H + i_h
    K = channels.A + channels.E
    # [BT, AP], [BT, EP]
    b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
    b_qE = b_qA
    if channels.EP > 0:
        b_qE = load_rows(x.q + channels.A, o_query, K, m_t, channels.E, channels.EP)
    k = x.k + (i_b * size.N * size.G + i_h // rule.R) * K
    v = x.v + (i_b * size.N * size.G + i_h // rule.R) * channels.V
    b_m = tl.full((BT,), -float("inf"), tl.float32)
    b_l = tl.zeros((BT,), tl.float32)
    b_o = tl.zeros((BT, channels.VP), tl.float32)
    first = tl.min(tl.where(m_t, low, size.N)) // BN * BN
    for n0 in range(first, tl.minimum(size.N, tl.max(high)), BN):
        # 1. scores
        o_n = n0 + tl.arange(0, BN)
        in_bounds = o_n < size.N
        # [BN, AP]
        b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [BT, BN]
        b_s, _ = scores(b_qA, b_qE, b_kA, k, o_n.to(tl.int64), size.G * K, in_bounds, channels)
        b_s *= size.scale
        if rule.CAPPED:
            b_s = _softcap(b_s, softcap)
        mask = (o_n[None, :] >= low[:, None]) & (o_n[None, :] < high[:, None])
        b_s = tl.where(mask, b_s * LOG2E, -float("inf"))
        # 2. weighted values
        b_p, b_m, b_l, b_rescale = online_softmax_step(b_s, b_m, b_l)
        # [BN, VP]
        b_v = load_values(v, b_kA, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels)
        b_o = b_o * b_rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=channels.PRECISION)
    store_attention(o, lse, o_query, m_t, b_o, b_m, b_l, channels.V, channels.VP)


@triton.jit
def _visible_queries(x, upstream, dq, size, softcap, rule, channels, BT: tl.constexpr, BN: tl.constexpr):
    """Gradient of a tile of queries."""
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // size.H).to(tl.int64), tl.program_id(1) % size.H
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < size.T
    low, high = _query_bounds(x.start, i_b, o_t, m_t, size, rule)
    o_query = (i_b * size.T + o_t) * size.H + i_h
    K = channels.A + channels.E
    # [BT, AP], [BT, EP]
    b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
    b_dqA = tl.zeros((BT, channels.AP), tl.float32)
    b_qE, b_dqE = b_qA, b_dqA
    if channels.EP > 0:
        b_qE = load_rows(x.q + channels.A, o_query, K, m_t, channels.E, channels.EP)
        b_dqE = tl.zeros((BT, channels.EP), tl.float32)
    # [BT, VP]
    b_do = load_rows(upstream.do, o_query, channels.V, m_t, channels.V, channels.VP)
    b_lse = load_lse(upstream.lse, o_query, m_t)
    b_delta = tl.load(upstream.delta + o_query, mask=m_t, other=0.0)
    k = x.k + (i_b * size.N * size.G + i_h // rule.R) * K
    v = x.v + (i_b * size.N * size.G + i_h // rule.R) * channels.V
    first = tl.min(tl.where(m_t, low, size.N)) // BN * BN
    for n0 in range(first, tl.minimum(size.N, tl.max(high)), BN):
        # 1. probabilities
        o_n = n0 + tl.arange(0, BN)
        in_bounds = o_n < size.N
        # [BN, AP]
        b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [BT, BN]
        b_s, b_kE = scores(b_qA, b_qE, b_kA, k, o_n.to(tl.int64), size.G * K, in_bounds, channels)
        b_s *= size.scale
        if rule.CAPPED:
            b_s = _softcap(b_s, softcap)
        mask = (o_n[None, :] >= low[:, None]) & (o_n[None, :] < high[:, None])
        b_p = tl.where(mask, tl.exp2((b_s - b_lse[:, None]) * LOG2E), 0.0)
        # 2. gradient of the scores
        # [BN, VP]
        b_v = load_values(v, b_kA, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=channels.PRECISION) - b_delta[:, None])
        if rule.CAPPED:
            b_ds *= 1 - b_s * b_s / (softcap * softcap)
        b_ds = b_ds.to(b_kA.dtype)
        # 3. gradient of the queries
        b_dqA += tl.dot(b_ds, b_kA, input_precision=channels.PRECISION)
        if channels.EP > 0:
            b_dqE += tl.dot(b_ds, b_kE, input_precision=channels.PRECISION)
    store_rows(dq, o_query, K, m_t, b_dqA * size.scale, channels.A, channels.AP)
    if channels.EP > 0:
        store_rows(dq + channels.A, o_query, K, m_t, b_dqE * size.scale, channels.E, channels.EP)


@triton.jit
def _visible_keys(
    x, upstream, last, dk, dv, size, softcap, rule, channels, BT: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr
):
    """Gradients of a tile of keys and values, summed over HEADS of the heads that read them."""
    i_n, parts = tl.program_id(0), size.H // HEADS
    i_b, i_part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
    o_n = i_n * BN + tl.arange(0, BN)
    in_bounds = o_n < size.N
    i_g = i_part * HEADS // rule.R
    K = channels.A + channels.E
    k = x.k + (i_b * size.N * size.G + i_g) * K
    # [BN, AP], [BN, EP]
    b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
    b_dkA = tl.zeros((BN, channels.AP), tl.float32)
    b_kE, b_dkE = b_kA, b_dkA
    if channels.EP > 0:
        b_kE = load_rows(k + channels.A, o_n.to(tl.int64), size.G * K, in_bounds, channels.E, channels.EP)
        b_dkE = tl.zeros((BN, channels.EP), tl.float32)
    # [BN, VP]
    b_v, b_dv = b_kA, b_dkA
    if channels.SEPARATE_VALUES:
        v = x.v + (i_b * size.N * size.G + i_g) * channels.V
        b_v = load_rows(v, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels.V, channels.VP)
        b_dv = tl.zeros((BN, channels.VP), tl.float32)
    # the block of a slot starts in it or after its first row, so no earlier query sees it; `last` ends the range
    first = tl.maximum(0, i_n * BN * rule.STRIDE + rule.LENGTH - 1 - size.offset) // BT * BT
    end = tl.load(last + i_b * tl.num_programs(0) + i_n)
    for t0 in range(first, end, BT):
        o_t = t0 + tl.arange(0, BT)
        m_t = o_t < size.T
        low, high = _query_bounds(x.start, i_b, o_t, m_t, size, rule)
        mask = (o_n[:, None] >= low[None, :]) & (o_n[:, None] < high[None, :])
        for i in range(HEADS):
            # 1. probabilities
            o_query = (i_b * size.T + o_t) * size.H + i_part * HEADS + i
            # [BT, AP], [BT, VP]
            b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
            b_do = load_rows(upstream.do, o_query, channels.V, m_t, channels.V, channels.VP)
            b_lse = load_lse(upstream.lse, o_query, m_t)
            b_delta = tl.load(upstream.delta + o_query, mask=m_t, other=0.0)
            # [BN, BT]
            b_s, b_qE = scores(b_kA, b_kE, b_qA, x.q, o_query, K, m_t, channels)
            b_s *= size.scale
            if rule.CAPPED:
                b_s = _softcap(b_s, softcap)
            b_p = tl.where(mask, tl.exp2((b_s - b_lse[None, :]) * LOG2E), 0.0)
            # 2. gradient of the scores
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=channels.PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :]) * size.scale
            if rule.CAPPED:
                b_ds *= 1 - b_s * b_s / (softcap * softcap)
            b_ds = b_ds.to(b_qA.dtype)
            # 3. gradients of values and keys
            if channels.SEPARATE_VALUES:
                b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
            else:
                b_dkA += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
            b_dkA += tl.dot(b_ds, b_qA, input_precision=channels.PRECISION)
            if channels.EP > 0:
                b_dkE += tl.dot(b_ds, b_qE, input_precision=channels.PRECISION)
    o_key = (i_b * size.N + o_n) * parts + i_part
    store_rows(dk, o_key, K, in_bounds, b_dkA, channels.A, channels.AP)
    if channels.EP > 0:
        store_rows(dk + channels.A, o_key, K, in_bounds, b_dkE, channels.E, channels.EP)
    if channels.SEPARATE_VALUES:
        store_rows(dv, o_key, channels.V, in_bounds, b_dv, channels.V, channels.VP)


class _Launch:
    """Arguments that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, start_BT: Tensor, V: int, blocks: VisibleBlocks):
        (self.B, T, H, _), (self.N, G) = q.shape, k.shape[1:3]
        self.channels = Channels.of(q, v, V)
        self.inputs = Inputs(q, k, k if v is None else v, start_BT)
        self.size = Sizes(T, self.N, H, G, blocks.offset, blocks.scale)
        rule = Rule(H // G, blocks.length, blocks.stride, blocks.window, blocks.softcap > 0)
        self.shared = (self.size, blocks.softcap or 1.0, constants(rule), constants(self.channels))

    def by_query(self, kernel: Any, name: str, *arguments: Any) -> None:
        """Launches a program per tile of queries and head."""
        settings = launch_settings(name, self.channels)
        grid = (triton.cdiv(self.size.T, settings["BT"]), self.B * self.size.H)
        kernel[grid](self.inputs, *arguments, *self.shared, **settings)


def visible_forward(
    q: Tensor, k: Tensor, v: Tensor | None, start_BT: Tensor, V: int, blocks: VisibleBlocks
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and log-sum-exp (B, T, H); without ``v`` the values are the first V channels of the keys."""
    (B, T, H, _), N = q.shape, k.shape[1]
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    if N == 0:
        return o.zero_(), lse.fill_(-math.inf)
    _Launch(q, k, v, start_BT, V, blocks).by_query(_visible_forward, "visible_forward", o, lse)
    return o, lse


def visible_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    V: int,
    blocks: VisibleBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the last is empty where the values are channels of the keys."""
    (B, _, H, K), (N, G), R = q.shape, k.shape[1:3], q.shape[2] // k.shape[2]
    dq = torch.empty_like(q)
    if N == 0:
        return dq.zero_(), k.new_zeros(k.shape), k.new_zeros(0 if v is None else v.shape)
    launch = _Launch(q, k, v, start_BT, V, blocks)
    upstream = Upstream(do, lse, output_products(do, o, dlse))
    launch.by_query(_visible_queries, "visible_queries", upstream, dq)
    settings = launch_settings("visible_keys", launch.channels)
    BN = settings["BN"]
    tiles = triton.cdiv(N, BN)
    # few keys: one head per program, summed afterwards; many keys: all heads of a group in one program
    heads = R if tiles * B * G >= 256 else 1
    options: dict[str, Any] = {"device": q.device, "dtype": torch.float32 if heads < R else q.dtype}
    dk = torch.empty(B, N, H // heads, K, **options)
    dv = dk if v is None else torch.empty(B, N, H // heads, V, **options)
    last = _last_queries(start_BT, tiles, BN, blocks)
    _visible_keys[(tiles, B * (H // heads))](
        launch.inputs, upstream, last, dk, dv, *launch.shared, HEADS=heads, **settings
    )
    gradients = [dk] if v is None else [dk, dv]
    if heads < R:
        gradients = [x.view(B, N, G, R, -1).sum(3).to(q.dtype) for x in gradients]
    return dq, gradients[0], k.new_empty(0) if v is None else gradients[1]


def _last_queries(start_BT: Tensor, tiles: int, BN: int, blocks: VisibleBlocks) -> Tensor:
    """(B, tiles) int32: end of the queries that may see the keys of each tile."""
    B, T = start_BT.shape
    low_BT = start_BT // blocks.stride
    if blocks.window and blocks.length == blocks.stride == 1:
        rows_T = torch.arange(blocks.offset, blocks.offset + T, device=start_BT.device, dtype=start_BT.dtype)
        low_BT = torch.maximum(low_BT, rows_T - blocks.window + 1)
    ends = (torch.arange(1, tiles + 1, device=start_BT.device, dtype=low_BT.dtype) * BN).expand(B, tiles)
    return torch.searchsorted(low_BT.contiguous(), ends.contiguous()).to(torch.int32)
