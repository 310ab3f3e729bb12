# mypy: allow-untyped-defs
"""Which keys each query attends, as one bit of every pair of a query and a key, and lists of the tiles with a bit.

The bits of all pairs, T S / 8 bytes, would still grow with the square of the length: :func:`marked_chunks` makes those
of at most :data:`MARK_BYTES` at a time. A list of n tokens of a query takes 4 n bytes, its bits S / 8.

Legend: B batch, T queries, C queries of a chunk, M groups with a choice of their own (1 or G), S keys, W = ⌈S / 64⌉
words of 64 keys, n selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = tl.constexpr(64)
"""Keys of a word, and of a tile in lists."""
ROWS = tl.constexpr(128)
"""Queries of a tile in lists. Tiles of a kernel divide them."""
MARK_BYTES = 2**26
"""Largest size of the bits in memory."""


class Marks(NamedTuple):
    """Pointers."""

    words: Tensor
    """(B, C, M, W) int64, bit i of word w for the key 64 w + i."""
    by_query: Tensor
    """(B, M, ⌈C / 128⌉, W) int32: words in which a query of a tile has a bit, ascending."""
    words_of: Tensor
    """(B, M, ⌈C / 128⌉) int32: how many they are."""
    by_key: Tensor
    """(B, M, W, ⌈C / 128⌉) int32: tiles of queries that have a bit in a word, ascending."""
    tiles_of: Tensor
    """(B, M, W) int32: how many they are."""


class Chunk(NamedTuple):
    """Run-time numbers of the marks."""

    first: int
    """First query."""
    C: int
    M: int
    W: int
    tiles: int
    """⌈C / 128⌉"""


class Marked(NamedTuple):
    """Marks of a chunk of queries."""

    span: slice
    marks: Marks
    chunk: Chunk


@triton.jit
def _mark_tokens(rows, words, first, offset, T, C, M, W, COUNT: tl.constexpr, NP: tl.constexpr):
    """One program per query and group. Bits of different tokens differ, so the order of the atomic operations does not
    matter."""
    i_c, i_b, i_m = tl.program_id(0), tl.program_id(1).to(tl.int64) // M, tl.program_id(1) % M
    o_n = tl.arange(0, NP)
    b_row = tl.load(rows + ((i_b * T + first + i_c) * M + i_m) * COUNT + o_n, mask=o_n < COUNT, other=-1)
    m_row = (b_row >= 0) & (b_row <= offset + first + i_c)
    b_row = tl.where(m_row, b_row, 0)
    b_bit = tl.full((NP,), 1, tl.int64) << (b_row % KEYS).to(tl.int64)
    tl.atomic_or(words + ((i_b * C + i_c) * M + i_m) * W + b_row // KEYS, b_bit, mask=m_row, sem="relaxed")


@triton.jit
def load_words(words, i_b, i_m, o_c, m_c, word, chunk):
    """(queries,) words of 64 keys of the queries of a chunk."""
    return tl.load(words + ((i_b * chunk.C + o_c) * chunk.M + i_m) * chunk.W + word, mask=m_c, other=0)


@triton.jit
def listed_keys(list_of_words, i, BN: tl.constexpr):
    """First key of the ``i``-th tile of BN keys, at most 64, of a list of words."""
    i_word = i * BN // KEYS
    return tl.load(list_of_words + i_word) * KEYS + (i * BN - i_word * KEYS)


@triton.jit
def has_bit(b_word, o_n):
    """Whether the words have the bits of the keys: 32 of them at a time, since shifts of 64 bits take several
    instructions, and with bits that do not change from tile to tile."""
    b_half = tl.where((o_n & 32) == 0, b_word.to(tl.int32), (b_word >> 32).to(tl.int32))
    return (b_half & (tl.full(o_n.shape, 1, tl.int32) << (o_n & 31))) != 0


def _below(key: Tensor) -> Tensor:
    """Words with the bits under ``key``, which is 0 to 64."""
    return torch.where(key >= KEYS.value, -1, (1 << key.clamp_max(KEYS.value - 1)) - 1)


def visible_words(start_BT: Tensor, S: int) -> Callable[[slice], Tensor]:
    """Of the keys from the start of the query's document to its own row; queries are rows from 0."""

    def words(span: slice) -> Tensor:
        first_W = torch.arange(0, S, KEYS.value, device=start_BT.device)
        row_C = torch.arange(span.start, span.stop, device=start_BT.device)
        after_BCW = (start_BT[:, span, None] - first_W).clamp(0, KEYS.value)
        until_CW = (row_C[:, None] + 1 - first_W).clamp(0, KEYS.value)
        return (_below(until_CW) & ~_below(after_BCW))[:, :, None]

    return words


def token_words(rows_BTMn: Tensor, offset: int, S: int) -> Callable[[slice], Tensor]:
    """Of listed rows up to the query's own, -1 for none, whose first query is the row ``offset``."""
    B, T, M, n = rows_BTMn.shape

    def words(span: slice) -> Tensor:
        C, W = span.stop - span.start, triton.cdiv(S, KEYS.value)
        out = torch.zeros(B, C, M, W, dtype=torch.int64, device=rows_BTMn.device)
        _mark_tokens[(C, B * M)](
            rows_BTMn,
            out,
            span.start,
            offset,
            T,
            C,
            M,
            W,
            COUNT=n,
            NP=triton.next_power_of_2(n),
            num_warps=4,
        )
        return out

    return words


def marked_chunks(words: Callable[[slice], Tensor], T: int, bytes_per_query: int) -> Iterator[Marked]:
    """Chunks of queries with their marks.

    Args:
        words: of :func:`visible_words` or :func:`token_words`.
        T: queries.
        bytes_per_query: of the largest tensor of a chunk, which has at most :data:`MARK_BYTES`.
    """
    rows = ROWS.value
    step = max(rows, MARK_BYTES // max(1, bytes_per_query) // rows * rows)
    for first in range(0, T, step):
        span = slice(first, min(T, first + step))
        bits = words(span)
        B, C, M, W = bits.shape
        tiles = triton.cdiv(C, rows)
        has_BCMW = torch.nn.functional.pad(bits != 0, (0, 0, 0, 0, 0, tiles * rows - C))
        has_BMtW = has_BCMW.view(B, tiles, rows, M, W).any(2).transpose(1, 2)
        marks = Marks(bits, *_listed(has_BMtW), *_listed(has_BMtW.transpose(2, 3)))
        yield Marked(span, marks, Chunk(first, C, M, W, tiles))


def _listed(has: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that are set, ascending, in front of the others; and how many they are."""
    order = has.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return order.to(torch.int32).contiguous(), has.sum(-1, dtype=torch.int32)
