# mypy: allow-untyped-defs
"""Kernels that read and write memory of the host through its device address. Legend as in the package.

Rows are copied as words of 32 bits. One program copies a part of one block, or the rows of a few tokens; programs of
entries without a copy return at once. One program plans the copies of one group of heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.block_transfer.layout import TAILS, Tables
from workbench.ops.sparse_decoding.kernels.choice import choose_best

WORDS = 2048
"""Words that one program copies: 8 KB, so that a handful of blocks keeps enough bytes on the way."""
TOKENS = 8
"""Tokens whose rows one program writes."""


@triton.jit
def _fetch(host, hot, blocks, slots, m, N: tl.constexpr, S: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + entry)
    if block >= 0:
        slot = tl.load(slots + entry)
        group = entry // m
        word = tl.program_id(1) * W + tl.arange(0, W)
        inside = word < E
        copied = tl.load(host + (group * N + block) * E + word, mask=inside)
        tl.store(hot + (group * S + slot) * E + word, copied, mask=inside)


@triton.jit
def _store(
    rows,
    host,
    start,
    lengths,
    T,
    G: tl.constexpr,
    N: tl.constexpr,
    b: tl.constexpr,
    X: tl.constexpr,
    X_2: tl.constexpr,
    TOKENS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    position = tl.load(start + sequence) + token
    exists = (token < T) & (position < tl.load(lengths + sequence))
    word = tl.arange(0, X_2)
    mask = exists[:, None] & (word < X)[None, :]
    source = ((sequence * T + token) * G + group) * X
    # blocks of a group follow one another, and tokens of a block: a position is an offset of rows
    target = (sequence * G + group) * (N * b * X) + position * X
    moved = tl.load(rows + source[:, None] + word[None, :], mask=mask)
    tl.store(host + target[:, None] + word[None, :], moved, mask=mask)


@triton.jit
def _store_tails(
    rows,
    hot,
    start,
    T,
    G: tl.constexpr,
    S: tl.constexpr,
    b: tl.constexpr,
    X: tl.constexpr,
    X_2: tl.constexpr,
    TOKENS: tl.constexpr,
    TAILS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    first = tl.load(start + sequence)
    kept = tl.minimum(T, TAILS * b)
    token = T - kept + tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    position = first + token
    exists = (token < T) & (position // b > (first + T - 1) // b - TAILS)
    word = tl.arange(0, X_2)
    mask = exists[:, None] & (word < X)[None, :]
    source = ((sequence * T + token) * G + group) * X
    # the slots of the newest blocks are a ring of TAILS · b rows
    row = (S - TAILS) * b + position % (TAILS * b)
    target = (sequence * G + group) * (S * b * X) + row * X
    moved = tl.load(rows + source[:, None] + word[None, :], mask=mask)
    tl.store(hot + target[:, None] + word[None, :], moved, mask=mask)


@triton.jit
def _plan(
    slot_of,
    block_of,
    wanted_at,
    clock,
    wanted,
    newest,
    copied,
    slots,
    counts,
    m,
    programs,
    N: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    KEEP: tl.constexpr,
    REUSE: tl.constexpr,
    TAILS: tl.constexpr,
    M_2: tl.constexpr,
    S_2: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    slot_of += i * (N + 1)
    block_of += i * (S + 1)
    wanted_at += i * (S + 1)
    slots += i * m
    now = tl.load(clock + i) + 1
    o_m, o_s = tl.arange(0, M_2), tl.arange(0, S_2)
    b_wanted = tl.load(wanted + i * m + o_m, mask=o_m < m, other=-1)
    m_valid = (b_wanted >= 0) & (b_wanted <= tl.load(newest + i // G) - TAILS)
    b_slot = tl.load(slot_of + b_wanted, mask=m_valid & REUSE, other=-1)
    m_hit = b_slot >= 0
    m_missing = m_valid & (m_hit == 0)
    missing = tl.sum(m_missing.to(tl.int32), axis=0)
    # a slot is kept where its block is wanted now; barriers: other threads read what is written
    tl.store(wanted_at + b_slot, now, mask=m_hit)
    tl.debug_barrier()
    b_at = tl.load(wanted_at + o_s, mask=o_s < S, other=-1)
    b_block = tl.load(block_of + o_s, mask=o_s < S, other=-1)
    m_kept = (b_at == now) & (b_block >= 0)
    if not KEEP:
        tl.store(slot_of + b_block, tl.full((S_2,), -1, tl.int64), mask=(b_block >= 0) & (m_kept == 0))
        b_block = tl.where(m_kept, b_block, -1)
        tl.store(block_of + o_s, b_block, mask=o_s < S)
    # empty slots first, then the least recently wanted
    b_age = tl.where(b_block >= 0, b_at, -1)
    m_free = (o_s < S) & (m_kept == 0)
    m_taken, b_rank, _ = choose_best(-b_age.to(tl.float32), m_free, o_s < 0, missing)
    tl.store(slot_of + b_block, tl.full((S_2,), -1, tl.int64), mask=m_taken & (b_block >= 0))
    # from slots to entries through memory
    tl.store(slots + b_rank, o_s.to(tl.int64), mask=m_taken)
    tl.debug_barrier()
    b_target = tl.load(slots + tl.cumsum(m_missing.to(tl.int32), axis=0) - 1, mask=m_missing, other=S)
    tl.debug_barrier()
    tl.store(slots + o_m, b_target, mask=o_m < m)
    tl.store(copied + i * m + o_m, tl.where(m_missing, b_wanted, -1), mask=o_m < m)
    tl.store(slot_of + b_wanted, b_target, mask=m_missing)
    tl.store(block_of + b_target, b_wanted, mask=m_missing)
    tl.store(wanted_at + b_target, now, mask=m_missing)
    tl.store(clock + i, now)
    tl.store(counts + i, tl.sum((b_wanted >= 0).to(tl.int64), axis=0))
    tl.store(counts + programs + i, missing.to(tl.int64))


@triton.jit
def _slots(
    slot_of, newest, out, N: tl.constexpr, S: tl.constexpr, G: tl.constexpr, TAILS: tl.constexpr, W: tl.constexpr
):
    i = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * W + tl.arange(0, W)
    last = tl.load(newest + i // G)
    b_slot = tl.load(slot_of + i * (N + 1) + o_n, mask=o_n < N, other=-1)
    b_slot = tl.where((o_n > last - TAILS) & (o_n <= last), S + o_n % TAILS, b_slot)
    tl.store(out + i * N + o_n, b_slot, mask=o_n < N)


def fetch_blocks(host_BGNbX: Tensor, hot_BGSbX: Tensor, blocks_BGm: Tensor, slots_BGm: Tensor) -> None:
    B, G, m = blocks_BGm.shape
    N, S = host_BGNbX.shape[2], hot_BGSbX.shape[2]
    host, hot = _words(host_BGNbX), _words(hot_BGSbX)
    E = host.shape[-2] * host.shape[-1]
    grid = (B * G * m, triton.cdiv(E, WORDS))
    _fetch[grid](host, hot, blocks_BGm.contiguous(), slots_BGm.contiguous(), m, N, S, E, min(WORDS, _power(E)))


def store_rows(rows_BTGX: Tensor, host_BGNbX: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
    B, T, G, _ = rows_BTGX.shape
    rows, host = _words(rows_BTGX.to(host_BGNbX.dtype).contiguous()), _words(host_BGNbX)
    N, b, X = host.shape[2:]
    tokens = min(TOKENS, _power(T))
    _store[(B, G, triton.cdiv(T, tokens))](rows, host, start_B, lengths_B, T, G, N, b, X, _power(X), tokens)


def store_tails(rows_BTGX: Tensor, hot_BGSbX: Tensor, start_B: Tensor) -> None:
    B, T, G, _ = rows_BTGX.shape
    rows, hot = _words(rows_BTGX.to(hot_BGSbX.dtype).contiguous()), _words(hot_BGSbX)
    S, b, X = hot.shape[2:]
    kept = min(T, TAILS * b)
    tokens = min(TOKENS, _power(kept))
    _store_tails[(B, G, triton.cdiv(kept, tokens))](rows, hot, start_B, T, G, S, b, X, _power(X), tokens, TAILS)


def plan_copies(
    tables: Tables, wanted_BGm: Tensor, newest_B: Tensor, keep: bool, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, G, m = wanted_BGm.shape
    N, S = tables.slot_of_BGN.shape[-1] - 1, tables.block_of_BGS.shape[-1] - 1
    wanted_BGm = wanted_BGm.contiguous()
    copied_BGm, slots_BGm = torch.empty_like(wanted_BGm), torch.empty_like(wanted_BGm)
    counts_2BG = wanted_BGm.new_empty(2, B, G)
    _plan[(B * G,)](
        *tables,
        wanted_BGm,
        newest_B,
        copied_BGm,
        slots_BGm,
        counts_2BG,
        m,
        B * G,
        N,
        S,
        G,
        keep,
        reuse,
        TAILS,
        _power(m),
        _power(S),
    )
    return copied_BGm, slots_BGm, counts_2BG


def slots_of_blocks(tables: Tables, newest_B: Tensor) -> Tensor:
    B, G, N = tables.slot_of_BGN.shape[0], tables.slot_of_BGN.shape[1], tables.slot_of_BGN.shape[2] - 1
    out_BGN = tables.slot_of_BGN.new_empty(B, G, N)
    S, W = tables.block_of_BGS.shape[-1] - 1, min(1024, _power(N))
    _slots[(triton.cdiv(N, W), B * G)](tables.slot_of_BGN, newest_B, out_BGN, N, S, G, TAILS, W)
    return out_BGN


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)
