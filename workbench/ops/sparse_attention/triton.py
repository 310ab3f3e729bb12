"""The kernels. Forms, arguments and results as in :mod:`workbench.ops.sparse_attention.chunked`.

Attention over runs of keys is the usual flash form (arXiv 2307.08691) with bounds by query. For selected blocks

- a forward program holds the heads of one group for one position, or for several that fill a tensor-core tile of 16 rows together
  (4 positions of 4 heads), and streams the keys of every block that any of them selects, with a bit for each; so does the program
  for the gradient of queries;
- gradients of keys and values go the other way round: a map of bytes says which blocks each position selects, its rows are
  listed, and the list of a block is cut into items of equal size, since the first block of a document is selected by all.
  Items write partial sums that are added in order: no atomics, same input, same bits;
- values that are channels of the keys are read once, with them.

Selection recomputes the probabilities of pooled blocks from the log-sum-exp, block of scores by block of scores, and finds the
n-th greatest by bisection over the bits of its floating-point number: the cost does not grow with n.

Products never take a transposed accumulator: Triton 3.4 to 3.6 compiles ``dot(trans(dot(a, b)), c)`` wrongly on Hopper. Assemblers
before CUDA 13.1 (Triton 3.6 has 12.8) are reported to spoil wgmma products with an operand in registers, up to illegal accesses
(fla-org/flash-linear-attention, pull request 1262; triton-lang/triton, 11366 and 11781). Heads narrower than 64 channels
are therefore launched with two warps, which take other instructions.

Launch settings are fixed; none is searched for at run time. Legend: as in :mod:`.chunked`; A and R the two parts in which channels
of keys are read (the second may be empty), P behind a size: padded to a power of two, at least 16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORE_BYTES = 2**28
"""Largest size of the scores of selection blocks held at once."""

ITEMS = 2048
"""Items into which the lists of one group are cut, about; one for each block in addition."""

LAUNCH: dict[str, dict[str, int]] = {
    "range_forward": {"BT": 128, "BN": 64, "num_warps": 4, "num_stages": 3},
    "range_queries": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "range_keys": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "importance": {"num_warps": 4, "num_stages": 2},
    "selected_forward": {"BN": 32, "num_warps": 1, "num_stages": 2},
    "selected_queries": {"BN": 32, "num_warps": 2, "num_stages": 2},
    "selected_queries 16": {"BN": 32, "num_warps": 1, "num_stages": 3},
    "selected_keys": {"ROWS": 64, "num_warps": 4, "num_stages": 2},
    "selected_keys 16": {"ROWS": 32, "num_warps": 1, "num_stages": 2},
}
"""Tiles, warps and stages of loading ahead of each kernel. "selected_forward 64" is that of tiles of 64 rows, "selected_keys 16" that of
16 keys, where these have one of their own; ROWS are the rows of queries that meet a tile of keys at once, about. Those of selected
blocks and queries are the best of 44 and some on an H200 (8 × 4096 tokens, a group of 16 heads, blocks of 64 and latents in blocks of
16); the others are not tuned."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITE = tl.constexpr(0x7F800000)  # bits of the fp32 infinity


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _parts(q: Tensor, v: Tensor | None, V: int) -> dict[str, Any]:
    """How the channels of keys are read: the values' share first where they are keys, else the greatest power of two."""
    K = q.shape[-1]
    A = V if v is None else 1 << (K.bit_length() - 1)
    E = K - A
    return {
        "A": A,
        "AP": _padded(A),
        "E": E,
        "EP": _padded(E) if E else 0,
        "V": V,
        "VP": _padded(V),
        "APART": v is not None,
        "PRECISION": _precision(q),
    }


def _settings(kernel: str, parts: dict[str, Any], rows: int = 0) -> dict[str, int]:
    """Tiles, warps and stages of a launch."""
    settings = dict(LAUNCH.get(f"{kernel} {rows}", LAUNCH[kernel]))
    narrow, wide = min(parts["AP"], parts["VP"]) < 64, max(parts["AP"] + parts["EP"], parts["VP"]) > 128
    if narrow or wide:
        settings.update(
            {side: min(settings[side], size) for side, size in (("BT", 64), ("BN", 32)) if side in settings}
        )
    if narrow:
        settings["num_warps"] = min(settings["num_warps"], 2)
    return settings


@triton.jit
def _load(base, rows, stride, there, SIZE: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """(len(rows), PADDED) channels of rows."""
    d = tl.arange(0, PADDED)
    at = base + rows[:, None] * stride + d[None, :]
    if PADDED == SIZE:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (d[None, :] < SIZE), other=0.0)


@triton.jit
def _store(base, rows, stride, there, x, SIZE: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, PADDED)
    at = base + rows[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=there[:, None] & (d[None, :] < SIZE))


@triton.jit
def _bounds(row, start, there, LENGTH: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """First visible slot and the one behind the last; equal where nothing is visible."""
    left = row - start + 1 - LENGTH
    low = start // STRIDE
    high = low + tl.where(there & (left >= 0), left // STRIDE + 1, 0)
    if WINDOW > 0:
        low = tl.maximum(low, high - WINDOW)
    return low, high


@triton.jit
def _cap(s, softcap):  # type: ignore[no-untyped-def]
    return softcap * (1 - 2 / (1 + tl.exp(2 * s / softcap)))


# -- attention over one run of keys ----------------------------------------------------------------------------------


@triton.jit
def _range_forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    start,
    o,
    lse,
    T,
    N,
    H,
    G,
    offset,
    scale,
    softcap,
    R: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tile * BT + tl.arange(0, BT)
    there = t < T
    low, high = _bounds(offset + t, tl.load(start + b * T + t, mask=there, other=0), there, LENGTH, STRIDE, WINDOW)
    query_at = (b * T + t) * H + h
    K = A + E
    q_TA = _load(q, query_at, K, there, A, AP)
    if EP > 0:
        q_TE = _load(q + A, query_at, K, there, E, EP)
    k += (b * N * G + h // R) * K
    v += (b * N * G + h // R) * V
    top = tl.full((BT,), -float("inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    acc = tl.zeros((BT, VP), tl.float32)
    first = tl.min(tl.where(there, low, N)) // BN * BN
    for n0 in range(first, tl.minimum(N, tl.max(high)), BN):
        n = n0 + tl.arange(0, BN)
        inside = n < N
        k_NA = _load(k, n.to(tl.int64), G * K, inside, A, AP)
        s = tl.dot(q_TA, tl.trans(k_NA), input_precision=PRECISION)
        if EP > 0:
            k_NE = _load(k + A, n.to(tl.int64), G * K, inside, E, EP)
            s = tl.dot(q_TE, tl.trans(k_NE), s, input_precision=PRECISION)
        s *= scale
        if CAPPED:
            s = _cap(s, softcap)
        seen = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        s = tl.where(seen, s * LOG2E, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, axis=1)
        v_NV = _load(v, n.to(tl.int64), G * V, inside, V, VP) if APART else k_NA
        acc = acc * shrink[:, None] + tl.dot(p.to(v_NV.dtype), v_NV, input_precision=PRECISION)
        top = higher
    some = total > 0
    safe_total = tl.where(some, total, 1.0)
    _store(o, query_at, V, there, tl.where(some[:, None], acc / safe_total[:, None], 0.0), V, VP)
    tl.store(lse + query_at, tl.where(some, (top + tl.log2(safe_total)) * LN2, -float("inf")), mask=there)


@triton.jit
def _range_queries(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    start,
    do,
    lse,
    delta,
    dq,
    T,
    N,
    H,
    G,
    offset,
    scale,
    softcap,
    R: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tile * BT + tl.arange(0, BT)
    there = t < T
    low, high = _bounds(offset + t, tl.load(start + b * T + t, mask=there, other=0), there, LENGTH, STRIDE, WINDOW)
    query_at = (b * T + t) * H + h
    K = A + E
    q_TA = _load(q, query_at, K, there, A, AP)
    acc_TA = tl.zeros((BT, AP), tl.float32)
    if EP > 0:
        q_TE = _load(q + A, query_at, K, there, E, EP)
        acc_TE = tl.zeros((BT, EP), tl.float32)
    do_TV = _load(do, query_at, V, there, V, VP)
    sums = tl.load(lse + query_at, mask=there, other=0.0)
    sums = tl.where(sums == -float("inf"), 0.0, sums)
    shift = tl.load(delta + query_at, mask=there, other=0.0)
    k += (b * N * G + h // R) * K
    v += (b * N * G + h // R) * V
    first = tl.min(tl.where(there, low, N)) // BN * BN
    for n0 in range(first, tl.minimum(N, tl.max(high)), BN):
        n = n0 + tl.arange(0, BN)
        inside = n < N
        k_NA = _load(k, n.to(tl.int64), G * K, inside, A, AP)
        s = tl.dot(q_TA, tl.trans(k_NA), input_precision=PRECISION)
        if EP > 0:
            k_NE = _load(k + A, n.to(tl.int64), G * K, inside, E, EP)
            s = tl.dot(q_TE, tl.trans(k_NE), s, input_precision=PRECISION)
        s *= scale
        if CAPPED:
            s = _cap(s, softcap)
        seen = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        p = tl.where(seen, tl.exp2((s - sums[:, None]) * LOG2E), 0.0)
        v_NV = _load(v, n.to(tl.int64), G * V, inside, V, VP) if APART else k_NA
        ds = p * (tl.dot(do_TV, tl.trans(v_NV), input_precision=PRECISION) - shift[:, None])
        if CAPPED:
            ds *= 1 - s * s / (softcap * softcap)
        ds = ds.to(k_NA.dtype)
        acc_TA += tl.dot(ds, k_NA, input_precision=PRECISION)
        if EP > 0:
            acc_TE += tl.dot(ds, k_NE, input_precision=PRECISION)
    _store(dq, query_at, K, there, acc_TA * scale, A, AP)
    if EP > 0:
        _store(dq + A, query_at, K, there, acc_TE * scale, E, EP)


@triton.jit
def _range_keys(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    start,
    do,
    lse,
    delta,
    last,
    dk,
    dv,
    T,
    N,
    H,
    G,
    offset,
    scale,
    softcap,
    R: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Gradients of a tile of keys, summed over HEADS of the heads that read them."""
    tile, parts = tl.program_id(0), H // HEADS
    b, part = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts
    n = tile * BN + tl.arange(0, BN)
    inside = n < N
    g = part * HEADS // R
    K = A + E
    k += (b * N * G + g) * K
    k_NA = _load(k, n.to(tl.int64), G * K, inside, A, AP)
    dk_NA = tl.zeros((BN, AP), tl.float32)
    if EP > 0:
        k_NE = _load(k + A, n.to(tl.int64), G * K, inside, E, EP)
        dk_NE = tl.zeros((BN, EP), tl.float32)
    v_NV = k_NA
    if APART:
        v_NV = _load(v + (b * N * G + g) * V, n.to(tl.int64), G * V, inside, V, VP)
        dv_NV = tl.zeros((BN, VP), tl.float32)
    # the block of a slot begins in it, or behind its start: no earlier query sees it; the last one is listed
    first = tl.maximum(0, tile * BN * STRIDE + LENGTH - 1 - offset) // BT * BT
    end = tl.load(last + b * tl.num_programs(0) + tile)
    for t0 in range(first, end, BT):
        t = t0 + tl.arange(0, BT)
        there = t < T
        low, high = _bounds(offset + t, tl.load(start + b * T + t, mask=there, other=0), there, LENGTH, STRIDE, WINDOW)
        seen = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        for i in range(HEADS):
            query_at = (b * T + t) * H + part * HEADS + i
            q_TA = _load(q, query_at, K, there, A, AP)
            do_TV = _load(do, query_at, V, there, V, VP)
            sums = tl.load(lse + query_at, mask=there, other=0.0)
            sums = tl.where(sums == -float("inf"), 0.0, sums)
            shift = tl.load(delta + query_at, mask=there, other=0.0)
            s = tl.dot(k_NA, tl.trans(q_TA), input_precision=PRECISION)
            if EP > 0:
                q_TE = _load(q + A, query_at, K, there, E, EP)
                s = tl.dot(k_NE, tl.trans(q_TE), s, input_precision=PRECISION)
            s *= scale
            if CAPPED:
                s = _cap(s, softcap)
            p = tl.where(seen, tl.exp2((s - sums[None, :]) * LOG2E), 0.0)
            dp = tl.dot(v_NV, tl.trans(do_TV), input_precision=PRECISION)
            ds = p * (dp - shift[None, :]) * scale
            if CAPPED:
                ds *= 1 - s * s / (softcap * softcap)
            ds = ds.to(q_TA.dtype)
            if APART:
                dv_NV += tl.dot(p.to(do_TV.dtype), do_TV, input_precision=PRECISION)
            else:
                dk_NA += tl.dot(p.to(do_TV.dtype), do_TV, input_precision=PRECISION)
            dk_NA += tl.dot(ds, q_TA, input_precision=PRECISION)
            if EP > 0:
                dk_NE += tl.dot(ds, q_TE, input_precision=PRECISION)
    at = (b * N + n) * parts + part
    _store(dk, at, K, inside, dk_NA, A, AP)
    if EP > 0:
        _store(dk + A, at, K, inside, dk_NE, E, EP)
    if APART:
        _store(dv, at, V, inside, dv_NV, V, VP)


def range_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    V: int,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    (B, T, H, _), (N, G) = q.shape, k.shape[1:3]
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    if N == 0:
        return o.zero_(), lse.fill_(-math.inf)
    parts = _parts(q, v, V)
    settings = _settings("range_forward", parts)
    _range_forward[(triton.cdiv(T, settings["BT"]), B * H)](
        q,
        k,
        k if v is None else v,
        start_BT,
        o,
        lse,
        T,
        N,
        H,
        G,
        offset,
        scale,
        softcap or 1.0,
        R=H // G,
        LENGTH=length,
        STRIDE=stride,
        WINDOW=window,
        CAPPED=softcap > 0,
        **settings,
        **parts,
    )
    return o, lse


def range_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    V: int,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), (N, G) = q.shape, k.shape[1:3]
    dq, values = torch.empty_like(q), k if v is None else v
    if N == 0:
        return dq.zero_(), k.new_zeros(k.shape), k.new_zeros(0 if v is None else v.shape)
    delta, parts = _delta(do, o, dlse), _parts(q, v, V)
    common = (T, N, H, G, offset, scale, softcap or 1.0)
    form = {"R": H // G, "LENGTH": length, "STRIDE": stride, "WINDOW": window, "CAPPED": softcap > 0, **parts}
    settings = _settings("range_queries", parts)
    _range_queries[(triton.cdiv(T, settings["BT"]), B * H)](
        q, k, values, start_BT, do, lse, delta, dq, *common, **form, **settings
    )
    settings = _settings("range_keys", parts)
    BN = settings["BN"]
    tiles = triton.cdiv(N, BN)
    # few keys: a head a program, summed afterwards; many: the heads of a group in one
    heads = H // G if tiles * B * G >= 256 else 1
    made: dict[str, Any] = {"device": q.device, "dtype": torch.float32 if heads < H // G else q.dtype}
    dk = torch.empty(B, N, H // heads, K, **made)
    dv = dk if v is None else torch.empty(B, N, H // heads, V, **made)
    low_BT = start_BT // stride
    if window:
        rows_T = torch.arange(offset, offset + T, device=q.device, dtype=start_BT.dtype)
        low_BT = torch.maximum(low_BT, rows_T - window + 1) if length == stride == 1 else low_BT
    ends = (torch.arange(1, tiles + 1, device=q.device, dtype=low_BT.dtype) * BN).expand(B, tiles)
    last = torch.searchsorted(low_BT.contiguous(), ends.contiguous()).to(torch.int32)
    _range_keys[(tiles, B * (H // heads))](
        q, k, values, start_BT, do, lse, delta, last, dk, dv, *common, HEADS=heads, **form, **settings
    )
    gradients = [dk] if v is None else [dk, dv]
    if heads < H // G:
        gradients = [x.view(B, N, G, H // G, -1).sum(3).to(q.dtype) for x in gradients]
    return dq, gradients[0], k.new_empty(0) if v is None else gradients[1]


@triton.jit
def _products(do, o, dlse, delta, rows, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = row < rows
    product = _load(do, row, V, there, V, VP).to(tl.float32) * _load(o, row, V, there, V, VP).to(tl.float32)
    tl.store(delta + row, tl.sum(product, axis=1) - tl.load(dlse + row, mask=there, other=0.0), mask=there)


def _delta(do: Tensor, o: Tensor, dlse: Tensor) -> Tensor:
    """(B, T, H) fp32: do · o - dlse, what is taken from the gradient of every probability."""
    delta = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    rows, V = delta.numel(), o.shape[-1]
    _products[(triton.cdiv(rows, 32),)](do, o, dlse, delta, rows, V=V, VP=_padded(V), BR=32, num_warps=4)
    return delta


# -- selection -------------------------------------------------------------------------------------------------------


@triton.jit
def _importance(  # type: ignore[no-untyped-def]
    q,
    ck,
    lse,
    start,
    rows,
    score,
    first,
    Q,
    C,
    N,
    J,
    H,
    G,
    scale,
    R: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BJ: tl.constexpr,
):
    """Scores (B, G, C, J) of selection blocks for the queries ``first`` to ``first + C - 1``; later blocks are not written."""
    b, g = (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    c = tl.program_id(0) * BQ + tl.arange(0, BQ)
    i = first + c
    there = (c < C) & (i < Q)
    row = tl.load(rows + b * Q + i, mask=there, other=-1)
    there = there & (row >= 0)
    begin = tl.load(start + b * Q + i, mask=there, other=0)
    low, high = _bounds(row, begin, there, LENGTH, STRIDE, 0)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BQ, BJ), tl.float32)
    if tl.program_id(1) * BJ <= tl.max(tl.where(there, (row - begin) // BLOCK, -1)):
        # documents of the tile one after another: their blocks lie in different slots
        base = tl.min(tl.where(there, low, N))
        while base < N:
            mine = there & (low == base)
            for m in range(1 - LENGTH // STRIDE, BLOCK // STRIDE):
                at = j * (BLOCK // STRIDE) + m
                inside = (at >= 0) & (base + at < N)
                weight = (tl.minimum(m * STRIDE + LENGTH, BLOCK) - tl.maximum(m * STRIDE, 0)) / STRIDE
                k_JK = _load(ck + b * N * G * K + g * K, (base + at).to(tl.int64), G * K, inside, K, KP)
                seen = mine[:, None] & inside[None, :] & (base + at[None, :] < high[:, None])
                for r in range(R):
                    query_at = (b * Q + i) * H + g * R + r
                    q_QK = _load(q, query_at, K, there, K, KP)
                    sums = tl.load(lse + query_at, mask=there, other=0.0).to(tl.float32)
                    sums = tl.where(sums == -float("inf"), 0.0, sums)
                    s = tl.dot(q_QK, tl.trans(k_JK), input_precision=PRECISION) * scale
                    acc += tl.where(seen, tl.exp2((s - sums[:, None]) * LOG2E) * weight, 0.0)
            base = tl.min(tl.where(there & (low > base), low, N))
        at = score + ((b * G + g) * C + c[:, None]) * J + j[None, :]
        tl.store(at, acc, mask=(c < C)[:, None] & (j < J)[None, :])


@triton.jit
def _greatest(  # type: ignore[no-untyped-def]
    score,
    start,
    rows,
    out,
    first,
    Q,
    C,
    J,
    G,
    n,
    BLOCK: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    JP: tl.constexpr,
    NP: tl.constexpr,
):
    """Indices of the n greatest scores of one query and group, ascending; the lower index among equals."""
    c = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    row, begin = tl.load(rows + b * Q + first + c), tl.load(start + b * Q + first + c)
    own = tl.where(row >= 0, (row - begin) // BLOCK, -1)
    j = tl.arange(0, JP)
    visible = (j <= own) & (j < J)
    x = tl.load(score + ((b * G + g) * C + c) * J + j, mask=visible, other=0.0)
    key = tl.where((j < INITIAL) | (j > own - LOCAL), INFINITE, x.to(tl.int32, bitcast=True))
    key = tl.where(visible, key, -1)
    # bits from the greatest down: the n-th greatest number, as positive floats are ordered as their bits
    threshold = 0
    for bit in range(31):
        higher = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((key >= higher).to(tl.int32)) >= n, higher, threshold)
    above, equal = key > threshold, key == threshold
    wanted = n - tl.sum(above.to(tl.int32))
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    out += ((b * Q + first + c) * G + g) * n
    tl.store(out + place, j, mask=chosen)
    behind = tl.arange(0, NP)
    tl.store(out + behind, tl.full((NP,), -1, tl.int32), mask=(behind >= tl.sum(chosen.to(tl.int32))) & (behind < n))


def select(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    keys: int,
    length: int,
    stride: int,
    block: int,
    count: int,
    initial: int,
    local: int,
    scale: float,
) -> Tensor:
    (B, Q, H, K), (N, G) = q.shape, ck.shape[1:3]
    J = triton.cdiv(keys, block)
    out = torch.empty(B, Q, G, count, dtype=torch.int32, device=q.device)
    C = min(Q, max(64, SCORE_BYTES // (4 * B * G * J)))
    score = torch.empty(B, G, C, J, dtype=torch.float32, device=q.device)
    if N == 0:
        score.zero_()
    BJ, JP = min(64, _padded(J)), triton.next_power_of_2(J)
    BQ = min(64 if K <= 128 else 32, _padded(Q))
    launch = _settings("importance", _parts(q, q, K))
    for first in range(0, Q, C):
        now = min(C, Q - first)
        if N:
            _importance[(triton.cdiv(now, BQ), triton.cdiv(J, BJ), B * G)](
                q,
                ck,
                lse_BQH,
                start_BQ,
                rows_BQ,
                score,
                first,
                Q,
                C,
                N,
                J,
                H,
                G,
                scale,
                R=H // G,
                K=K,
                KP=_padded(K),
                LENGTH=length,
                STRIDE=stride,
                BLOCK=block,
                PRECISION=_precision(q),
                BQ=BQ,
                BJ=BJ,
                **launch,
            )
        _greatest[(now, B * G)](
            score,
            start_BQ,
            rows_BQ,
            out,
            first,
            Q,
            C,
            J,
            G,
            count,
            BLOCK=block,
            INITIAL=initial,
            LOCAL=local,
            JP=JP,
            NP=triton.next_power_of_2(count),
            num_warps=1 if JP <= 512 else 4,
        )
    return out


# -- attention over selected blocks ----------------------------------------------------------------------------------


@triton.jit
def _group(tile, u, start, T, offset, SHARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row of the query whose selection position ``u`` of a tile goes by, and whether it is the first of the tile to do so."""
    t = tile * SHARE + u
    there = t < T
    row = offset + t
    leader = row - (row - tl.load(start + t, mask=there, other=0)) % SHARE
    return leader, there & ((t == tile * SHARE) | (leader == row))


@triton.jit
def _unite(starts, blocks, counts, T, G, n, P: tl.constexpr, NP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The blocks that any of P positions selects, each once: its first row times 2^P, plus a bit for every position."""
    tile = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    list_at = (b * G + g) * tl.num_programs(0) + tile
    blocks += list_at * P * n
    at = tl.arange(0, NP)
    filled = 0
    for u in tl.static_range(P):
        t = tile * P + u
        own = tl.load(starts + ((b * T + t) * G + g) * n + at, mask=at < tl.where(t < T, n, 0), other=-1)
        first = own >= 0
        bits = tl.where(first, 1 << u, 0)
        for w in tl.static_range(P):
            if w != u:
                t = tile * P + w
                other = tl.load(starts + ((b * T + t) * G + g) * n + at, mask=at < tl.where(t < T, n, 0), other=-1)
                too = tl.max((own[:, None] == other[None, :]).to(tl.int32), axis=1)
                bits |= too << w
                if w < u:
                    first = first & (too == 0)
        place = filled + tl.cumsum(first.to(tl.int32), 0) - 1
        tl.store(blocks + place, (own << P) | bits, mask=first)
        filled += tl.sum(first.to(tl.int32))
    tl.store(counts + list_at, filled)


@triton.jit
def _selected_forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    blocks,
    counts,
    o,
    lse,
    T,
    S,
    H,
    G,
    n,
    offset,
    scale,
    R: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    i = tl.arange(0, M)
    t = tile * P + i // R
    there = (i < P * R) & (t < T)
    query_at = (b * T + t) * H + g * R + i % R
    row = offset + t
    K = A + E
    q_MA = _load(q, query_at, K, there, A, AP)
    if EP > 0:
        q_ME = _load(q + A, query_at, K, there, E, EP)
    list_at = (b * G + g) * tl.num_programs(0) + tile
    blocks += list_at * P * n
    keys = tl.load(counts + list_at) * BLOCK
    k += b * S * G * K + g * K
    v += b * S * G * V + g * V
    top = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, VP), tl.float32)
    for m0 in range(0, keys, BN):
        m = m0 + tl.arange(0, BN)
        block = tl.load(blocks + m // BLOCK, mask=m < keys, other=0)
        token = (block >> P) + m % BLOCK
        inside = (m < keys) & (token < S)
        k_NA = _load(k, token.to(tl.int64), G * K, inside, A, AP)
        s = tl.dot(q_MA, tl.trans(k_NA), input_precision=PRECISION)
        if EP > 0:
            k_NE = _load(k + A, token.to(tl.int64), G * K, inside, E, EP)
            s = tl.dot(q_ME, tl.trans(k_NE), s, input_precision=PRECISION)
        chosen = ((block[None, :] >> (i // R)[:, None]) & 1) == 1
        seen = there[:, None] & chosen & (token[None, :] <= row[:, None])
        s = tl.where(seen, s * (scale * LOG2E), -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, axis=1)
        v_NV = _load(v, token.to(tl.int64), G * V, inside, V, VP) if APART else k_NA
        acc = acc * shrink[:, None] + tl.dot(p.to(v_NV.dtype), v_NV, input_precision=PRECISION)
        top = higher
    some = total > 0
    safe_total = tl.where(some, total, 1.0)
    _store(o, query_at, V, there, tl.where(some[:, None], acc / safe_total[:, None], 0.0), V, VP)
    tl.store(lse + query_at, tl.where(some, (top + tl.log2(safe_total)) * LN2, -float("inf")), mask=there)


@triton.jit
def _selected_queries(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    blocks,
    counts,
    do,
    lse,
    delta,
    dq,
    T,
    S,
    H,
    G,
    n,
    offset,
    scale,
    R: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    i = tl.arange(0, M)
    t = tile * P + i // R
    there = (i < P * R) & (t < T)
    query_at = (b * T + t) * H + g * R + i % R
    row = offset + t
    K = A + E
    q_MA = _load(q, query_at, K, there, A, AP)
    acc_MA = tl.zeros((M, AP), tl.float32)
    if EP > 0:
        q_ME = _load(q + A, query_at, K, there, E, EP)
        acc_ME = tl.zeros((M, EP), tl.float32)
    do_MV = _load(do, query_at, V, there, V, VP)
    sums = tl.load(lse + query_at, mask=there, other=0.0)
    sums = tl.where(sums == -float("inf"), 0.0, sums)
    shift = tl.load(delta + query_at, mask=there, other=0.0)
    list_at = (b * G + g) * tl.num_programs(0) + tile
    blocks += list_at * P * n
    keys = tl.load(counts + list_at) * BLOCK
    k += b * S * G * K + g * K
    v += b * S * G * V + g * V
    for m0 in range(0, keys, BN):
        m = m0 + tl.arange(0, BN)
        block = tl.load(blocks + m // BLOCK, mask=m < keys, other=0)
        token = (block >> P) + m % BLOCK
        inside = (m < keys) & (token < S)
        k_NA = _load(k, token.to(tl.int64), G * K, inside, A, AP)
        s = tl.dot(q_MA, tl.trans(k_NA), input_precision=PRECISION)
        if EP > 0:
            k_NE = _load(k + A, token.to(tl.int64), G * K, inside, E, EP)
            s = tl.dot(q_ME, tl.trans(k_NE), s, input_precision=PRECISION)
        chosen = ((block[None, :] >> (i // R)[:, None]) & 1) == 1
        seen = there[:, None] & chosen & (token[None, :] <= row[:, None])
        p = tl.where(seen, tl.exp2((s * scale - sums[:, None]) * LOG2E), 0.0)
        v_NV = _load(v, token.to(tl.int64), G * V, inside, V, VP) if APART else k_NA
        dp = tl.dot(do_MV, tl.trans(v_NV), input_precision=PRECISION)
        ds = (p * (dp - shift[:, None])).to(k_NA.dtype)
        acc_MA += tl.dot(ds, k_NA, input_precision=PRECISION)
        if EP > 0:
            acc_ME += tl.dot(ds, k_NE, input_precision=PRECISION)
    _store(dq, query_at, K, there, acc_MA * scale, A, AP)
    if EP > 0:
        _store(dq + A, query_at, K, there, acc_ME * scale, E, EP)


@triton.jit
def _mark(  # type: ignore[no-untyped-def]
    starts,
    start,
    marks,
    T,
    tiles,
    slots,
    G,
    n,
    offset,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
):
    """marks[slot, tile]: bit u, position u of the tile selects the block that begins in the slot; bit 4 + u, the one that began
    in the slot before and reaches into this one. A tile is written by one program only."""
    tile = tl.program_id(0)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    marks += (b * G + g) * slots * tiles + tile
    at_n = tl.arange(0, NP)
    for u in range(SHARE):
        leader, active = _group(tile, u, start + b * T, T, offset, SHARE)
        bits = 0
        for other in range(SHARE):
            same, _ = _group(tile, other, start + b * T, T, offset, SHARE)
            bits |= tl.where((same == leader) & (tile * SHARE + other < T), 1 << other, 0)
        listed = tl.load(
            starts + ((b * T + tile * SHARE + u) * G + g) * n + at_n, mask=at_n < tl.where(active, n, 0), other=-1
        )
        here = listed >= 0
        slot = (tl.where(here, listed, 0) // BLOCK).to(tl.int64)
        old = tl.load(marks + slot * tiles, mask=here, other=0)
        tl.debug_barrier()
        tl.store(marks + slot * tiles, (old | bits).to(tl.uint8), mask=here)
        tl.debug_barrier()
        beyond = here & (listed % BLOCK != 0) & (slot + 1 < slots)
        old = tl.load(marks + (slot + 1) * tiles, mask=beyond, other=0)
        tl.debug_barrier()
        tl.store(marks + (slot + 1) * tiles, (old | (bits << 4)).to(tl.uint8), mask=beyond)
        tl.debug_barrier()


@triton.jit
def _list(  # type: ignore[no-untyped-def]
    marks,
    counts,
    begins,
    entries,
    tiles,
    slots,
    room,
    offset,
    COUNT: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
):
    """How many tiles are marked for a slot; or which, with their marks, as 256 · tile + mark."""
    slot, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    marks += (group * slots + slot) * tiles
    filled = 0
    at = 0
    if not COUNT:
        at = tl.load(begins + group * slots + slot)
    # no earlier tile sees the slot
    for first in range(tl.maximum(0, slot * BLOCK - offset) // SHARE // BM * BM, tiles, BM):
        tile = first + tl.arange(0, BM)
        mark = tl.load(marks + tile, mask=tile < tiles, other=0).to(tl.int32)
        there = (mark != 0).to(tl.int32)
        if not COUNT:
            place = at + filled + tl.cumsum(there, 0) - 1
            tl.store(entries + group * room + place, tile * 256 + mark, mask=there > 0)
        filled += tl.sum(there)
    if COUNT:
        tl.store(counts + group * slots + slot, filled)


@triton.jit
def _selected_keys(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    start,
    do,
    lse,
    delta,
    entries,
    counts,
    begins,
    ends,
    sizes,
    dk,
    dv,
    T,
    S,
    H,
    G,
    slots,
    room,
    items,
    offset,
    scale,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    A: tl.constexpr,
    AP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Partial gradients (group, item, sub-block, BN, …) of the keys of one slot from one stretch of its list."""
    item, sub = tl.program_id(0), tl.program_id(2)
    group = tl.program_id(1).to(tl.int64)
    b, g = group // G, (group % G).to(tl.int32)
    ends += group * slots
    if item < tl.load(ends + slots - 1):
        # the slot whose items end behind this one
        slot = 0
        for step in range(STEPS):
            reach = 1 << (STEPS - 1 - step)
            further = slot + reach <= slots
            slot = tl.where(
                further & (tl.load(ends + slot + reach - 1, mask=further, other=0) <= item), slot + reach, slot
            )
        begun = tl.load(ends + slot - 1, mask=slot > 0, other=0)
        size = tl.load(sizes + group)
        count = tl.load(counts + group * slots + slot)
        first = (item - begun) * size
        end = tl.minimum(count, first + size)
        entries += group * room + tl.load(begins + group * slots + slot)
        K = A + E
        x = tl.arange(0, BN)
        within = sub * BN + x
        token = slot * BLOCK + within
        inside = (within < BLOCK) & (token < S)
        k += b * S * G * K + g * K
        v += b * S * G * V + g * V
        k_NA = _load(k, token.to(tl.int64), G * K, inside, A, AP)
        dk_NA = tl.zeros((BN, AP), tl.float32)
        if EP > 0:
            k_NE = _load(k + A, token.to(tl.int64), G * K, inside, E, EP)
            dk_NE = tl.zeros((BN, EP), tl.float32)
        v_NV = k_NA
        if APART:
            v_NV = _load(v, token.to(tl.int64), G * V, inside, V, VP)
            dv_NV = tl.zeros((BN, VP), tl.float32)
        i = tl.arange(0, M)
        u = i % (SHARE * R) // R
        for e0 in range(first, end, TILES):
            e = e0 + i // (SHARE * R)
            there = (i < TILES * SHARE * R) & (e < end)
            entry = tl.load(entries + e, mask=there, other=0)
            t = entry // 256 * SHARE + u
            there = there & (t < T)
            query_at = (b * T + t) * H + g * R + i % R
            row = offset + t
            begin = tl.load(start + b * T + t, mask=there, other=0)
            # tokens before the query's block border belong to the block that began in the slot before
            border = slot * BLOCK + begin % BLOCK
            here = there & ((entry >> u) % 2 == 1)
            before = there & ((entry >> (4 + u)) % 2 == 1)
            own = token[:, None] >= border[None, :]
            seen = tl.where(own, here[None, :], before[None, :]) & (token[:, None] <= row[None, :]) & inside[:, None]
            q_MA = _load(q, query_at, K, there, A, AP)
            do_MV = _load(do, query_at, V, there, V, VP)
            sums = tl.load(lse + query_at, mask=there, other=0.0)
            sums = tl.where(sums == -float("inf"), 0.0, sums)
            shift = tl.load(delta + query_at, mask=there, other=0.0)
            s = tl.dot(k_NA, tl.trans(q_MA), input_precision=PRECISION)
            if EP > 0:
                q_ME = _load(q + A, query_at, K, there, E, EP)
                s = tl.dot(k_NE, tl.trans(q_ME), s, input_precision=PRECISION)
            p = tl.where(seen, tl.exp2((s * scale - sums[None, :]) * LOG2E), 0.0)
            dp = tl.dot(v_NV, tl.trans(do_MV), input_precision=PRECISION)
            ds = (p * (dp - shift[None, :]) * scale).to(q_MA.dtype)
            if APART:
                dv_NV += tl.dot(p.to(do_MV.dtype), do_MV, input_precision=PRECISION)
            else:
                dk_NA += tl.dot(p.to(do_MV.dtype), do_MV, input_precision=PRECISION)
            dk_NA += tl.dot(ds, q_MA, input_precision=PRECISION)
            if EP > 0:
                dk_NE += tl.dot(ds, q_ME, input_precision=PRECISION)
        at = ((group * items + item) * tl.num_programs(2) + sub) * BN + x
        all_rows = x < BN
        _store(dk, at, K, all_rows, dk_NA, A, AP)
        if EP > 0:
            _store(dk + A, at, K, all_rows, dk_NE, E, EP)
        if APART:
            _store(dv, at, V, all_rows, dv_NV, V, VP)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    parts,
    ends,
    out,
    S,
    G,
    slots,
    items,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum of the partial gradients of a slot, in order, as rows of (B, S, G, D)."""
    slot, sub = tl.program_id(0), tl.program_id(2)
    group = tl.program_id(1).to(tl.int64)
    b, g = group // G, group % G
    ends += group * slots
    first, end = tl.load(ends + slot - 1, mask=slot > 0, other=0), tl.load(ends + slot)
    x = tl.arange(0, BN)
    acc = tl.zeros((BN, DP), tl.float32)
    for item in range(first, end):
        acc += _load(parts, ((group * items + item) * tl.num_programs(2) + sub) * BN + x, D, x < BN, D, DP)
    token = slot * BLOCK + sub * BN + x
    _store(out + b * S * G * D + g * D, token.to(tl.int64), G * D, (sub * BN + x < BLOCK) & (token < S), acc, D, DP)


def _positions(share: int, R: int) -> int:
    """Positions whose blocks a program of queries reads together: those that share a selection, or as many as fill 16 rows."""
    return max(_shared(share), min(8, 1 << max(0, (16 // R).bit_length() - 1)))


def rows_together(share: int, R: int) -> int:
    """Rows of queries of a tile of ``selected_forward`` and ``selected_queries``."""
    return _padded(_positions(share, R) * R)


def _shared(share: int) -> int:
    """Positions of an entry of the lists of a block."""
    return share if share in (1, 2, 4) else 1


def _read_together(starts: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """(B·G, tiles, P·n) blocks that any of P positions selects, and how many; see :func:`_unite`."""
    B, T, G, n = starts.shape
    tiles = triton.cdiv(T, P)
    blocks = torch.empty(B * G, tiles, P * n, dtype=torch.int32, device=starts.device)
    counts = torch.empty(B * G, tiles, dtype=torch.int32, device=starts.device)
    NP = triton.next_power_of_2(n)
    _unite[(tiles, B * G)](starts, blocks, counts, T, G, n, P=P, NP=NP, num_warps=1 if NP <= 32 else 4)
    return blocks, counts


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    starts: Tensor,
    start_BT: Tensor,
    V: int,
    offset: int,
    block: int,
    share: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (B, T, H, _), (S, G), n = q.shape, k.shape[1:3], starts.shape[-1]
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=torch.float32)
    R, parts = H // G, _parts(q, v, V)
    P, M = _positions(share, R), rows_together(share, R)
    _selected_forward[(triton.cdiv(T, P), B * G)](
        q,
        k,
        k if v is None else v,
        *_read_together(starts, P),
        o,
        lse,
        T,
        S,
        H,
        G,
        n,
        offset,
        scale,
        R=R,
        P=P,
        M=M,
        BLOCK=block,
        **_settings("selected_forward", parts, M),
        **parts,
    )
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
    offset: int,
    block: int,
    share: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), (S, G), n = q.shape, k.shape[1:3], starts.shape[-1]
    R, device = H // G, q.device
    values = k if v is None else v
    delta, parts = _delta(do, o, dlse), _parts(q, v, V)
    dq, NP = torch.empty_like(q), triton.next_power_of_2(n)
    P, M = _positions(share, R), rows_together(share, R)
    _selected_queries[(triton.cdiv(T, P), B * G)](
        q,
        k,
        values,
        *_read_together(starts, P),
        do,
        lse,
        delta,
        dq,
        T,
        S,
        H,
        G,
        n,
        offset,
        scale,
        R=R,
        P=P,
        M=M,
        BLOCK=block,
        **_settings("selected_queries", parts, M),
        **parts,
    )
    share = _shared(share)
    tiles, slots = triton.cdiv(T, share), triton.cdiv(S, block)
    marks = torch.zeros(B * G, slots, tiles, dtype=torch.uint8, device=device)
    _mark[(tiles, B * G)](
        starts, start_BT, marks, T, tiles, slots, G, n, offset, SHARE=share, BLOCK=block, NP=NP, num_warps=1
    )
    counts = torch.empty(B * G, slots, dtype=torch.int32, device=device)
    room = min(slots * tiles, 2 * T * n)
    entries = torch.empty(B * G, room, dtype=torch.int32, device=device)
    listing: dict[str, Any] = {"SHARE": share, "BLOCK": block, "BM": min(4096, _padded(tiles)), "num_warps": 4}
    _list[(slots, B * G)](marks, counts, counts, entries, tiles, slots, room, offset, COUNT=True, **listing)
    reached = counts.cumsum(1, dtype=torch.int32)
    begins = (reached - counts).contiguous()
    _list[(slots, B * G)](marks, counts, begins, entries, tiles, slots, room, offset, COUNT=False, **listing)
    del marks
    sizes = (reached[:, -1] // ITEMS + 1).clamp_min(64)
    ends = ((counts + sizes[:, None] - 1) // sizes[:, None]).cumsum(1, dtype=torch.int32)
    items = min(ITEMS, room // 64 + 1) + slots
    BN = min(64, _padded(block))
    subs = triton.cdiv(block, BN)
    settings = _settings("selected_keys", parts, BN)
    at_once = max(1, settings.pop("ROWS") // (share * R))
    made: dict[str, Any] = {"dtype": torch.float32, "device": device}
    dk_parts = torch.empty(B * G, items, subs * BN, K, **made)
    dv_parts = dk_parts if v is None else torch.empty(B * G, items, subs * BN, V, **made)
    _selected_keys[(items, B * G, subs)](
        q,
        k,
        values,
        start_BT,
        do,
        lse,
        delta,
        entries,
        counts,
        begins,
        ends,
        sizes,
        dk_parts,
        dv_parts,
        T,
        S,
        H,
        G,
        slots,
        room,
        items,
        offset,
        scale,
        R=R,
        SHARE=share,
        M=_padded(at_once * share * R),
        TILES=at_once,
        BLOCK=block,
        BN=BN,
        STEPS=slots.bit_length(),
        **settings,
        **parts,
    )
    dk = torch.empty_like(k)
    _add_up[(slots, B * G, subs)](
        dk_parts, ends, dk, S, G, slots, items, D=K, DP=_padded(K), BLOCK=block, BN=BN, num_warps=4
    )
    if v is None:
        return dq, dk, k.new_empty(0)
    dv = torch.empty_like(v)
    _add_up[(slots, B * G, subs)](
        dv_parts, ends, dv, S, G, slots, items, D=V, DP=_padded(V), BLOCK=block, BN=BN, num_warps=4
    )
    return dq, dk, dv
