"""Compares the kernels of sparse decoding with plain forms in fp64: in Triton's interpreter on the CPU, or on a GPU.

    python tests/ops/sparse_decoding_kernels.py SEED [DEVICE [PART DTYPE]]

Several parts in one process are separated by commas.

A script of tests/ops/test_sparse_decoding_kernels.py, since TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.ops.dispatch import force_backend
from workbench.ops.sparse_decoding import (
    Forced,
    IndexReads,
    Pool,
    Searched,
    TokenKeys,
    best_blocks,
    channel_tokens,
    extend_codes,
    extend_means,
    extend_minmax,
    gathered_attention,
    indexer_blocks,
    indexer_tokens,
    mean_blocks,
    minmax_blocks,
    new_tickets,
    quantised,
    read_numbers,
    tokens_of,
)
from workbench.ops.sparse_decoding import torch as by_torch

DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"


class Shape(NamedTuple):
    """Sequences, capacity in tokens, query heads, groups, channels, block."""

    B: int
    S: int
    H: int
    G: int
    K: int
    block: int


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def lengths_of(shape: Shape) -> Tensor:
    """Different lengths; the last is the capacity."""
    lengths_B = torch.randint(1, shape.S + 1, (shape.B,))
    lengths_B[-1] = shape.S
    return lengths_B.to(DEVICE)


def poison(x: Tensor, lengths_B: Tensor, unit: int, dim: int) -> Tensor:
    """NaN behind the units that have tokens, as unused memory may hold."""
    last = (lengths_B + unit - 1) // unit
    is_unused = torch.arange(x.shape[dim], device=DEVICE) >= last[:, None]
    view = [len(x), *(1 for _ in x.shape[1:])]
    view[dim] = x.shape[dim]
    value = 255 if x.dtype == torch.uint8 else torch.nan
    return x.masked_fill(is_unused.view(view), value)


def check_choice(
    chosen: Tensor,
    scores: Tensor,
    positions: Tensor,
    forced: Tensor,
    lengths_B: Tensor,
    count: int,
    tolerance: float,
    case: object,
) -> None:
    """``chosen`` are the ``count`` best of ``positions``: forced ones, then by fp64 ``scores``, up to rounding."""
    for b in range(chosen.shape[0]):
        for g in range(chosen.shape[1]):
            row, kept = chosen[b, g].tolist(), [n for n in chosen[b, g].tolist() if n >= 0]
            assert kept == sorted(set(kept)) and row == kept + [-1] * (len(row) - len(kept)), (case, "order", row)
            at = {int(p): i for i, p in enumerate(positions[b, g].tolist()) if p >= 0}
            assert set(kept) <= set(at), (case, "not a candidate", set(kept) - set(at))
            assert len(kept) == min(count, len(at)), (case, "how many", len(kept), len(at))
            must = [p for p, i in at.items() if forced[b, g, i]]
            assert set(must) <= set(kept) or len(must) > count, (case, "forced", must, kept)
            rest = [float(scores[b, g, i]) for p, i in at.items() if p not in kept]
            free = [float(scores[b, g, at[p]]) for p in kept if p not in must]
            if rest and free:
                assert min(free) >= max(rest) - tolerance * abs(max(rest)), (case, min(free), max(rest))


def check_blocks(
    shape: Shape, *, index: str, sub_block: int, count: int, forced: Forced, dtype: torch.dtype, tolerance: float
) -> None:
    B, S, H, G, K, block = shape
    lengths_B, scale, N = lengths_of(shape), K**-0.5, -(-S // block)
    q = random(B, H, K, dtype=dtype)
    tickets = new_tickets(B, H, DEVICE)
    case = ("blocks", shape, index, count, forced, dtype)
    if index == "indexer":
        per, weights = block // sub_block, random(B, H, dtype=dtype)
        means = random(B, G, N * per, K, dtype=dtype)
        rows = by_torch.indexer_scores(q.double(), weights, means.double())
        exists = torch.arange(N * per, device=DEVICE) * sub_block < lengths_B[:, None, None]
        scores = (rows * exists).unflatten(-1, (N, per)).sum(-1)
        means = poison(means, lengths_B, sub_block, 2)
        options: dict[str, Any] = {"block": block, "sub_block": sub_block, "count": count, "forced": forced}
        calls = [indexer_blocks(q, weights, means, lengths_B, tickets=t, **options) for t in (tickets, None)]
    elif index == "mean":
        per = block // sub_block
        means = random(B, G, N * per, K, dtype=dtype)
        counts_BN = (lengths_B[:, None] - torch.arange(N * per, device=DEVICE) * sub_block).clamp(0, sub_block)
        masses = by_torch.mean_scores(q.double(), means.double(), counts_BN, scale)
        scores = masses.unflatten(-1, (N, per)).sum(-1)
        means = poison(means, lengths_B, sub_block, 2)
        options = {"block": block, "sub_block": sub_block, "scale": scale, "count": count}
        calls = [mean_blocks(q, means, lengths_B, forced=forced, tickets=t, **options) for t in (tickets, None)]
    else:
        upper, lower = random(B, G, N, K, dtype=dtype), random(B, G, N, K, dtype=dtype)
        scores = by_torch.minmax_scores(q.double(), upper.double(), lower.double())
        upper, lower = poison(upper, lengths_B, block, 2), poison(lower, lengths_B, block, 2)
        options = {"block": block, "count": count, "forced": forced}
        calls = [minmax_blocks(q, upper, lower, lengths_B, tickets=t, **options) for t in (tickets, None)]
    assert tickets.eq(0).all(), case
    assert torch.equal(*calls), case
    number = torch.arange(N, device=DEVICE).expand(B, G, -1)
    positions = number.where(number * block < lengths_B[:, None, None], -1)
    is_forced = (number * block < forced.sink) | (
        number >= (lengths_B[:, None, None] - forced.local).clamp_min(0) // block
    )
    check_choice(calls[0], scores, positions, is_forced, lengths_B, count, tolerance, case)


def candidates(shape: Shape, lengths_B: Tensor, search: str, J: int) -> tuple[Searched | None, Tensor]:
    """Random lists of blocks, and the positions (B, G, M) of their tokens, -1 for none."""
    B, S, _, G, _, block = shape
    searched = None
    if search != "all":
        listed = torch.full((B, G, J), -1)
        first = listed.clone()
        for b in range(B):
            existing = -(-int(lengths_B[b]) // block)
            newest = existing - 1
            for g in range(G):
                for table in (listed, first):
                    numbers = torch.randperm(existing)[:J].sort().values
                    if search == "blocks":
                        numbers[-1] = newest
                    table[b, g, : len(numbers)] = numbers
        if search == "first":
            listed[0] = -1
        listed, first = listed.to(DEVICE), first.to(DEVICE)
        searched = Searched(listed, first if search == "first" else None, block, search != "blocks")
    positions = torch.arange(S, device=DEVICE).expand(B, G, -1) if searched is None else searched.tokens(lengths_B)
    return searched, positions.where(positions < lengths_B[:, None, None], -1)


def check_indexer_tokens(
    shape: Shape, *, search: str, count: int, forced: Forced, dtype: torch.dtype, tolerance: float, J: int = 4
) -> None:
    B, S, H, G, K, _ = shape
    lengths_B = lengths_of(shape)
    q, weights, k = random(B, H, K, dtype=dtype), random(B, H, dtype=dtype), random(B, G, S, K, dtype=dtype)
    searched, positions = candidates(shape, lengths_B, search, J)
    every = by_torch.indexer_scores(q.double(), weights, k.double())
    tickets = new_tickets(B, H, DEVICE)
    options: dict[str, Any] = {"searched": searched, "count": count, "forced": forced}
    poisoned = poison(k, lengths_B, 1, 2)
    calls = [indexer_tokens(q, weights, poisoned, lengths_B, tickets=t, **options) for t in (tickets, None)]
    case = ("indexer", shape, search, count, forced, dtype)
    assert tickets.eq(0).all(), case
    assert torch.equal(*calls), (case, "fused and in rounds")
    is_forced = (positions < forced.sink) | (positions >= lengths_B[:, None, None] - forced.local)
    if searched is not None and searched.newest:
        is_forced |= positions == lengths_B[:, None, None] - 1
    scores = every.gather(2, positions.clamp_min(0))
    check_choice(calls[0], scores, positions, is_forced, lengths_B, count, tolerance, case)


def check_tokens(
    shape: Shape,
    *,
    channels: int,
    bits: int,
    search: str,
    count: int,
    forced: Forced,
    dtype: torch.dtype,
    tolerance: float,
    J: int = 4,
) -> None:
    B, S, H, G, K, _ = shape
    lengths_B, scale = lengths_of(shape), K**-0.5
    q, k = random(B, H, K, dtype=dtype), random(B, G, S, K, dtype=dtype)
    chosen_Gc = torch.stack([torch.randperm(K)[:channels].sort().values for _ in range(G)]).to(DEVICE)
    k = k.gather(-1, chosen_Gc[None, :, None].expand(B, -1, S, -1))
    codes, steps = quantised(k) if bits == 4 else (k, None)
    searched, positions = candidates(shape, lengths_B, search, J)
    exact = TokenKeys(codes if bits == 4 else k.double(), None if steps is None else steps.double(), chosen_Gc)
    scores = by_torch.channel_scores(q.double(), exact, positions, positions >= 0, scale)
    poisoned = TokenKeys(
        poison(codes, lengths_B, 1, 2), None if steps is None else poison(steps, lengths_B, 1, 2), chosen_Gc
    )
    tickets = new_tickets(B, H, DEVICE)
    options: dict[str, Any] = {"searched": searched, "scale": scale, "count": count, "forced": forced}
    calls = [channel_tokens(q, poisoned, lengths_B, tickets=t, **options) for t in (tickets, None)]
    case = ("tokens", shape, channels, bits, search, count, forced, dtype)
    assert tickets.eq(0).all(), case
    assert torch.equal(*calls), (case, "fused and in rounds")
    is_forced = (positions < forced.sink) | (positions >= lengths_B[:, None, None] - forced.local)
    check_choice(calls[0], scores, positions, is_forced, lengths_B, count, tolerance, case)


def check_attention(
    shape: Shape,
    *,
    keys: int | None = None,
    n: int,
    V: int,
    shared: int,
    softcap: float,
    with_sink: bool,
    pooled: bool,
    counted: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    B, S, H, G, K, block = shape
    rows_of = keys or G  # groups of keys, which several groups of choices may share
    q, k = random(B, H, K + shared, dtype=dtype), random(B, S, rows_of, K, dtype=dtype)
    v = random(B, S, rows_of, V, dtype=dtype) if V else None
    kr = random(B, S, 1, shared, dtype=dtype) if shared else None
    sink = random(H, dtype=torch.float32) if with_sink else None
    tokens = torch.stack([torch.randperm(S)[:n] for _ in range(B * G)]).view(B, G, -1).to(DEVICE)
    tokens[torch.rand(tokens.shape, device=DEVICE) < 0.2] = -1
    tokens[0, 0] = -1  # nothing is chosen
    pool = None
    if pooled:
        slots = torch.stack([torch.randperm(-(-S // block)) for _ in range(B * G)]).view(B, G, -1).to(DEVICE)
        slots[slots * block + block > S] = -1
        slots[torch.rand(slots.shape, device=DEVICE) < 0.2] = -1
        pool = Pool(slots, block)
    counts = torch.randint(0, n + 1, (B, G), device=DEVICE) if counted else None
    rows = tokens if counts is None else tokens.where(torch.arange(n, device=DEVICE) < counts[..., None], -1)
    rows = rows if pool is None else pool.rows(rows)
    options: dict[str, Any] = {
        "scale": 0.3 if softcap else K**-0.5,
        "softcap": softcap or None,
        "sink_H": sink,
        "counts_BG": counts,
        "pool": pool,
    }

    def double(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    expected = gathered_attention(q.double(), k.double(), double(v), tokens, shared_BS1R=double(kr), **options)
    # rows that nothing chooses hold anything
    is_read = torch.zeros(B, G, S + 1, dtype=torch.bool, device=DEVICE).scatter_(-1, rows.where(rows >= 0, S), True)
    is_read = is_read.unflatten(1, (rows_of, -1)).any(2)
    unread_BSG1 = ~is_read[..., :S].transpose(1, 2)[..., None]
    k = k.masked_fill(unread_BSG1, torch.nan)
    v = None if v is None else v.masked_fill(unread_BSG1, torch.nan)
    kr = None if kr is None else kr.masked_fill(unread_BSG1.all(2, keepdim=True), torch.nan)
    case = ("attention", shape, n, V, shared, softcap, with_sink, pooled, counted, dtype)
    o = gathered_attention(q, k, v, tokens, shared_BS1R=kr, **options)
    assert o.isfinite().all(), (case, "not finite")
    error = float((o.double() - expected).norm() / expected.norm().clamp_min(1e-6))
    assert error < tolerance, (case, error)


def check_whole_blocks(shape: Shape, m: int, dtype: torch.dtype, tolerance: float) -> None:
    """A list of blocks is the list of their tokens."""
    B, S, H, G, K, block = shape
    lengths_B, q = lengths_of(shape), random(B, H, K, dtype=dtype)
    k, v = random(B, S, G, K, dtype=dtype), random(B, S, G, K, dtype=dtype)
    blocks = torch.stack([torch.randperm(-(-S // block))[:m] for _ in range(B * G)]).view(B, G, -1).to(DEVICE)
    expected = gathered_attention(q.double(), k.double(), v.double(), tokens_of(blocks, block, lengths_B), scale=0.3)
    k, v = poison(k, lengths_B, 1, 1), poison(v, lengths_B, 1, 1)
    o = gathered_attention(q, k, v, blocks, block=block, lengths_B=lengths_B, scale=0.3)
    error = float((o.double() - expected).norm() / expected.norm().clamp_min(1e-6))
    assert error < tolerance, ("blocks", shape, m, error)


def check_new_tokens(shape: Shape, channels: int, dtype: torch.dtype, tolerance: float) -> None:
    """Indices that grow token by token, from different positions, bit by bit; means to rounding."""
    B, S, _, G, K, block = shape
    chosen_Gc = torch.stack([torch.randperm(K)[:channels].sort().values for _ in range(G)]).to(DEVICE)
    nothing = torch.full((B, G, -(-S // block), K), torch.nan, device=DEVICE, dtype=dtype)
    codes = torch.zeros(B, G, S, channels // 2, dtype=torch.uint8, device=DEVICE)
    steps = torch.zeros(B, G, S, dtype=torch.float16, device=DEVICE)
    results = []
    position_B = torch.randint(0, S - 2 * block, (B,)).to(DEVICE) // block * block
    new = [(random(B, 2 * G, K, dtype=dtype)[:, ::2], position_B + i) for i in range(2 * block)]
    for backend in ("triton", "torch"):
        upper, lower, means = nothing.clone(), nothing.clone(), nothing.clone()
        sums = torch.full((B, G, K), torch.nan, device=DEVICE)
        packed, plain = TokenKeys(codes.clone(), steps.clone(), chosen_Gc), random(B, G, S, channels, dtype=dtype) * 0
        with force_backend(backend):
            for k, at in new:
                extend_minmax(upper, lower, k, at, block=block)
                extend_means(means, sums, k, at, sub_block=block)
                extend_codes(packed, k, at)
                extend_codes(TokenKeys(plain, None, chosen_Gc), k, at)
        results.append((upper, lower, packed.keys_BGSc, packed.steps_BGS, plain, sums, means))
    for number, (actual, expected) in enumerate(zip(*results)):
        limit = tolerance if number == 6 else 0.0
        torch.testing.assert_close(actual, expected, rtol=limit, atol=limit, equal_nan=True, msg=str(number))


def check_numbers(shape: Shape, n: int, m: int) -> None:
    """What a step read, with and without lists of blocks."""
    B, S, _, G, _, block = shape
    N, lengths_B = -(-S // block), lengths_of(shape)

    def listed(count: int, below: int) -> Tensor:
        numbers = torch.stack([torch.randperm(below)[:count] for _ in range(B * G)]).view(B, G, -1).to(DEVICE)
        numbers = numbers.where(torch.rand(numbers.shape, device=DEVICE) < 0.8, below).sort(-1).values
        return numbers.where(numbers < below, -1)

    tokens, blocks, before, first = listed(n, S), listed(m, N), listed(m, N), listed(m, N)
    before[0] = -1
    for searched in (None, Searched(blocks, None, block, False), Searched(before, first, block, True)):
        index = IndexReads(block, 48.0, 6.0, searched)
        for chosen, unit, resident in ((tokens, 1, before), (blocks, block, None)):
            results = []
            for backend in ("triton", "torch"):
                previous, tickets = before.clone(), new_tickets(1, 1, DEVICE)
                options: dict[str, Any] = {"block": unit, "row_bytes": 64.0, "index": index, "tickets": tickets}
                is_resident = None if resident is None else previous
                with force_backend(backend):
                    numbers = read_numbers(chosen, blocks, previous, lengths_B, resident_BGr=is_resident, **options)
                assert torch.equal(previous, blocks) and tickets.eq(0).all(), (shape, searched)
                results.append(numbers)
            torch.testing.assert_close(*results, rtol=1e-12, atol=0, equal_nan=True)


def check_ties(count: int, dtype: torch.dtype) -> None:
    """Of equal scores the first are chosen, by every form alike."""
    from workbench.ops.sparse_decoding.kernels import choice

    scores = torch.randint(-2, 3, (2, 3, 150)).to(DEVICE, torch.float32)
    lengths_B, forced = torch.tensor([150, 77], device=DEVICE), Forced(3, 5)
    expected = by_torch.select(scores, lengths_B, count, forced, 1)
    assert torch.equal(choice.select(scores, lengths_B, count, forced, 1), expected), ("ties", count)
    actual = best_blocks(scores, lengths_B, block=1, count=count, forced=forced)
    assert torch.equal(actual, expected), ("best", count)
    settings, choice.TILE = choice.TILE, 64
    try:
        actual = choice.select(scores, lengths_B, count, forced, 1) if count <= 32 else expected
    finally:
        choice.TILE = settings
    assert torch.equal(actual, expected), ("ties in rounds", count)


def main() -> None:
    seed = int(sys.argv[1])
    parts = sys.argv[3].split(",") if len(sys.argv) > 3 else ["blocks", "tokens", "indexer", "attention", "new"]
    dtype = getattr(torch, sys.argv[4]) if len(sys.argv) > 4 else torch.float32
    torch.manual_seed(seed)
    is_wide = dtype == torch.float32
    choice, values = 3e-5, 1e-5 if is_wide else 1e-2
    kept = Forced(2, 3)
    small, latent = Shape(2, 53, 6, 2, 16, 4), Shape(2, 40, 5, 1, 72, 4)
    blocks: dict[str, Any] = {"dtype": dtype, "tolerance": choice, "forced": kept}
    if "blocks" in parts:
        for count in (3, 5, 40):
            check_ties(count, dtype)
        check_blocks(small, index="minmax", sub_block=0, count=5, **blocks)
        check_blocks(latent, index="minmax", sub_block=0, count=3, **(blocks | {"forced": Forced(0, 1)}))
        check_blocks(small, index="mean", sub_block=2, count=5, **blocks)
        check_blocks(latent, index="mean", sub_block=4, count=3, **blocks)
    if "new" in parts:
        check_new_tokens(small, 8, dtype, values)
        check_new_tokens(latent, 24, dtype, values)
        check_numbers(small, 9, 5)
        check_numbers(Shape(3, 700, 4, 2, 16, 4), 300, 130)
    if "tokens" in parts:
        for search in ("all", "blocks", "newest", "first"):
            check_tokens(small, channels=8, bits=4, search=search, count=7, **blocks)
        check_tokens(latent, channels=24, bits=4, search="newest", count=9, **blocks)
        check_tokens(small, channels=6, bits=16, search="newest", count=40, **blocks)
    if "indexer" in parts:
        for sub_block in (4, 2):
            check_blocks(small, index="indexer", sub_block=sub_block, count=5, **blocks)
        check_blocks(latent, index="indexer", sub_block=1, count=3, **(blocks | {"forced": Forced(1, 1)}))
        for search in ("all", "blocks", "newest", "first"):
            check_indexer_tokens(small, search=search, count=7, **blocks)
        check_indexer_tokens(latent, search="blocks", count=9, **(blocks | {"forced": Forced(0, 0)}))
    attend: dict[str, Any] = {"dtype": dtype, "tolerance": values}
    if "attention" in parts:
        plain = {"shared": 0, "softcap": 0.0, "with_sink": False, "pooled": False, "counted": False}
        check_attention(small, n=37, V=24, **(plain | {"softcap": 1.5, "with_sink": True}), **attend)
        check_attention(small, n=9, V=16, **(plain | {"pooled": True, "counted": True}), **attend)
        check_whole_blocks(small, 5, **attend)
        check_attention(small._replace(G=6, H=6), n=9, V=16, keys=2, **plain, **attend)
        check_attention(latent, n=37, V=0, **(plain | {"shared": 8, "with_sink": True}), **attend)
        check_attention(Shape(1, 64, 20, 1, 32, 4), n=50, V=0, **(plain | {"shared": 16}), **attend)
    if "long" in parts:  # on a GPU
        big, mla = Shape(3, 32_768, 32, 8, 128, 64), Shape(3, 32_768, 32, 1, 576, 64)
        default = blocks | {"forced": Forced(16, 64)}
        for shape in (big, mla):
            for index in ("minmax", "mean"):
                check_blocks(shape, index=index, sub_block=8, count=128, **default)
            check_blocks(shape._replace(block=16), index="minmax", sub_block=8, count=64, **default)
            for search in ("all", "blocks"):
                check_indexer_tokens(shape._replace(H=64, G=1, K=128), search=search, count=1024, J=128, **default)
            for sub_block in (8, shape.block):
                check_blocks(
                    shape._replace(H=64, G=1, K=128), index="indexer", sub_block=sub_block, count=128, **default
                )
            for search in ("all", "blocks", "newest", "first"):
                c = 128 if shape is mla else 32
                check_tokens(shape, channels=c, bits=4, search=search, count=1024, J=128, **default)
        plain = {"shared": 0, "softcap": 0.0, "with_sink": False, "pooled": False, "counted": False}
        check_attention(big, n=1024, V=128, **plain, **attend)
        check_attention(big, n=2048, V=128, **(plain | {"pooled": True, "counted": True, "with_sink": True}), **attend)
        check_whole_blocks(big, 16, **attend)
        check_attention(mla._replace(K=512), n=1024, V=0, **(plain | {"shared": 64}), **attend)
    print("kernels agree")


if __name__ == "__main__":
    with force_backend("triton"):
        main()
