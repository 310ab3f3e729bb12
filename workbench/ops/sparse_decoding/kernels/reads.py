# mypy: allow-untyped-defs
"""What a step read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.common import ends_last, entry, padded, settings_of
from workbench.ops.sparse_decoding.layout import IndexReads


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
        b_block = entry(listed + i_bg * J, first_listed + i_bg * J, tl.arange(0, triton.next_power_of_2(J)), J, FIRST)
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
    if ends_last(tickets, tl.num_programs(0)):
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
