# mypy: allow-untyped-defs
"""The choice of the best units by their scores.

It finds the score of the last element that still belongs to it by bisection over the bits of its floating-point number,
in one program, and writes positions in ascending order; of equal scores the first positions are taken. More elements
than one program holds are chosen from in rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.common import TILE, entry, newest_is_unlisted, padded, settings_of
from workbench.ops.sparse_decoding.layout import Forced

LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def choose_best(b_score, m_valid, m_forced, want):
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
def choose_blocks(
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
    m_chosen, b_slot, total = choose_best(b_score, m_valid, m_forced, COUNT)
    tl.store(chosen + b_slot, o_n.to(tl.int64), mask=m_chosen)
    _store_none(chosen, total, COUNT)


@triton.jit
def choose_tokens(
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
        b_block = entry(listed, first_listed, o_n // BLOCK, J, FIRST)
        b_token = b_block * BLOCK + o_n % BLOCK
        m_valid = (b_block >= 0) & (b_token < length)
    m_forced = (b_token < SINK) | (b_token >= length - LOCAL)
    want = COUNT
    if NEWEST:  # it is kept whatever its weight, and is the last of all
        unlisted = newest_is_unlisted(listed, first_listed, length, J, BLOCK, FIRST)
        want = COUNT - unlisted.to(tl.int32)
    b_weight = tl.load(weights + o_n, mask=m_valid, other=0.0, cache_modifier=".cg")
    m_chosen, b_slot, total = choose_best(b_weight, m_valid, m_forced, want)
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
    m_chosen, b_slot, total = choose_best(b_score, m_valid, m_forced, COUNT)
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
