# mypy: allow-untyped-defs
"""Kernels of sparse decoding: five launches from a query to its output, lengths read on the device.

:func:`minmax_blocks`   scores of blocks; the program of a group that ends last chooses among them.
:func:`channel_tokens`  scores of candidate tokens per head; weights, and the choice by the program that ends last.
:func:`attention`       partial attention over parts of the chosen tokens; their combination.

To combine in the program that ends last was slower than another launch, and so was programmatic dependent launch, by 0
to 19 % of the whole (H200, Triton 3.6).

A choice finds the score of the last element that still belongs to it by bisection over the bits of its floating-point
number, in one program, and writes positions in ascending order; of equal scores the first positions are taken. More
elements than one program holds are chosen from in rounds.

"The program that ends last" is found by counting arrivals (``tickets``); it resets the counter. What it computes does
not depend on which program it is, so results are bitwise reproducible.

Products have the heads of a group as their first 16 to 64 rows, which selects the instructions of Ampere (``mma``): on
Hopper, ``wgmma`` needs 64 rows.

Naming in the kernels, as in flash-linear-attention: ``i_`` program indices, ``o_`` offsets of a tile, ``m_`` masks,
``b_`` tiles in registers; upper-case sizes. Legend as in the package; J entries of a list of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.layout import Forced, IndexReads, Pool, Searched, TokenKeys

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)

LAUNCH: dict[str, dict[str, int]] = {
    "minmax": {"BN": 64, "fused": 1, "num_warps": 8},
    "minmax latents": {"BN": 32, "fused": 1, "num_warps": 4},
    "scores": {"BM": 256, "num_warps": 4},
    "weights": {"BN": 4096, "fused": 1, "num_warps": 16},
    "select": {"tile": 8192, "num_warps": 16},
    "attend": {"BT": 32, "heads": 16, "programs": 528, "num_warps": 2, "num_stages": 2},
    "attend latents": {"BT": 32, "heads": 16, "programs": 132, "num_warps": 4, "num_stages": 2},
    "combine": {"BV": 128, "num_warps": 4},
    "extend": {"num_warps": 4},
    "read": {"num_warps": 4},
}
"""Tile sizes, warps and pipeline stages of each kernel, the best or close to it for 1 to 8 sequences of 32k to 128k
tokens on an H200. ``BN`` of weights: numbers of four heads in a program; ``tile``: elements that a program chooses from
where one is not enough; ``heads``: most heads of a group in one program; ``programs``: into how many programs the
chosen tokens are split, about; ``fused``: whether the program that ends last chooses, instead of another launch."""
TILE = 16_384
"""Most elements that one program chooses from."""


def padded(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def settings_of(kernel: str, latents: bool = False) -> dict[str, int]:
    """Launch settings of a kernel."""
    return dict(LAUNCH[f"{kernel} latents" if latents else kernel])


def warps_for(elements: int, warps: int) -> int:
    """At least ``warps``, with at most 32 elements of a choice per thread."""
    return max(warps, min(16, elements // 1024))


# -- arrivals --------------------------------------------------------------------------------------------------------


@triton.jit
def _ends_last(ticket, programs):
    """Whether all other of the ``programs`` have arrived; their stores are visible then."""
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if is_last:
        tl.store(ticket, 0)
    return is_last


# -- the choice ------------------------------------------------------------------------------------------------------


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _choose(b_score, m_valid, m_forced, want):
    """The ``want`` best valid elements, forced ones first, of equal ones the first.

    Returns:
        which are chosen, their rank by position, and how many they are.
    """
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    # whole numbers in the order of the scores
    b_key = tl.where(b_bits < 0, b_bits ^ LARGEST, b_bits)
    b_key = tl.where(m_valid, tl.where(m_forced, LARGEST, b_key), SMALLEST)
    is_free = m_valid & (b_key < LARGEST)
    low = tl.minimum(tl.min(tl.where(is_free, b_key, LARGEST), axis=0), LARGEST - 1)
    high = tl.maximum(tl.max(tl.where(is_free, b_key, SMALLEST), axis=0) + 1, low + 1)
    at_low = tl.sum(m_valid.to(tl.int32), axis=0)
    at_high = at_low - tl.sum(is_free.to(tl.int32), axis=0)
    # at least `want` elements are not below low, unless fewer exist, and fewer than `want` not below high
    while (at_low > want) & (low + 1 < high):
        # three thresholds at a time, whose counts share 64 bits
        second = _middle(low, high)
        first, third = _middle(low, second), _middle(second, high)
        b_count = (b_key >= first).to(tl.int64) + ((b_key >= second).to(tl.int64) << 21)
        counts = tl.sum(b_count + ((b_key >= third).to(tl.int64) << 42), axis=0)
        at_first = (counts & 0x1FFFFF).to(tl.int32)
        at_second, at_third = ((counts >> 21) & 0x1FFFFF).to(tl.int32), (counts >> 42).to(tl.int32)
        if at_third >= want:
            low, at_low = third, at_third
        elif at_second >= want:
            low, at_low, high, at_high = second, at_second, third, at_third
        elif at_first >= want:
            low, at_low, high, at_high = first, at_first, second, at_second
        else:
            high, at_high = first, at_first
    m_above = b_key >= high
    m_equal = (b_key >= low) & (b_key < high)
    # ranks of both kinds by position, in one scan
    b_rank = tl.cumsum(m_above.to(tl.int32) + (m_equal.to(tl.int32) << 15), axis=0)
    b_above, b_equal = b_rank & 0x7FFF, b_rank >> 15
    room = tl.maximum(want - at_high, 0)
    m_chosen = (m_above & (b_above <= want)) | (m_equal & (b_equal <= room))
    b_slot = tl.minimum(b_above, want) + tl.minimum(b_equal, room) - 1
    return m_chosen, b_slot, tl.minimum(at_high, want) + tl.minimum(at_low - at_high, room)


@triton.jit
def _store_none(chosen, total, COUNT: tl.constexpr):
    """-1 behind the ``total`` chosen ones."""
    o_c = tl.arange(0, triton.next_power_of_2(COUNT))
    tl.store(chosen + o_c, tl.full((triton.next_power_of_2(COUNT),), -1, tl.int64), mask=(o_c >= total) & (o_c < COUNT))


@triton.jit
def _choose_blocks(
    scores,
    chosen,
    length,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NP: tl.constexpr,
):
    o_n = tl.arange(0, NP)
    m_valid = o_n < (length + BLOCK - 1) // BLOCK
    m_forced = (o_n * BLOCK < SINK) | (o_n >= tl.maximum(length - LOCAL, 0) // BLOCK)
    b_score = tl.load(scores + o_n, mask=m_valid, other=0.0, cache_modifier=".cg")
    m_chosen, b_slot, total = _choose(b_score, m_valid, m_forced, COUNT)
    tl.store(chosen + b_slot, o_n.to(tl.int64), mask=m_chosen)
    _store_none(chosen, total, COUNT)


@triton.jit
def _entry(listed, first_listed, o_j, J: tl.constexpr, FIRST: tl.constexpr):
    """Blocks at positions of a list; of the second list where the first one is empty."""
    b_block = tl.load(listed + o_j, mask=o_j < J, other=-1)
    if FIRST:  # noqa: SIM102
        if tl.load(listed) < 0:
            b_block = tl.load(first_listed + o_j, mask=o_j < J, other=-1)
    return b_block


@triton.jit
def _newest_is_unlisted(listed, first_listed, length, J: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    b_block = _entry(listed, first_listed, tl.arange(0, triton.next_power_of_2(J)), J, FIRST)
    return tl.max((b_block == (length - 1) // BLOCK).to(tl.int32), axis=0) == 0


@triton.jit
def _choose_tokens(
    weights,
    listed,
    first_listed,
    chosen,
    length,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    NP: tl.constexpr,
):
    o_n = tl.arange(0, NP)
    b_token, m_valid = o_n.to(tl.int64), o_n < length
    if J > 0:
        b_block = _entry(listed, first_listed, o_n // BLOCK, J, FIRST)
        b_token = b_block * BLOCK + o_n % BLOCK
        m_valid = (b_block >= 0) & (b_token < length)
    m_forced = (b_token < SINK) | (b_token >= length - LOCAL)
    want = COUNT
    if NEWEST:  # it is kept whatever its weight, and is the last of all
        unlisted = _newest_is_unlisted(listed, first_listed, length, J, BLOCK, FIRST)
        want = COUNT - unlisted.to(tl.int32)
    b_weight = tl.load(weights + o_n, mask=m_valid, other=0.0, cache_modifier=".cg")
    m_chosen, b_slot, total = _choose(b_weight, m_valid, m_forced, want)
    tl.store(chosen + b_slot, b_token, mask=m_chosen)
    if NEWEST:
        if unlisted:
            tl.store(chosen + total, (length - 1).to(tl.int64))
        total += unlisted.to(tl.int32)
    _store_none(chosen, total, COUNT)


@triton.jit
def _select_kernel(
    scores,
    positions,
    lengths,
    out_scores,
    out_positions,
    N,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    UNIT: tl.constexpr,
    COUNT: tl.constexpr,
    LISTED: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The best of each tile of a row; units of UNIT tokens, forced where they overlap the first or newest tokens."""
    i_tile, i_bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + i_bg // GROUPS).to(tl.int32)
    o_n = i_tile * TILE + tl.arange(0, TILE)
    b_position = o_n
    if LISTED:
        b_position = tl.load(positions + i_bg * N + o_n, mask=o_n < N, other=-1).to(tl.int32)
    m_valid = (o_n < N) & (b_position >= 0) & (b_position * UNIT < length)
    m_forced = (b_position * UNIT < SINK) | (b_position >= tl.maximum(length - LOCAL, 0) // UNIT)
    b_score = tl.load(scores + i_bg * N + o_n, mask=m_valid, other=0.0)
    m_chosen, b_slot, total = _choose(b_score, m_valid, m_forced, COUNT)
    base = (i_bg * tl.num_programs(0) + i_tile) * COUNT
    tl.store(out_positions + base + b_slot, b_position.to(tl.int64), mask=m_chosen)
    tl.store(out_scores + base + b_slot, b_score, mask=m_chosen)
    _store_none(out_positions + base, total, COUNT)


def select(
    scores_BGN: Tensor, lengths_B: Tensor, count: int, forced: Forced, unit: int, positions_BGN: Tensor | None = None
) -> Tensor:
    B, G, N = scores_BGN.shape
    scores, positions = scores_BGN.contiguous(), None if positions_BGN is None else positions_BGN.contiguous()
    settings = settings_of("select")
    tile_size = settings.pop("tile")
    if 2 * count > tile_size:
        tile_size = TILE
    while True:
        tile = min(tile_size if N > TILE else TILE, padded(N))
        tiles = triton.cdiv(N, tile)
        out = torch.empty(B, G, tiles * count, dtype=torch.int64, device=scores.device)
        out_scores = torch.empty(B, G, tiles * count, dtype=torch.float32, device=scores.device)
        _select_kernel[(tiles, B * G)](
            scores,
            positions,
            lengths_B,
            out_scores,
            out,
            N,
            SINK=forced.sink,
            LOCAL=forced.local,
            UNIT=unit,
            COUNT=count,
            LISTED=positions is not None,
            TILE=tile,
            GROUPS=G,
            **settings,
        )
        if tiles == 1:
            return out
        scores, positions, N = out_scores, out, tiles * count


# -- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def _minmax_kernel(
    q,
    upper,
    lower,
    lengths,
    scores,
    chosen,
    tickets,
    q_b,
    q_h,
    N,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BN: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NP: tl.constexpr,
    FUSED: tl.constexpr,
):
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    length = tl.load(lengths + i_b).to(tl.int32)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < (length + BLOCK - 1) // BLOCK
    if tl.program_id(0) * BN * BLOCK < length:
        o_r = tl.arange(0, RP)
        b_score = tl.zeros((BN,), tl.float32)
        for start in tl.static_range(0, K, CHANNELS):
            o_k = start + tl.arange(0, CHANNELS)
            m_k = o_k < K
            p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h + o_k[None, :]
            b_q = tl.load(p_q, mask=(o_r < R)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_positive, b_negative = tl.sum(tl.maximum(b_q, 0.0), axis=0), tl.sum(tl.minimum(b_q, 0.0), axis=0)
            at = (i_bg * N + o_n)[:, None] * K + o_k[None, :]
            mask = m_n[:, None] & m_k[None, :]
            b_upper = tl.load(upper + at, mask=mask, other=0.0).to(tl.float32)
            b_lower = tl.load(lower + at, mask=mask, other=0.0).to(tl.float32)
            b_score += tl.sum(b_upper * b_positive[None, :] + b_lower * b_negative[None, :], axis=1)
        tl.store(scores + i_bg * N + o_n, b_score, mask=m_n)
    if FUSED:  # noqa: SIM102  (one condition for the compiler)
        if _ends_last(tickets + i_bg, tl.num_programs(0)):
            _choose_blocks(scores + i_bg * N, chosen + i_bg * COUNT, length, COUNT, BLOCK, SINK, LOCAL, NP)


def minmax_blocks(
    q_BHK: Tensor,
    upper_BGNK: Tensor,
    lower_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    B, G, N, K = upper_BGNK.shape
    H, settings, q_BHK = q_BHK.shape[1], settings_of("minmax", K > 256), q_BHK.contiguous()
    fused = bool(settings.pop("fused")) and N <= TILE and tickets is not None
    if fused:
        settings["num_warps"] = warps_for(padded(N), settings["num_warps"])
    scores = torch.empty(B, G, N, dtype=torch.float32, device=q_BHK.device)
    chosen = torch.empty(B, G, count, dtype=torch.int64, device=q_BHK.device)
    _minmax_kernel[(triton.cdiv(N, settings["BN"]), B * G)](
        q_BHK,
        upper_BGNK,
        lower_BGNK,
        lengths_B,
        scores,
        chosen,
        tickets,
        q_BHK.stride(0),
        q_BHK.stride(1),
        N,
        GROUPS=G,
        R=H // G,
        RP=triton.next_power_of_2(H // G),
        K=K,
        CHANNELS=min(128 if K % 128 == 0 else 64, padded(K)),
        COUNT=count,
        BLOCK=block,
        SINK=forced.sink,
        LOCAL=forced.local,
        NP=padded(N),
        FUSED=fused,
        **settings,
    )
    return chosen if fused else select(scores, lengths_B, count, forced, block)


# -- softmax scores of every head, and their mean weights ------------------------------------------------------------


@triton.jit
def _scores_kernel(
    q,
    channels,
    keys,
    steps,
    lengths,
    listed,
    first_listed,
    scores,
    partial,
    q_b,
    q_h,
    S,
    M,
    scale,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    CODES: tl.constexpr,
    GATHER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """log2 of the unnormalised weight of every candidate, per head, and maximum and sum over the tile.

    Rows of ``keys`` stand for UNIT tokens each, whose number is added as its logarithm.
    """
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    length = tl.load(lengths + i_b).to(tl.int32)
    o_m, o_r = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RP)
    b_row, m_m = o_m.to(tl.int64), o_m * UNIT < length
    if J > 0:
        b_block = _entry(listed + i_bg * J, first_listed + i_bg * J, o_m // BLOCK, J, FIRST)
        b_row = b_block * BLOCK + o_m % BLOCK
        m_m = (b_block >= 0) & (b_row < length)
        if NEWEST:
            unlisted = _newest_is_unlisted(listed + i_bg * J, first_listed + i_bg * J, length, J, BLOCK, FIRST)
            is_newest = o_m == J * BLOCK
            b_row = tl.where(is_newest, length - 1, b_row)
            m_m = tl.where(is_newest, unlisted.to(tl.int32), m_m.to(tl.int32)) > 0
    m_m = m_m & (o_m < M)
    b_score = tl.zeros((RP, BM), tl.float32)
    p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h
    m_r = o_r < R
    for start in tl.static_range(0, C // 2 if CODES else C, CHANNELS):
        o_c = start + tl.arange(0, CHANNELS)
        m_c = o_c < (C // 2 if CODES else C)
        b_key = tl.load(
            keys + (i_bg * S + b_row)[:, None] * (C // 2 if CODES else C) + o_c[None, :],
            mask=m_m[:, None] & m_c[None, :],
            other=0,
        )
        b_channel = o_c
        if GATHER:
            b_channel = tl.load(channels + i_g * C + o_c, mask=m_c, other=0)
        b_q = tl.load(p_q + b_channel[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
        if CODES:
            b_low = ((b_key & 15).to(tl.float32) - 8.0).to(b_q.dtype)
            b_high = ((b_key >> 4).to(tl.float32) - 8.0).to(b_q.dtype)
            b_channel = o_c + C // 2
            if GATHER:
                b_channel = tl.load(channels + i_g * C + C // 2 + o_c, mask=m_c, other=0)
            b_q_high = tl.load(p_q + b_channel[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
            b_score = tl.dot(b_q, tl.trans(b_low), b_score, input_precision=PRECISION)
            b_score = tl.dot(b_q_high, tl.trans(b_high), b_score, input_precision=PRECISION)
        else:
            b_score = tl.dot(b_q, tl.trans(b_key.to(b_q.dtype)), b_score, input_precision=PRECISION)
    b_score *= scale * LOG2E
    if CODES:
        b_step = tl.load(steps + i_bg * S + b_row, mask=m_m, other=0.0).to(tl.float32)
        b_score *= b_step[None, :]
    if UNIT > 1:
        b_score += tl.log2(tl.minimum(tl.maximum(length - o_m * UNIT, 1), UNIT).to(tl.float32))[None, :]
    b_score = tl.where(m_m[None, :], b_score, -float("inf"))
    o_h = i_b * GROUPS * R + i_g * R + o_r
    tl.store(scores + o_h[:, None] * M + o_m[None, :], b_score, mask=m_r[:, None] & (o_m < M)[None, :])
    b_max = tl.max(b_score, axis=1)
    b_sum = tl.sum(tl.exp2(b_score - tl.where(b_max == -float("inf"), 0.0, b_max)[:, None]), axis=1)
    p_partial = partial + (o_h * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(p_partial, b_max, mask=m_r)
    tl.store(p_partial + 1, b_sum, mask=m_r)


@triton.jit
def _weights_kernel(
    scores,
    partial,
    lengths,
    listed,
    first_listed,
    weights,
    chosen,
    tickets,
    M,
    N,
    TILES,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    PER: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    NP: tl.constexpr,
    TP: tl.constexpr,
    FUSED: tl.constexpr,
    BN: tl.constexpr,
):
    """Mean over the heads of a group of their softmax weights, summed over PER candidates that follow each other.

    These are sub-blocks where BLOCKS, and blocks are chosen; otherwise tokens."""
    i_bg = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + i_bg // GROUPS).to(tl.int32)
    o_r, o_t = tl.arange(0, RP), tl.arange(0, TP)
    o_h, m_r = i_bg * R + o_r, o_r < R
    b_max, b_sum = tl.full((RP,), -float("inf"), tl.float32), tl.zeros((RP,), tl.float32)
    for start in range(0, TILES, TP):
        p_partial = partial + (o_h[:, None] * TILES + start + o_t[None, :]) * 2
        mask = m_r[:, None] & (start + o_t < TILES)[None, :]
        b_tile_max = tl.load(p_partial, mask=mask, other=-float("inf"))
        b_tile_sum = tl.load(p_partial + 1, mask=mask, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_tile_max, axis=1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(b_tile_sum * tl.exp2(b_tile_max - b_safe[:, None]), axis=1)
        b_max = b_new
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
    o_m = tl.program_id(0) * BN * PER + tl.arange(0, BN * PER)
    b_score = tl.load(
        scores + o_h[:, None] * M + o_m[None, :], mask=m_r[:, None] & (o_m < M)[None, :], other=-float("inf")
    )
    b_weight = tl.sum(tl.exp2(b_score - b_lse[:, None]), axis=0) / R
    if PER > 1:
        b_weight = tl.sum(tl.reshape(b_weight, (BN, PER)), axis=1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(weights + i_bg * N + o_n, b_weight, mask=o_n < N)
    if FUSED:  # noqa: SIM102  (one condition for the compiler)
        if _ends_last(tickets + i_bg, tl.num_programs(0)):
            if BLOCKS:
                _choose_blocks(weights + i_bg * N, chosen + i_bg * COUNT, length, COUNT, BLOCK, SINK, LOCAL, NP)
            else:
                _choose_tokens(
                    weights + i_bg * N,
                    listed + i_bg * J,
                    first_listed + i_bg * J,
                    chosen + i_bg * COUNT,
                    length,
                    COUNT,
                    BLOCK,
                    J,
                    SINK,
                    LOCAL,
                    NEWEST,
                    FIRST,
                    NP,
                )


class Head(NamedTuple):
    """Scores (log2 units) of every candidate per head, (B, H, M), and what a tile of them adds up to."""

    scores: Tensor
    partial: Tensor
    tiles: int


def _head_scores(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    listed_BGJ: Tensor | None,
    first_BGJ: Tensor | None,
    *,
    block: int,
    newest: bool,
    unit: int,
    scale: float,
) -> Head:
    B, G, S, width = keys.keys_BGSc.shape
    H, q_BHK, settings = q_BHK.shape[1], q_BHK.contiguous(), settings_of("scores")
    J = 0 if listed_BGJ is None else listed_BGJ.shape[2]
    M = J * block + newest if J else S
    tiles = triton.cdiv(M, settings["BM"])
    scores = torch.empty(B, H, M, dtype=torch.float32, device=q_BHK.device)
    partial = torch.empty(B, H, tiles, 2, dtype=torch.float32, device=q_BHK.device)
    codes = keys.steps_BGS is not None
    _scores_kernel[(tiles, B * G)](
        q_BHK,
        keys.channels_Gc,
        keys.keys_BGSc,
        keys.steps_BGS,
        lengths_B,
        listed_BGJ if J else lengths_B,
        first_BGJ if first_BGJ is not None else lengths_B,
        scores,
        partial,
        q_BHK.stride(0),
        q_BHK.stride(1),
        S,
        M,
        scale,
        GROUPS=G,
        R=H // G,
        RP=padded(H // G),
        C=width * (2 if codes else 1),
        CHANNELS=min(128 if width % 128 == 0 else 64, padded(width)),
        CODES=codes,
        GATHER=keys.channels_Gc is not None,
        UNIT=unit,
        BLOCK=block,
        J=J,
        NEWEST=newest,
        FIRST=first_BGJ is not None,
        PRECISION=precision(q_BHK),
        **settings,
    )
    return Head(scores, partial, tiles)


def _weigh(
    heads: Head,
    lengths_B: Tensor,
    listed_BGJ: Tensor | None,
    first_BGJ: Tensor | None,
    tickets: Tensor | None,
    *,
    groups: int,
    block: int,
    newest: bool,
    per: int | None,
    count: int,
    forced: Forced,
) -> tuple[Tensor, Tensor | None]:
    """Mean weights of the candidates, or of blocks of ``per`` sub-blocks, and the choice where one program makes it."""
    B, H, M = heads.scores.shape
    J = 0 if listed_BGJ is None else listed_BGJ.shape[2]
    is_blocks, per = per is not None, per or 1
    length = J * block if J else M // per
    settings = settings_of("weights")
    fused = bool(settings.pop("fused")) and length <= TILE and tickets is not None
    N = length if fused or not J else M
    settings["BN"] = max(16, settings["BN"] // triton.next_power_of_2(per * max(1, H // groups // 4)))
    weights = torch.empty(B, groups, N, dtype=torch.float32, device=lengths_B.device)
    chosen = torch.empty(B, groups, count, dtype=torch.int64, device=lengths_B.device) if fused else None
    _weights_kernel[(triton.cdiv(N, settings["BN"]), B * groups)](
        heads.scores,
        heads.partial,
        lengths_B,
        listed_BGJ if J else lengths_B,
        first_BGJ if first_BGJ is not None else lengths_B,
        weights,
        chosen,
        tickets,
        M,
        N,
        heads.tiles,
        GROUPS=groups,
        R=H // groups,
        RP=triton.next_power_of_2(H // groups),
        PER=per,
        BLOCKS=is_blocks,
        COUNT=count,
        BLOCK=block,
        J=J,
        SINK=forced.sink,
        LOCAL=forced.local,
        NEWEST=newest,
        FIRST=first_BGJ is not None,
        NP=padded(length),
        TP=min(64, padded(heads.tiles)),
        FUSED=fused,
        **settings,
    )
    return weights, chosen


def mean_blocks(
    q_BHK: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    sub_block: int,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    keys = TokenKeys(means_BGNK, None, None)
    heads = _head_scores(q_BHK, keys, lengths_B, None, None, block=block, newest=False, unit=sub_block, scale=scale)
    weights, chosen = _weigh(
        heads,
        lengths_B,
        None,
        None,
        tickets,
        groups=means_BGNK.shape[1],
        block=block,
        newest=False,
        per=block // sub_block,
        count=count,
        forced=forced,
    )
    return select(weights, lengths_B, count, forced, block) if chosen is None else chosen


def channel_tokens(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    searched: Searched | None,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    listed, first, block, newest = (None, None, 1, False) if searched is None else searched
    same: dict[str, Any] = {"block": block, "newest": newest}
    heads = _head_scores(q_BHK, keys, lengths_B, listed, first, unit=1, scale=scale, **same)
    groups = keys.keys_BGSc.shape[1]
    weights, chosen = _weigh(
        heads, lengths_B, listed, first, tickets, groups=groups, per=None, count=count, forced=forced, **same
    )
    if chosen is not None:
        return chosen
    positions = None if searched is None else searched.tokens(lengths_B)
    return select(weights, lengths_B, count, forced, 1, positions)


# -- attention over chosen tokens ------------------------------------------------------------------------------------


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


# -- new tokens ------------------------------------------------------------------------------------------------------


@triton.jit
def _extend_minmax_kernel(
    upper,
    lower,
    k,
    positions,
    k_b,
    k_g,
    N,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + i_bg // GROUPS)
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_k = tl.load(k + i_bg // GROUPS * k_b + i_bg % GROUPS * k_g + o_k, mask=m_k, other=0.0)
    b_k = b_k.to(upper.dtype.element_ty).to(tl.float32)
    at = (i_bg * N + position // BLOCK) * K + o_k
    b_upper, b_lower = b_k, b_k
    if position % BLOCK != 0:
        b_upper = tl.maximum(b_k, tl.load(upper + at, mask=m_k, other=0.0).to(tl.float32))
        b_lower = tl.minimum(b_k, tl.load(lower + at, mask=m_k, other=0.0).to(tl.float32))
    tl.store(upper + at, b_upper.to(upper.dtype.element_ty), mask=m_k)
    tl.store(lower + at, b_lower.to(lower.dtype.element_ty), mask=m_k)


def extend_minmax(upper_BGNK: Tensor, lower_BGNK: Tensor, k_BGK: Tensor, position_B: Tensor, block: int) -> None:
    B, G, N, K = upper_BGNK.shape
    _extend_minmax_kernel[(B * G,)](
        upper_BGNK,
        lower_BGNK,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        N,
        GROUPS=G,
        BLOCK=block,
        K=K,
        KP=padded(K),
        **settings_of("extend"),
    )


@triton.jit
def _extend_means_kernel(
    means,
    sums,
    k,
    positions,
    k_b,
    k_g,
    N,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + i_bg // GROUPS)
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_sum = tl.load(k + i_bg // GROUPS * k_b + i_bg % GROUPS * k_g + o_k, mask=m_k, other=0.0).to(tl.float32)
    if position % BLOCK != 0:
        b_sum += tl.load(sums + i_bg * K + o_k, mask=m_k, other=0.0)
    tl.store(sums + i_bg * K + o_k, b_sum, mask=m_k)
    b_mean = tl.div_rn(b_sum, tl.zeros((KP,), tl.float32) + (position % BLOCK + 1))
    tl.store(means + (i_bg * N + position // BLOCK) * K + o_k, b_mean.to(means.dtype.element_ty), mask=m_k)


def extend_means(means_BGNK: Tensor, sum_BGK: Tensor, k_BGK: Tensor, position_B: Tensor, sub_block: int) -> None:
    B, G, N, K = means_BGNK.shape
    _extend_means_kernel[(B * G,)](
        means_BGNK,
        sum_BGK,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        N,
        GROUPS=G,
        BLOCK=sub_block,
        K=K,
        KP=padded(K),
        **settings_of("extend"),
    )


@triton.jit
def _code(b_x, b_step):
    """Nearest whole number of steps, half to even, from -7 to 7, plus 8."""
    b_code = tl.div_rn(b_x, b_step)
    b_code = (b_code + 12582912.0) - 12582912.0
    return (tl.minimum(tl.maximum(b_code, -7.0), 7.0) + 8.0).to(tl.int32)


@triton.jit
def _extend_codes_kernel(
    keys,
    steps,
    channels,
    k,
    positions,
    k_b,
    k_g,
    S,
    GROUPS: tl.constexpr,
    CODES: tl.constexpr,
    HALF: tl.constexpr,
    HP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    i_g = i_bg % GROUPS
    at = i_bg * S + tl.load(positions + i_bg // GROUPS)
    o_c = tl.arange(0, HP)
    m_c = o_c < HALF
    p_channel, p_k = channels + i_g * 2 * HALF + o_c, k + i_bg // GROUPS * k_b + i_g * k_g
    b_low = tl.load(p_k + tl.load(p_channel, mask=m_c, other=0), mask=m_c, other=0.0)
    b_high = tl.load(p_k + tl.load(p_channel + HALF, mask=m_c, other=0), mask=m_c, other=0.0)
    if CODES:
        b_low, b_high = b_low.to(tl.float32), b_high.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(b_low), tl.abs(b_high)), axis=0)
        b_step = tl.div_rn(tl.zeros((HP,), tl.float32) + largest, tl.full((HP,), 7.0, tl.float32)).to(tl.float16)
        b_safe = tl.maximum(b_step.to(tl.float32), 6.103515625e-05)
        b_code = _code(b_low, b_safe) | (_code(b_high, b_safe) << 4)
        tl.store(keys + at * HALF + o_c, b_code.to(tl.uint8), mask=m_c)
        tl.store(steps + at + o_c, b_step, mask=o_c == 0)
    else:
        tl.store(keys + at * 2 * HALF + o_c, b_low.to(keys.dtype.element_ty), mask=m_c)
        tl.store(keys + at * 2 * HALF + HALF + o_c, b_high.to(keys.dtype.element_ty), mask=m_c)


def extend_codes(keys: TokenKeys, k_BGK: Tensor, position_B: Tensor) -> None:
    B, G, S, _ = keys.keys_BGSc.shape
    channels = keys.channels_Gc
    assert channels is not None
    half = channels.shape[1] // 2
    _extend_codes_kernel[(B * G,)](
        keys.keys_BGSc,
        keys.steps_BGS,
        channels,
        k_BGK,
        position_B,
        *k_BGK.stride()[:2],
        S,
        GROUPS=G,
        CODES=keys.steps_BGS is not None,
        HALF=half,
        HP=padded(half),
        **settings_of("extend"),
    )


# -- what a step read ------------------------------------------------------------------------------------------------


@triton.jit
def _among(b_unit, others, n, CHUNK: tl.constexpr):
    """Which are in a list; and whether it has any."""
    b_found, any_other = tl.zeros(b_unit.shape, tl.int32), 0
    for start in range(0, n, CHUNK):
        o_n = start + tl.arange(0, CHUNK)
        b_other = tl.load(others + o_n, mask=o_n < n, other=-1)
        is_same = (b_unit[:, None] == b_other[None, :]) & (b_other >= 0)[None, :]
        b_found = tl.maximum(b_found, tl.max(is_same.to(tl.int32), axis=1))
        any_other = tl.maximum(any_other, tl.max((b_other >= 0).to(tl.int32), axis=0))
    return b_found, any_other


@triton.jit
def _tokens_of_blocks(b_block, length, BLOCK: tl.constexpr):
    b_tokens = tl.minimum(tl.maximum(length - b_block * BLOCK, 0), BLOCK)
    return tl.sum(tl.where(b_block >= 0, b_tokens, 0), axis=0)


@triton.jit
def _read_kernel(
    tokens,
    units,
    previous,
    resident,
    lengths,
    listed,
    first_listed,
    counts,
    numbers,
    tickets,
    n,
    m,
    r,
    row_bytes,
    block_bytes,
    token_bytes,
    B,
    GROUPS: tl.constexpr,
    NP: tl.constexpr,
    MP: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    JBLOCK: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    BP: tl.constexpr,
):
    i_bg = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + i_bg // GROUPS)
    o_n, o_m = tl.arange(0, NP), tl.arange(0, MP)
    b_token = tl.load(tokens + i_bg * n + o_n, mask=o_n < n, other=-1)
    kept = tl.sum((b_token >= 0).to(tl.int64), axis=0)
    if UNIT > 1:
        kept = _tokens_of_blocks(b_token, length, UNIT)
    b_unit = tl.load(units + i_bg * m + o_m, mask=o_m < m, other=-1)
    is_unit = b_unit >= 0
    b_found, any_previous = _among(b_unit, previous + i_bg * m, m, CHUNK)
    hits = 0
    if HAS_RESIDENT:
        b_hit, _ = _among(b_unit, resident + i_bg * r, r, CHUNK)
        is_hit = (b_hit > 0) | (b_unit == (length - 1) // BLOCK)
        hits = tl.sum((is_hit & is_unit).to(tl.int32), axis=0)
    candidates = length
    if J > 0:
        b_block = _entry(listed + i_bg * J, first_listed + i_bg * J, tl.arange(0, triton.next_power_of_2(J)), J, FIRST)
        candidates = _tokens_of_blocks(b_block, length, JBLOCK)
        if NEWEST:
            candidates += 1 - tl.max((b_block == (length - 1) // JBLOCK).to(tl.int64), axis=0)
    p_count = counts + i_bg * 6
    tl.store(p_count, kept)
    tl.store(p_count + 1, tl.sum(is_unit.to(tl.int64), axis=0))
    tl.store(p_count + 2, tl.sum((is_unit & (b_found > 0)).to(tl.int64), axis=0))
    tl.store(p_count + 3, any_previous)
    tl.store(p_count + 4, hits)
    tl.store(p_count + 5, candidates)
    tl.debug_barrier()  # every thread has read the list that is replaced, which resident and listed may be too
    tl.store(previous + i_bg * m + o_m, b_unit, mask=o_m < m)
    if _ends_last(tickets, tl.num_programs(0)):
        o_bg, programs = tl.arange(0, BP), tl.num_programs(0)
        p_all = counts + o_bg * 6
        mask = o_bg < programs
        all_kept = tl.sum(tl.load(p_all, mask=mask, other=0, cache_modifier=".cg"), axis=0).to(tl.float64)
        all_units = tl.sum(tl.load(p_all + 1, mask=mask, other=0, cache_modifier=".cg"), axis=0).to(tl.float64)
        all_shared = tl.sum(tl.load(p_all + 2, mask=mask, other=0, cache_modifier=".cg"), axis=0).to(tl.float64)
        had_any = tl.max(tl.load(p_all + 3, mask=mask, other=0, cache_modifier=".cg"), axis=0)
        all_hits = tl.sum(tl.load(p_all + 4, mask=mask, other=0, cache_modifier=".cg"), axis=0).to(tl.float64)
        all_searched = tl.sum(tl.load(p_all + 5, mask=mask, other=0, cache_modifier=".cg"), axis=0).to(tl.float64)
        b_length = tl.load(lengths + o_bg, mask=o_bg < B, other=0)
        all_blocks = tl.sum((b_length + BLOCK - 1) // BLOCK, axis=0).to(tl.float64)
        tl.store(numbers, all_kept / programs)
        tl.store(numbers + 1, all_units / programs)
        tl.store(numbers + 2, tl.where(had_any > 0, all_shared / all_units, float("nan")))
        if HAS_RESIDENT:
            tl.store(numbers + 3, all_hits / all_units)
        else:
            tl.store(numbers + 3, float("nan"))
        index_bytes = all_blocks * block_bytes + all_searched * token_bytes
        tl.store(numbers + 4, (all_kept * row_bytes + index_bytes) / B)
        tl.store(numbers + 5, tl.sum(b_length, axis=0).to(tl.float64) * row_bytes * GROUPS / B)
        tl.store(numbers + 6, 0.0)


def read_numbers(
    tokens_BGn: Tensor,
    units_BGm: Tensor,
    previous_BGm: Tensor,
    resident_BGr: Tensor | None,
    lengths_B: Tensor,
    block: int,
    row_bytes: float,
    index: IndexReads,
    tickets: Tensor,
) -> Tensor:
    (B, G, n), m = tokens_BGn.shape, units_BGm.shape[-1]
    listed, first, size, newest = index.searched or (None, None, 1, False)
    MP = padded(m)
    numbers = torch.empty(7, dtype=torch.float64, device=lengths_B.device)
    _read_kernel[(B * G,)](
        tokens_BGn.contiguous(),
        units_BGm.contiguous(),
        previous_BGm,
        resident_BGr,
        lengths_B,
        lengths_B if listed is None else listed,
        lengths_B if first is None else first,
        torch.empty(B, G, 6, dtype=torch.int64, device=lengths_B.device),
        numbers,
        tickets,
        n,
        m,
        0 if resident_BGr is None else resident_BGr.shape[-1],
        float(row_bytes),
        float(index.block_bytes),
        float(index.token_bytes),
        B,
        GROUPS=G,
        NP=padded(n),
        MP=MP,
        CHUNK=max(1, 4096 // MP),
        UNIT=block,
        HAS_RESIDENT=resident_BGr is not None,
        BLOCK=index.block,
        J=0 if listed is None else listed.shape[-1],
        JBLOCK=size,
        NEWEST=newest,
        FIRST=first is not None,
        BP=padded(B * G),
        **settings_of("read"),
    )
    return numbers
