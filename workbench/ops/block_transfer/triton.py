# mypy: allow-untyped-defs
"""Kernels that read and write memory of the host through its device address. Legend as in the package.

Rows are copied as words of 32 bits. One program copies a part of one block, or the rows of a few tokens; programs of
entries without a copy return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)
