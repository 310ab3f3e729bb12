# mypy: allow-untyped-defs
"""Attention over selected blocks. The gradients of keys are computed block by block, from lists of the queries that
select it.

Legend: B batch, T queries, S keys, H query heads, G key–value heads, R = H / G, K and V channels of keys and values, n
blocks per query; P positions that a program of queries reads together, M = P·R rows padded to at least 16; BN a tile of
keys. For the lists: "slot" a block of rows of keys, "tile" ``REUSE`` consecutive positions, "item" a stretch of a list.
"""

from __future__ import annotations

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
    padded,
    scores,
    store_attention,
    store_rows,
)
from workbench.ops.sparse_attention.layout import SelectedBlocks

ITEMS = 2048
"""Approximate number of items into which the lists of one group are cut; one per block in addition."""


class Union(NamedTuple):
    """Blocks that any of P positions selects, see :func:`_unite`."""

    blocks: Tensor
    """(B·G, tiles, P·n) int32."""
    counts: Tensor
    """(B·G, tiles) int32: how many of them are used."""


class Tile(NamedTuple):
    """Compile-time constants of the programs of queries."""

    R: int
    P: int
    M: int
    BLOCK: int


class Lists(NamedTuple):
    """Pointers: which tiles of positions select each slot."""

    entries: Tensor
    """(B·G, capacity) int32: 256 · tile + marks, slot by slot."""
    counts: Tensor
    """(B·G, slots) entries of each slot."""
    begins: Tensor
    """(B·G, slots) first entry of each slot."""
    ends: Tensor
    """(B·G, slots) cumulative number of items."""
    sizes: Tensor
    """(B·G,) entries of an item."""


class ListSizes(NamedTuple):
    """Run-time numbers of the lists."""

    tiles: int
    slots: int
    capacity: int
    """Entries of the lists of one group."""
    items: int
    """Items of one group, at most."""


class KeyTile(NamedTuple):
    """Compile-time constants of the programs of keys."""

    R: int
    REUSE: int
    M: int
    """Rows of queries read at once, padded."""
    TILES: int
    """Entries read at once."""
    BLOCK: int


# -- queries ---------------------------------------------------------------------------------------------------------


@triton.jit
def _unite(starts, blocks, counts, T, G, n, P: tl.constexpr, NP: tl.constexpr):
    """The blocks that any of P positions selects, each once: its first row times 2^P, plus a bit for every position."""
    i_p = tl.program_id(0)
    i_b, i_g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    i_list = (i_b * G + i_g) * tl.num_programs(0) + i_p
    blocks += i_list * P * n
    o_n = tl.arange(0, NP)
    filled = 0
    for u in tl.static_range(P):
        i_t = i_p * P + u
        b_start = tl.load(starts + ((i_b * T + i_t) * G + i_g) * n + o_n, mask=o_n < tl.where(i_t < T, n, 0), other=-1)
        is_first = b_start >= 0
        b_bits = tl.where(is_first, 1 << u, 0)
        for w in tl.static_range(P):
            if w != u:
                i_t = i_p * P + w
                b_other = tl.load(
                    starts + ((i_b * T + i_t) * G + i_g) * n + o_n, mask=o_n < tl.where(i_t < T, n, 0), other=-1
                )
                b_shared = tl.max((b_start[:, None] == b_other[None, :]).to(tl.int32), axis=1)
                b_bits |= b_shared << w
                if w < u:
                    is_first = is_first & (b_shared == 0)
        o_out = filled + tl.cumsum(is_first.to(tl.int32), 0) - 1
        tl.store(blocks + o_out, (b_start << P) | b_bits, mask=is_first)
        filled += tl.sum(is_first.to(tl.int32))
    tl.store(counts + i_list, filled)


@triton.jit
def _selected_forward(x, union, o, lse, size, n, tile, channels, BN: tl.constexpr):
    i_p = tl.program_id(0)
    i_b, i_g = (tl.program_id(1) // size.G).to(tl.int64), tl.program_id(1) % size.G
    o_m = tl.arange(0, tile.M)
    o_t = i_p * tile.P + o_m // tile.R
    m_t = (o_m < tile.P * tile.R) & (o_t < size.T)
    o_query = (i_b * size.T + o_t) * size.H + i_g * tile.R + o_m % tile.R
    o_row = size.offset + o_t
    K = channels.A + channels.E
    # [M, AP], [M, EP]
    b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
    b_qE = b_qA
    if channels.EP > 0:
        b_qE = load_rows(x.q + channels.A, o_query, K, m_t, channels.E, channels.EP)
    i_list = (i_b * size.G + i_g) * tl.num_programs(0) + i_p
    blocks = union.blocks + i_list * tile.P * n
    num_keys = tl.load(union.counts + i_list) * tile.BLOCK
    k = x.k + (i_b * size.N * size.G * K + i_g * K)
    v = x.v + (i_b * size.N * size.G * channels.V + i_g * channels.V)
    b_m = tl.full((tile.M,), -float("inf"), tl.float32)
    b_l = tl.zeros((tile.M,), tl.float32)
    b_o = tl.zeros((tile.M, channels.VP), tl.float32)
    for n0 in range(0, num_keys, BN):
        # 1. scores
        o_n = n0 + tl.arange(0, BN)
        b_block = tl.load(blocks + o_n // tile.BLOCK, mask=o_n < num_keys, other=0)
        o_key = (b_block >> tile.P) + o_n % tile.BLOCK
        in_bounds = (o_n < num_keys) & (o_key < size.N)
        # [BN, AP]
        b_kA = load_rows(k, o_key.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [M, BN]
        b_s, _ = scores(b_qA, b_qE, b_kA, k, o_key.to(tl.int64), size.G * K, in_bounds, channels)
        selected = ((b_block[None, :] >> (o_m // tile.R)[:, None]) & 1) == 1
        mask = m_t[:, None] & selected & (o_key[None, :] <= o_row[:, None])
        b_s = tl.where(mask, b_s * (size.scale * LOG2E), -float("inf"))
        # 2. weighted values
        b_p, b_m, b_l, b_rescale = online_softmax_step(b_s, b_m, b_l)
        # [BN, VP]
        b_v = load_values(v, b_kA, o_key.to(tl.int64), size.G * channels.V, in_bounds, channels)
        b_o = b_o * b_rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=channels.PRECISION)
    store_attention(o, lse, o_query, m_t, b_o, b_m, b_l, channels.V, channels.VP)


@triton.jit
def _selected_queries(x, union, upstream, dq, size, n, tile, channels, BN: tl.constexpr):
    """Gradient of the queries of P positions."""
    i_p = tl.program_id(0)
    i_b, i_g = (tl.program_id(1) // size.G).to(tl.int64), tl.program_id(1) % size.G
    o_m = tl.arange(0, tile.M)
    o_t = i_p * tile.P + o_m // tile.R
    m_t = (o_m < tile.P * tile.R) & (o_t < size.T)
    o_query = (i_b * size.T + o_t) * size.H + i_g * tile.R + o_m % tile.R
    o_row = size.offset + o_t
    K = channels.A + channels.E
    # [M, AP], [M, EP]
    b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
    b_dqA = tl.zeros((tile.M, channels.AP), tl.float32)
    b_qE, b_dqE = b_qA, b_dqA
    if channels.EP > 0:
        b_qE = load_rows(x.q + channels.A, o_query, K, m_t, channels.E, channels.EP)
        b_dqE = tl.zeros((tile.M, channels.EP), tl.float32)
    # [M, VP]
    b_do = load_rows(upstream.do, o_query, channels.V, m_t, channels.V, channels.VP)
    b_lse = load_lse(upstream.lse, o_query, m_t)
    b_delta = tl.load(upstream.delta + o_query, mask=m_t, other=0.0)
    i_list = (i_b * size.G + i_g) * tl.num_programs(0) + i_p
    blocks = union.blocks + i_list * tile.P * n
    num_keys = tl.load(union.counts + i_list) * tile.BLOCK
    k = x.k + (i_b * size.N * size.G * K + i_g * K)
    v = x.v + (i_b * size.N * size.G * channels.V + i_g * channels.V)
    for n0 in range(0, num_keys, BN):
        # 1. probabilities
        o_n = n0 + tl.arange(0, BN)
        b_block = tl.load(blocks + o_n // tile.BLOCK, mask=o_n < num_keys, other=0)
        o_key = (b_block >> tile.P) + o_n % tile.BLOCK
        in_bounds = (o_n < num_keys) & (o_key < size.N)
        # [BN, AP]
        b_kA = load_rows(k, o_key.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        # [M, BN]
        b_s, b_kE = scores(b_qA, b_qE, b_kA, k, o_key.to(tl.int64), size.G * K, in_bounds, channels)
        selected = ((b_block[None, :] >> (o_m // tile.R)[:, None]) & 1) == 1
        mask = m_t[:, None] & selected & (o_key[None, :] <= o_row[:, None])
        b_p = tl.where(mask, tl.exp2((b_s * size.scale - b_lse[:, None]) * LOG2E), 0.0)
        # 2. gradient of the scores
        # [BN, VP]
        b_v = load_values(v, b_kA, o_key.to(tl.int64), size.G * channels.V, in_bounds, channels)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=channels.PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_kA.dtype)
        # 3. gradient of the queries
        b_dqA += tl.dot(b_ds, b_kA, input_precision=channels.PRECISION)
        if channels.EP > 0:
            b_dqE += tl.dot(b_ds, b_kE, input_precision=channels.PRECISION)
    store_rows(dq, o_query, K, m_t, b_dqA * size.scale, channels.A, channels.AP)
    if channels.EP > 0:
        store_rows(dq + channels.A, o_query, K, m_t, b_dqE * size.scale, channels.E, channels.EP)


# -- lists of the queries that select a block ------------------------------------------------------------------------


@triton.jit
def _group_query(i_tile, u, start, T, offset, REUSE: tl.constexpr):
    """Row of the query that selects for position ``u`` of a tile, and whether the position is the first of the tile to
    reuse it."""
    i_t = i_tile * REUSE + u
    in_bounds = i_t < T
    row = offset + i_t
    query_row = row - (row - tl.load(start + i_t, mask=in_bounds, other=0)) % REUSE
    return query_row, in_bounds & ((i_t == i_tile * REUSE) | (query_row == row))


@triton.jit
def _mark(
    starts, start, marks, T, tiles, slots, G, n, offset, REUSE: tl.constexpr, BLOCK: tl.constexpr, NP: tl.constexpr
):
    """marks[slot, tile]: bit u is set if position u of the tile selects the block that starts in the slot; bit 4 + u if
    it selects the one that starts in the slot before and extends into this one. A tile is written by one program
    only."""
    i_tile = tl.program_id(0)
    i_b, i_g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    marks += (i_b * G + i_g) * slots * tiles + i_tile
    o_n = tl.arange(0, NP)
    for u in range(REUSE):
        # 1. the positions with the same selection
        query_row, is_first = _group_query(i_tile, u, start + i_b * T, T, offset, REUSE)
        bits = 0
        for w in range(REUSE):
            other_row, _ = _group_query(i_tile, w, start + i_b * T, T, offset, REUSE)
            bits |= tl.where((other_row == query_row) & (i_tile * REUSE + w < T), 1 << w, 0)
        # 2. the slots in which its blocks start
        p_start = starts + ((i_b * T + i_tile * REUSE + u) * G + i_g) * n + o_n
        b_start = tl.load(p_start, mask=o_n < tl.where(is_first, n, 0), other=-1)
        mask = b_start >= 0
        b_slot = (tl.where(mask, b_start, 0) // BLOCK).to(tl.int64)
        b_mark = tl.load(marks + b_slot * tiles, mask=mask, other=0)
        tl.debug_barrier()
        tl.store(marks + b_slot * tiles, (b_mark | bits).to(tl.uint8), mask=mask)
        tl.debug_barrier()
        # 3. the slots into which they extend
        m_next = mask & (b_start % BLOCK != 0) & (b_slot + 1 < slots)
        b_mark = tl.load(marks + (b_slot + 1) * tiles, mask=m_next, other=0)
        tl.debug_barrier()
        tl.store(marks + (b_slot + 1) * tiles, (b_mark | (bits << 4)).to(tl.uint8), mask=m_next)
        tl.debug_barrier()


@triton.jit
def _list(
    marks,
    counts,
    begins,
    entries,
    size,
    offset,
    COUNT: tl.constexpr,
    REUSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
):
    """Counts the tiles that are marked for a slot (COUNT), or lists them with their marks, as 256 · tile + mark."""
    i_slot, i_group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    marks += (i_group * size.slots + i_slot) * size.tiles
    filled = 0
    begin = 0
    if not COUNT:
        begin = tl.load(begins + i_group * size.slots + i_slot)
    # no earlier tile sees the slot
    for first in range(tl.maximum(0, i_slot * BLOCK - offset) // REUSE // BM * BM, size.tiles, BM):
        o_tile = first + tl.arange(0, BM)
        b_mark = tl.load(marks + o_tile, mask=o_tile < size.tiles, other=0).to(tl.int32)
        is_marked = (b_mark != 0).to(tl.int32)
        if not COUNT:
            o_out = begin + filled + tl.cumsum(is_marked, 0) - 1
            tl.store(entries + i_group * size.capacity + o_out, o_tile * 256 + b_mark, mask=is_marked > 0)
        filled += tl.sum(is_marked)
    if COUNT:
        tl.store(counts + i_group * size.slots + i_slot, filled)


# -- keys and values -------------------------------------------------------------------------------------------------


@triton.jit
def _slot_of_item(ends, item, slots, STEPS: tl.constexpr):
    """The slot to which an item belongs, by bisection."""
    slot = 0
    for step in range(STEPS):
        reach = 1 << (STEPS - 1 - step)
        in_bounds = slot + reach <= slots
        slot = tl.where(
            in_bounds & (tl.load(ends + slot + reach - 1, mask=in_bounds, other=0) <= item), slot + reach, slot
        )
    return slot


@triton.jit
def _selected_keys(x, upstream, lists, dk, dv, size, list_size, tile, channels, BN: tl.constexpr, STEPS: tl.constexpr):
    """Partial gradients (group, item, sub-block, BN, …) of the keys of one slot from one item of its list."""
    item, i_sub = tl.program_id(0), tl.program_id(2)
    i_group = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_group // size.G, (i_group % size.G).to(tl.int32)
    ends = lists.ends + i_group * list_size.slots
    if item < tl.load(ends + list_size.slots - 1):
        # 1. the slot of this item, and its stretch of the list
        slot = _slot_of_item(ends, item, list_size.slots, STEPS)
        items_before = tl.load(ends + slot - 1, mask=slot > 0, other=0)
        item_size = tl.load(lists.sizes + i_group)
        count = tl.load(lists.counts + i_group * list_size.slots + slot)
        first = (item - items_before) * item_size
        end = tl.minimum(count, first + item_size)
        entries = lists.entries + (
            i_group * list_size.capacity + tl.load(lists.begins + i_group * list_size.slots + slot)
        )
        # 2. its keys
        K = channels.A + channels.E
        o_x = tl.arange(0, BN)
        o_in_slot = i_sub * BN + o_x
        o_key = slot * tile.BLOCK + o_in_slot
        in_bounds = (o_in_slot < tile.BLOCK) & (o_key < size.N)
        k = x.k + (i_b * size.N * size.G * K + i_g * K)
        v = x.v + (i_b * size.N * size.G * channels.V + i_g * channels.V)
        # [BN, AP], [BN, EP]
        b_kA = load_rows(k, o_key.to(tl.int64), size.G * K, in_bounds, channels.A, channels.AP)
        b_dkA = tl.zeros((BN, channels.AP), tl.float32)
        b_kE, b_dkE = b_kA, b_dkA
        if channels.EP > 0:
            b_kE = load_rows(k + channels.A, o_key.to(tl.int64), size.G * K, in_bounds, channels.E, channels.EP)
            b_dkE = tl.zeros((BN, channels.EP), tl.float32)
        # [BN, VP]
        b_v, b_dv = b_kA, b_dkA
        if channels.SEPARATE_VALUES:
            b_v = load_rows(v, o_key.to(tl.int64), size.G * channels.V, in_bounds, channels.V, channels.VP)
            b_dv = tl.zeros((BN, channels.VP), tl.float32)
        o_m = tl.arange(0, tile.M)
        o_u = o_m % (tile.REUSE * tile.R) // tile.R
        for e0 in range(first, end, tile.TILES):
            # 3. the queries of the next entries, and which of them selected which key
            o_entry = e0 + o_m // (tile.REUSE * tile.R)
            m_t = (o_m < tile.TILES * tile.REUSE * tile.R) & (o_entry < end)
            b_entry = tl.load(entries + o_entry, mask=m_t, other=0)
            o_t = b_entry // 256 * tile.REUSE + o_u
            m_t = m_t & (o_t < size.T)
            o_query = (i_b * size.T + o_t) * size.H + i_g * tile.R + o_m % tile.R
            o_row = size.offset + o_t
            b_start = tl.load(x.start + i_b * size.T + o_t, mask=m_t, other=0)
            # keys before the border of the query's blocks belong to the block that starts in the slot before
            b_border = slot * tile.BLOCK + b_start % tile.BLOCK
            selects_this = m_t & ((b_entry >> o_u) % 2 == 1)
            selects_previous = m_t & ((b_entry >> (4 + o_u)) % 2 == 1)
            in_this = o_key[:, None] >= b_border[None, :]
            mask = (
                tl.where(in_this, selects_this[None, :], selects_previous[None, :])
                & (o_key[:, None] <= o_row[None, :])
                & in_bounds[:, None]
            )
            # 4. probabilities
            # [M, AP], [M, VP]
            b_qA = load_rows(x.q, o_query, K, m_t, channels.A, channels.AP)
            b_do = load_rows(upstream.do, o_query, channels.V, m_t, channels.V, channels.VP)
            b_lse = load_lse(upstream.lse, o_query, m_t)
            b_delta = tl.load(upstream.delta + o_query, mask=m_t, other=0.0)
            # [BN, M]
            b_s, b_qE = scores(b_kA, b_kE, b_qA, x.q, o_query, K, m_t, channels)
            b_p = tl.where(mask, tl.exp2((b_s * size.scale - b_lse[None, :]) * LOG2E), 0.0)
            # 5. gradients of scores, values and keys
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=channels.PRECISION)
            b_ds = (b_p * (b_dp - b_delta[None, :]) * size.scale).to(b_qA.dtype)
            if channels.SEPARATE_VALUES:
                b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
            else:
                b_dkA += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=channels.PRECISION)
            b_dkA += tl.dot(b_ds, b_qA, input_precision=channels.PRECISION)
            if channels.EP > 0:
                b_dkE += tl.dot(b_ds, b_qE, input_precision=channels.PRECISION)
        o_part = ((i_group * list_size.items + item) * tl.num_programs(2) + i_sub) * BN + o_x
        m_part = o_x < BN
        store_rows(dk, o_part, K, m_part, b_dkA, channels.A, channels.AP)
        if channels.EP > 0:
            store_rows(dk + channels.A, o_part, K, m_part, b_dkE, channels.E, channels.EP)
        if channels.SEPARATE_VALUES:
            store_rows(dv, o_part, channels.V, m_part, b_dv, channels.V, channels.VP)


@triton.jit
def _sum_items(
    parts, ends, out, S, G, list_size, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr
):
    """Sum of the partial gradients of a slot, in order, as rows of (B, S, G, D)."""
    slot, i_sub = tl.program_id(0), tl.program_id(2)
    i_group = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_group // G, i_group % G
    ends += i_group * list_size.slots
    first, end = tl.load(ends + slot - 1, mask=slot > 0, other=0), tl.load(ends + slot)
    o_x = tl.arange(0, BN)
    # [BN, DP]
    b_sum = tl.zeros((BN, DP), tl.float32)
    for item in range(first, end):
        o_part = ((i_group * list_size.items + item) * tl.num_programs(2) + i_sub) * BN + o_x
        b_sum += load_rows(parts, o_part, D, o_x < BN, D, DP)
    o_key = slot * BLOCK + i_sub * BN + o_x
    mask = (i_sub * BN + o_x < BLOCK) & (o_key < S)
    store_rows(out + i_b * S * G * D + i_g * D, o_key.to(tl.int64), G * D, mask, b_sum, D, DP)


# -- launches --------------------------------------------------------------------------------------------------------


def _listed_reuse(reuse: int) -> int:
    """Positions of an entry of the lists: those that share a selection where their marks fit into four bits, else
    one."""
    return reuse if reuse in (1, 2, 4) else 1


def _positions(reuse: int, R: int) -> int:
    """Positions P of a program of queries: those that share a selection, or as many as fill 16 rows."""
    return max(_listed_reuse(reuse), min(8, 1 << max(0, (16 // R).bit_length() - 1)))


def query_rows(reuse: int, R: int) -> int:
    """Rows of queries of a tile of "selected_forward" and "selected_queries"."""
    return padded(_positions(reuse, R) * R)


class _Launch:
    """Arguments that the kernels of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None, start_BT: Tensor, V: int, blocks: SelectedBlocks):
        (self.B, T, H, _), (S, G) = q.shape, k.shape[1:3]
        self.blocks, self.channels, self.R = blocks, Channels.of(q, v, V), H // G
        self.inputs = Inputs(q, k, k if v is None else v, start_BT)
        self.size = Sizes(T, S, H, G, blocks.offset, blocks.scale)

    def unite(self, starts: Tensor) -> Union:
        """The blocks of every P positions."""
        (B, T, G, n), P = starts.shape, _positions(self.blocks.reuse, self.R)
        tiles, NP = triton.cdiv(T, P), triton.next_power_of_2(n)
        blocks = torch.empty(B * G, tiles, P * n, dtype=torch.int32, device=starts.device)
        counts = torch.empty(B * G, tiles, dtype=torch.int32, device=starts.device)
        _unite[(tiles, B * G)](starts, blocks, counts, T, G, n, P=P, NP=NP, num_warps=1 if NP <= 32 else 4)
        return Union(blocks, counts)

    def by_query(self, kernel: Any, name: str, starts: Tensor, *arguments: Any) -> None:
        """Launches a program per P positions and group."""
        P, M, n = _positions(self.blocks.reuse, self.R), query_rows(self.blocks.reuse, self.R), starts.shape[-1]
        tile = constants(Tile(self.R, P, M, self.blocks.block))
        settings = launch_settings(name, self.channels, M)
        kernel[(triton.cdiv(self.size.T, P), self.B * self.size.G)](
            self.inputs, self.unite(starts), *arguments, self.size, n, tile, constants(self.channels), **settings
        )

    def list_queries(self, starts: Tensor) -> tuple[Lists, ListSizes]:
        """Which tiles of positions select each slot, and how the lists are cut into items."""
        T, G, n, device = self.size.T, self.size.G, starts.shape[-1], starts.device
        block, offset, reuse, groups = (
            self.blocks.block,
            self.blocks.offset,
            _listed_reuse(self.blocks.reuse),
            self.B * G,
        )
        tiles, slots, NP = triton.cdiv(T, reuse), triton.cdiv(self.size.N, block), triton.next_power_of_2(n)
        marks = torch.zeros(groups, slots, tiles, dtype=torch.uint8, device=device)
        _mark[(tiles, groups)](
            starts,
            self.inputs.start,
            marks,
            T,
            tiles,
            slots,
            G,
            n,
            offset,
            REUSE=reuse,
            BLOCK=block,
            NP=NP,
            num_warps=1,
        )
        counts = torch.empty(groups, slots, dtype=torch.int32, device=device)
        capacity = min(slots * tiles, 2 * T * n)
        size = ListSizes(tiles, slots, capacity, min(ITEMS, capacity // 64 + 1) + slots)
        entries = torch.empty(groups, capacity, dtype=torch.int32, device=device)
        options: dict[str, Any] = {"REUSE": reuse, "BLOCK": block, "BM": min(4096, padded(tiles)), "num_warps": 4}
        _list[(slots, groups)](marks, counts, counts, entries, size, offset, COUNT=True, **options)
        total = counts.cumsum(1, dtype=torch.int32)
        begins = (total - counts).contiguous()
        _list[(slots, groups)](marks, counts, begins, entries, size, offset, COUNT=False, **options)
        item_sizes = (total[:, -1] // ITEMS + 1).clamp_min(64)
        ends = ((counts + item_sizes[:, None] - 1) // item_sizes[:, None]).cumsum(1, dtype=torch.int32)
        return Lists(entries, counts, begins, ends, item_sizes), size


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, start_BT: Tensor, V: int, blocks: SelectedBlocks
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and log-sum-exp (B, T, H); without ``v`` the values are the first V channels of the keys."""
    B, T, H, _ = q.shape
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    _Launch(q, k, v, start_BT, V, blocks).by_query(_selected_forward, "selected_forward", starts, o, lse)
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
    (K, S, G), device = (q.shape[-1], *k.shape[1:3]), q.device
    launch = _Launch(q, k, v, start_BT, V, blocks)
    upstream = Upstream(do, lse, output_products(do, o, dlse))
    dq = torch.empty_like(q)
    launch.by_query(_selected_queries, "selected_queries", starts, upstream, dq)

    lists, size = launch.list_queries(starts)
    groups, reuse = launch.B * G, _listed_reuse(blocks.reuse)
    BN = min(64, padded(blocks.block))
    subs = triton.cdiv(blocks.block, BN)
    settings = launch_settings("selected_keys", launch.channels, BN)
    tiles = max(1, settings.pop("ROWS") // (reuse * launch.R))
    rows = padded(tiles * reuse * launch.R)
    tile = KeyTile(launch.R, reuse, rows, tiles, blocks.block)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    dk_parts = torch.empty(groups, size.items, subs * BN, K, **options)
    dv_parts = dk_parts if v is None else torch.empty(groups, size.items, subs * BN, V, **options)
    shared = (launch.size, size, constants(tile), constants(launch.channels))
    _selected_keys[(size.items, groups, subs)](
        launch.inputs, upstream, lists, dk_parts, dv_parts, *shared, BN=BN, STEPS=size.slots.bit_length(), **settings
    )

    def sum_items(parts: Tensor, like: Tensor) -> Tensor:
        total, D = torch.empty_like(like), like.shape[-1]
        _sum_items[(size.slots, groups, subs)](
            parts, lists.ends, total, S, G, size, D=D, DP=padded(D), BLOCK=blocks.block, BN=BN, num_warps=4
        )
        return total

    dk = sum_items(dk_parts, k)
    return dq, dk, k.new_empty(0) if v is None else sum_items(dv_parts, v)
