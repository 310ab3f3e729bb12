# mypy: allow-untyped-defs
"""Attention to selected tokens: flash attention over the tiles of keys that a query of a tile selects, masked by bits.

Neighbouring queries select tokens one by one, and yet of n = 1,024 of 8,192 keys nearly every tile of 64 × 64 pairs
has one. Its products are computed for all pairs of the tile, which read keys once for 64 queries; a program that
gathered the keys of one query would read n (K + V) numbers for each. Floors for one sequence of T = 8,192, 16 heads of
64 (K = V), G = 4, bf16:

    products of visible tiles    T²/2 · 2 H (K + V)      137 GFLOP forward, 480 backward (seven products, two kernels)
    products of selected pairs   n T · 2 H (K + V)        34 GFLOP, in reads of n T G (K + V) · 2 B = 8.6 GB
    bits                         T S / 8                   8 MiB, read by every head

A selection without a bit in a tile skips it: the cost follows the selection where that has structure.

Gradients of keys are added chunk by chunk of queries, in their order, in fp32: no floating-point atomics, so results
are bitwise reproducible. Legend as in :mod:`.visible` and :mod:`.marks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.kernels.common import (
    LAUNCH,
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
)
from workbench.ops.sparse_attention.kernels.marks import (
    KEYS,
    ROWS,
    Marked,
    has_bit,
    listed_keys,
    load_words,
    marked_chunks,
    token_words,
)
from workbench.ops.sparse_attention.layout import SelectedBlocks


class Heads(NamedTuple):
    """Compile-time constants."""

    R: int
    """Query heads of a key–value head."""
    VALUES: bool = True
    """Whether values are summed, beside the log-sum-exp."""


@triton.jit
def _token_forward(x, marks, o, lse, size, chunk, heads, channels, BT: tl.constexpr, BN: tl.constexpr):
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    i_b, i_h = (tl.program_id(1) // size.H).to(tl.int64), tl.program_id(1) % size.H
    i_g = i_h // heads.R
    i_m = i_g % chunk.M
    o_c = i_t * BT + tl.arange(0, BT)
    m_t = o_c < chunk.C
    o_query = (i_b * size.T + chunk.first + o_c) * size.H + i_h
    K = channels.A + channels.E
    # [BT, AP], [BT, EP]
    b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
    b_qE = b_qA
    if channels.EP > 0:
        b_qE = load_rows(x.q + channels.A, o_query, K, m_t, channels.E, channels.EP)
    k = x.k + (i_b * size.N * size.G + i_g) * K
    v = x.v + (i_b * size.N * size.G + i_g) * channels.V
    b_m = tl.full((BT,), -float("inf"), tl.float32)
    b_l = tl.zeros((BT,), tl.float32)
    if heads.VALUES:
        b_o = tl.zeros((BT, channels.VP), tl.float32)
    i_list = (i_b * chunk.M + i_m) * chunk.tiles + i_t * BT // ROWS
    for i in range(0, tl.load(marks.words_of + i_list) * (KEYS // BN)):
        # 1. scores
        n0 = listed_keys(marks.by_query + i_list * chunk.W, i, BN)
        o_n = n0 + tl.arange(0, BN)
        in_bounds = o_n < size.N
        # [BN, AP]
        b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [BT, BN]
        b_s, _ = scores(b_qA, b_qE, b_kA, k, o_n.to(tl.int64), size.G * K, in_bounds, channels)
        b_word = load_words(marks.words, i_b, i_m, o_c, m_t, n0 // KEYS, chunk)
        b_s = tl.where(has_bit(b_word[:, None], o_n[None, :]), b_s * (size.scale * LOG2E), -float("inf"))
        # 2. weighted values
        b_p, b_m, b_l, b_rescale = online_softmax_step(b_s, b_m, b_l)
        if heads.VALUES:
            # [BN, VP]
            b_v = load_values(v, b_kA, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels)
            b_o = b_o * b_rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=channels.PRECISION)
    if heads.VALUES:
        store_attention(o, lse, o_query, m_t, b_o, b_m, b_l, channels.V, channels.VP)
    else:
        b_lse = (b_m + tl.log2(tl.where(b_l > 0, b_l, 1.0))) / LOG2E
        tl.store(lse + o_query, tl.where(b_l > 0, b_lse, -float("inf")), mask=m_t)


@triton.jit
def _token_queries(x, marks, upstream, dq, size, chunk, heads, channels, BT: tl.constexpr, BN: tl.constexpr):
    """Gradient of a tile of queries."""
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = (tl.program_id(1) // size.H).to(tl.int64), tl.program_id(1) % size.H
    i_g = i_h // heads.R
    i_m = i_g % chunk.M
    o_c = i_t * BT + tl.arange(0, BT)
    m_t = o_c < chunk.C
    o_query = (i_b * size.T + chunk.first + o_c) * size.H + i_h
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
    k = x.k + (i_b * size.N * size.G + i_g) * K
    v = x.v + (i_b * size.N * size.G + i_g) * channels.V
    i_list = (i_b * chunk.M + i_m) * chunk.tiles + i_t * BT // ROWS
    for i in range(0, tl.load(marks.words_of + i_list) * (KEYS // BN)):
        # 1. probabilities
        n0 = listed_keys(marks.by_query + i_list * chunk.W, i, BN)
        o_n = n0 + tl.arange(0, BN)
        in_bounds = o_n < size.N
        # [BN, AP]
        b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [BT, BN]
        b_s, b_kE = scores(b_qA, b_qE, b_kA, k, o_n.to(tl.int64), size.G * K, in_bounds, channels)
        b_word = load_words(marks.words, i_b, i_m, o_c, m_t, n0 // KEYS, chunk)
        mask = has_bit(b_word[:, None], o_n[None, :])
        b_p = tl.where(mask, tl.exp2(b_s * (size.scale * LOG2E) - (b_lse * LOG2E)[:, None]), 0.0)
        # 2. gradient of the scores
        # [BN, VP]
        b_v = load_values(v, b_kA, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=channels.PRECISION) - b_delta[:, None])
        b_ds = b_ds.to(b_kA.dtype)
        # 3. gradient of the queries
        b_dqA += tl.dot(b_ds, b_kA, input_precision=channels.PRECISION)
        if channels.EP > 0:
            b_dqE += tl.dot(b_ds, b_kE, input_precision=channels.PRECISION)
    store_rows(dq, o_query, K, m_t, b_dqA * size.scale, channels.A, channels.AP)
    if channels.EP > 0:
        store_rows(dq + channels.A, o_query, K, m_t, b_dqE * size.scale, channels.E, channels.EP)


@triton.jit
def _token_keys(
    x,
    marks,
    upstream,
    dk,
    dv,
    size,
    chunk,
    heads,
    channels,
    BT: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Gradients of a tile of keys and values, summed over HEADS of the heads that read them; added to those of earlier
    chunks of queries where ADDS. The first part of the channels, and the values, are divided among SPLIT programs,
    whose registers would not hold the sums of all."""
    i_n, parts = tl.program_id(0), size.H // HEADS
    i_b, i_part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
    A: tl.constexpr = channels.A // SPLIT
    AP: tl.constexpr = channels.AP // SPLIT
    V: tl.constexpr = channels.V // SPLIT
    VP: tl.constexpr = channels.VP // SPLIT
    i_split = tl.program_id(2)
    o_n = i_n * BN + tl.arange(0, BN)
    in_bounds = o_n < size.N
    i_g = i_part * HEADS // heads.R
    i_m = i_g % chunk.M
    o_key = (i_b * size.N + o_n) * parts + i_part
    K = channels.A + channels.E
    k = x.k + (i_b * size.N * size.G + i_g) * K
    # [BN, AP], [BN, EP]
    b_kA = load_rows(k, o_n.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
    b_dkA = tl.zeros((BN, AP), tl.float32)
    b_kE, b_dkE = b_kA, b_dkA
    if channels.EP > 0:
        b_kE = load_rows(k + channels.A, o_n.to(tl.int64), size.G * K, in_bounds, channels.E, channels.EP)
        b_dkE = tl.zeros((BN, channels.EP), tl.float32)
    # [BN, VP]
    b_v, b_dv = b_kA, b_dkA
    if channels.SEPARATE_VALUES:
        v = x.v + (i_b * size.N * size.G + i_g) * channels.V
        b_v = load_rows(v, o_n.to(tl.int64), size.G * channels.V, in_bounds, channels.V, channels.VP)
        b_dv = tl.zeros((BN, VP), tl.float32)
    i_word = i_n * BN // KEYS
    i_list = (i_b * chunk.M + i_m) * chunk.W + i_word
    PER_TILE: tl.constexpr = ROWS // BT * HEADS
    for i in range(0, tl.load(marks.tiles_of + i_list) * PER_TILE):
        # 1. probabilities
        i_tile, i_part_of_tile = i // PER_TILE, i // HEADS
        i_part_of_tile -= i_tile * (ROWS // BT)
        first = tl.load(marks.by_key + i_list * chunk.tiles + i_tile) * ROWS + i_part_of_tile * BT
        o_c = first + tl.arange(0, BT)
        m_t = o_c < chunk.C
        o_query = (i_b * size.T + chunk.first + o_c) * size.H + i_part * HEADS + i % HEADS
        # [BT, AP], [BT, VP]
        b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
        b_do = load_rows(upstream.do, o_query, channels.V, m_t, channels.V, channels.VP)
        b_lse = load_lse(upstream.lse, o_query, m_t)
        b_delta = tl.load(upstream.delta + o_query, mask=m_t, other=0.0)
        # [BN, BT]
        b_s, b_qE = scores(b_kA, b_kE, b_qA, x.q, o_query, K, m_t, channels)
        b_word = load_words(marks.words, i_b, i_m, o_c, m_t, i_word, chunk)
        mask = has_bit(b_word[None, :], o_n[:, None])
        b_p = tl.where(mask, tl.exp2(b_s * (size.scale * LOG2E) - (b_lse * LOG2E)[None, :]), 0.0)
        # 2. gradient of the scores
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=channels.PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :]) * size.scale).to(b_qA.dtype)
        # 3. gradients of values and keys
        if SPLIT > 1:
            b_qA = load_rows(x.q + i_split * A, o_query, K, m_t, A, AP)
            b_do = load_rows(upstream.do + i_split * V, o_query, channels.V, m_t, V, VP)
        if channels.SEPARATE_VALUES:
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
        else:
            b_dkA += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
        b_dkA += tl.dot(b_ds, b_qA, input_precision=channels.PRECISION)
        if channels.EP > 0:
            b_dkE += tl.dot(b_ds, b_qE, input_precision=channels.PRECISION)
    if ADDS:
        b_dkA += load_rows(dk + i_split * A, o_key, K, in_bounds, A, AP)
    store_rows(dk + i_split * A, o_key, K, in_bounds, b_dkA, A, AP)
    if channels.EP > 0:
        m_first = o_n < tl.where(i_split == 0, size.N, 0)
        if ADDS:
            b_dkE += load_rows(dk + channels.A, o_key, K, m_first, channels.E, channels.EP)
        store_rows(dk + channels.A, o_key, K, m_first, b_dkE, channels.E, channels.EP)
    if channels.SEPARATE_VALUES:
        if ADDS:
            b_dv += load_rows(dv + i_split * V, o_key, channels.V, in_bounds, V, VP)
        store_rows(dv + i_split * V, o_key, channels.V, in_bounds, b_dv, V, VP)


def _settings(kernel: str, channels: Channels) -> dict[str, int]:
    """Tile sizes, warps and stages of a launch."""
    widest = max(channels.AP + channels.EP, channels.VP)
    if min(channels.AP, channels.VP) < 64:
        return launch_settings(kernel, channels)
    if widest > 128:
        return LAUNCH[f"{kernel} wide"]
    if channels.PRECISION == "ieee":  # fp32, on no tensor core: more registers, and tiles twice as large
        return LAUNCH[f"{kernel} 128"] | {"num_stages": 2}
    return LAUNCH[f"{kernel} 128" if widest > 64 else kernel]


class _Launch:
    """Arguments that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, V: int, blocks: SelectedBlocks):
        (self.B, self.T, H, _), (N, G) = q.shape, k.shape[1:3]
        self.channels = Channels.of(q, v, V)
        self.inputs = Inputs(q, k, k if v is None else v, starts)
        self.size = Sizes(self.T, N, H, G, blocks.offset, blocks.scale)
        self.words = token_words(starts, blocks.offset, N)

    def chunks(self) -> Iterator[Marked]:
        """Marked chunks of queries."""
        bytes_per_query = self.B * self.inputs.start.shape[2] * triton.cdiv(self.size.N, KEYS.value) * 8
        return marked_chunks(self.words, self.T, bytes_per_query)

    def by_query(self, kernel: Any, name: str, marked: Marked, *arguments: Any) -> None:
        """Launches a program per tile of queries and head."""
        _by_query(
            kernel, name, self.inputs, marked, arguments, self.size, Heads(self.size.H // self.size.G), self.channels
        )


def _by_query(
    kernel: Any,
    name: str,
    inputs: Inputs,
    marked: Marked,
    arguments: tuple[Any, ...],
    size: Sizes,
    heads: Heads,
    channels: Channels,
) -> None:
    settings = _settings(name, channels)
    kernel[(triton.cdiv(marked.chunk.C, settings["BT"]), inputs.q.shape[0] * size.H)](
        inputs,
        marked.marks,
        *arguments,
        size,
        marked.chunk,
        constants(heads),
        constants(channels),
        **settings,
    )


def normalisers(q: Tensor, k: Tensor, lse: Tensor, marked: Marked, scale: float) -> None:
    """Write the log-sum-exp (B, T, H) of the scores of a chunk's marked keys."""
    (T, H), (N, G) = q.shape[1:3], k.shape[1:3]
    channels = Channels.of(q, k, q.shape[-1])
    inputs, size = Inputs(q, k, k, lse), Sizes(T, N, H, G, 0, scale)
    _by_query(_token_forward, "token_normalisers", inputs, marked, (lse, lse), size, Heads(H // G, False), channels)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, start_BT: Tensor, V: int, blocks: SelectedBlocks
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and log-sum-exp (B, T, H) of attention to the rows ``starts``, (B, T, 1 or G, n); without
    ``v`` the values are the first V channels of the keys."""
    B, T, H, _ = q.shape
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    launch = _Launch(q, k, v, starts, V, blocks)
    for marked in launch.chunks():
        launch.by_query(_token_forward, "token_forward", marked, o, lse)
    return o, lse


def selected_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    starts: Tensor,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    V: int,
    blocks: SelectedBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the last is empty where the values are channels of the keys."""
    (B, _, H, K), (N, G), R = q.shape, k.shape[1:3], q.shape[2] // k.shape[2]
    launch = _Launch(q, k, v, starts, V, blocks)
    upstream = Upstream(do, lse, output_products(do, o, dlse))
    settings = _settings("token_keys", launch.channels)
    tiles = triton.cdiv(N, settings["BN"])
    # few keys: one head per program, summed afterwards; many keys: all heads of a group in one program
    heads = R if tiles * B * G >= 256 else 1
    channels, dq = launch.channels, torch.empty_like(q)
    split = 2 if min(channels.A, channels.V) > 128 and (channels.A, channels.V) == (channels.AP, channels.VP) else 1
    dk = torch.empty(B, N, H // heads, K, dtype=torch.float32, device=q.device)
    dv = dk if v is None else torch.empty(B, N, H // heads, V, dtype=torch.float32, device=q.device)
    for marked in launch.chunks():
        launch.by_query(_token_queries, "token_queries", marked, upstream, dq)
        _token_keys[(tiles, B * (H // heads), split)](
            launch.inputs,
            marked.marks,
            upstream,
            dk,
            dv,
            launch.size,
            marked.chunk,
            constants(Heads(R)),
            constants(launch.channels),
            HEADS=heads,
            SPLIT=split,
            ADDS=marked.span.start > 0,
            **settings,
        )
    gradients = [x.view(B, N, G, R // heads, -1).sum(3).to(q.dtype) for x in ([dk] if v is None else [dk, dv])]
    return dq, gradients[0], k.new_empty(0) if v is None else gradients[1]
