# mypy: allow-untyped-defs
"""The delta rule on GPUs: chunks of 64 tokens, everything of a chunk in parallel, one short scan over chunks for the states.

With ẽ = β e, z̃ = β z and G the running sum of g inside a chunk (the form of torch.py; DeltaNet's WY form, arXiv 2406.06484,
with channel-wise decay as in arXiv 2510.26692):

    T_rs = Σ_c ẽ_rc p_sc exp(G_rc - G_sc), s < r        M_rs = Σ_c q_rc p_sc exp(G_rc - G_sc), s <= r        A = (I + T)⁻¹
    Y = A (ẽ exp G)     U = A z̃     R = U - Y S     o = (q exp G) S + M R     S' = exp(G_C) S + (p exp(G_C - G))ᵀ R

Three choices are our own. Channel-wise decay inside a chunk goes by levels of halves: rows of an odd block of L tokens meet
columns of the even block before it, with the boundary between them as the reference, so every exponent is a sum of
non-positive terms and every level is one ordinary matrix product. Where no channel loses more than 64 nats between the middle
of a chunk and either end, the middle is the reference of all its pairs: one product instead of six. The inverse grows from blocks of 1 to blocks of 64 by
X <- X - X T_L X, T_L the part of T that joins two neighbours: no powers of T, so equal keys do no harm. The backward pass
makes Y, U and the states again; only A and M are kept.

Triton 3.4 to 3.7.0 compiles some products wrongly for Hopper GPUs (fla-org/flash-linear-attention, issues 640 and 984; seen
here with tiles of 32 key channels in the last kernel: an illegal access). Transposed matrices are therefore read from
memory, not made from the result of a product, and what is launched is what the tests have compared on a device.

Legend: B batch, T time, H heads, K key channels, V value channels, N chunks, C = 64 tokens of a chunk; X = B·H.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
LAUNCH = {
    "prepare": {"num_warps": 4, "num_stages": 1},
    "scan": {"num_warps": 4, "num_stages": 2},
    "output": {"num_warps": 4, "num_stages": 2},
    "local_gradient": {"num_warps": 4, "num_stages": 2},
    "scan_back": {"num_warps": 4, "num_stages": 1},
    "matrix_gradients": {"num_warps": 4, "num_stages": 2},
    "input_gradients": {"num_warps": 4, "num_stages": 1},
}
"""Warps and pipeline stages of every kernel: fixed, chosen by measurement on an H100, never searched at run time."""
BLOCK = 64
"""Key and value channels of one tile; smaller heads are padded to it. Programs of one chunk follow each other, so that what they
share is read from memory once."""
SCAN_COLUMNS = 32
"""Columns of the state that one program of a scan holds."""
FEW, DEEP = 128, 4
"""With fewer programs than FEW a scan waits for memory alone. It then fetches up to DEEP stages ahead, as many as the
device's shared memory holds; where many programs share an SM those stages would take room from them."""
SPREAD = tl.constexpr(64.0)
"""Most nats between the middle of a chunk and its ends for which the middle can be the reference of all its pairs: their two
factors, e^±64, stay far inside the range of bf16."""
INVERSE = "bf16x3"
"""Products that make the inverse from input of 16 bits: to 16 bits, so that its rounding to bf16 is the larger error even where
keys repeat and the inverse grows; half the work of "tf32x3"."""


@triton.jit
def _sums(chosen, x, PRECISION: tl.constexpr):
    """Σ_i chosen[r, i] x[i]: (C, C) of -1, 0 and 1, (C, D) fp32 -> (C, D); to 16 bits of the sum of magnitudes, or fp32."""
    if PRECISION == "tf32x3":
        return tl.dot(chosen.to(tl.float32), x, input_precision="tf32x3")
    else:
        ones = chosen.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(ones, high) + tl.dot(ones, low)


@triton.jit
def _load(x, rows, there, row_stride, columns, D):
    return tl.load(
        x + rows.to(tl.int64)[:, None] * row_stride + columns[None, :],
        mask=there[:, None] & (columns < D)[None, :],
        other=0.0,
    )


@triton.jit
def _scalar_decay(g, rows, there, H):
    """(C,) g and its running sum."""
    own = tl.load(g + rows.to(tl.int64) * H, mask=there, other=0.0).to(tl.float32)
    return own, tl.cumsum(own, axis=0)


@triton.jit
def _documents(segments, n, T, i, C: tl.constexpr, SEGMENTS: tl.constexpr):
    """(C, C) same document, (C,) rows of the document carried in, (C,) rows of the one carried out, whether it passes through."""
    if SEGMENTS:
        rows = n * C + i
        own = tl.load(segments + tl.minimum(rows, T - 1))
        before = tl.load(segments + tl.maximum(n * C - 1, 0))
        end = tl.load(segments + tl.minimum(n * C + C, T) - 1)
        return own[:, None] == own[None, :], own == before, own == end, before == end
    else:
        return (i >= 0)[:, None] & (i >= 0)[None, :], i >= 0, i >= 0, C > 0


@triton.jit
def _decays(
    g,
    rows,
    there,
    columns,
    i,
    enters,
    leaves,
    passes,
    H,
    K: tl.constexpr,
    CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """exp(G) where the row sees the carried state, exp(G_C - G) where it leaves something in it, (C, BK) both; exp(G_C), (BK,)."""
    if CHANNEL:
        own = _load(g, rows, there, H * K, columns, K).to(tl.float32)
        entering = tl.exp(_sums(i[:, None] >= i[None, :], own, PRECISION))
        leaving = tl.exp(_sums(i[:, None] < i[None, :], own, PRECISION))
        passing = tl.exp(tl.sum(own, axis=0))
    else:
        own, running = _scalar_decay(g, rows, there, H)
        total = tl.sum(own, axis=0)
        entering = tl.exp(running)[:, None] + tl.zeros_like(columns).to(tl.float32)[None, :]
        leaving = tl.exp(total - running)[:, None] + tl.zeros_like(columns).to(tl.float32)[None, :]
        passing = tl.exp(total) + tl.zeros_like(columns).to(tl.float32)
    return (
        tl.where(enters[:, None], entering, 0.0),
        tl.where(leaves[:, None], leaving, 0.0),
        tl.where(passes, passing, 0.0),
    )


@triton.jit
def _joins(row, column, level):
    """Whether the row is in an odd block and the column in the even one before it."""
    block = row >> level
    return ((block & 1) == 1) & (block - 1 == (column >> level))


@triton.jit
def _pairs(row, column, level, whole):
    """Pairs of tokens that a level serves, all of the chunk's with ``whole``."""
    return tl.where(whole, (row > column).to(tl.int32), _joins(row, column, level).to(tl.int32)) != 0


@triton.jit
def _is_whole(own, i, C: tl.constexpr, dtype: tl.constexpr):
    """Whether no channel loses more than SPREAD between the middle of the chunk and either end."""
    early = tl.sum(tl.where((i < C // 2)[:, None], own, 0.0), axis=0)
    late = tl.sum(tl.where((i < C // 2)[:, None], 0.0, own), axis=0)
    most = 0.0 if dtype == tl.float16 else SPREAD  # fp16 has no exponents for it
    return tl.min(tl.minimum(early, late), axis=0) >= -most


@triton.jit
def _factors(own, i, level, whole, PRECISION: tl.constexpr):
    """(C, BK) decay of a row since the boundary of its pair of blocks, and of a column up to it; > 1 on the boundary's other
    side with ``whole``, where their product is the decay between two tokens all the same."""
    block = i >> level
    since = ((block & 1) == 1)[:, None]
    sign = tl.where(since, (i[None, :] <= i[:, None]).to(tl.int32), -(i[None, :] > i[:, None]).to(tl.int32))
    way = _sums(tl.where(block[:, None] == block[None, :], sign, 0), own, PRECISION)
    most = tl.where(whole, SPREAD + 1, 0.0)
    return tl.exp(tl.minimum(way, most)), tl.exp(tl.minimum(-way, most))


@triton.jit
def _prepare(
    q,
    p,
    e,
    z,
    g,
    strength,
    segments,
    A,
    M,
    Qin,
    Y,
    U,
    Pout,
    passing,
    T,
    N,
    z_batch,
    z_row,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHANNEL: tl.constexpr,
    STRENGTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SOLVE: tl.constexpr,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Everything of a chunk that does not need its incoming state. With SOLVE makes A and M, otherwise reads A."""
    n, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = x // H, x % H
    dtype = q.dtype.element_ty
    i = tl.arange(0, C)
    rows, inner = n * C + i, n * C + i + x * N * C
    there = rows < T
    first = b * T * H + h
    q += first * K
    p += first * K
    e += first * K
    z += b * z_batch + h * V
    g += first * K if CHANNEL else first
    same, enters, leaves, passes = _documents(segments + b * T, n, T, i, C, SEGMENTS)
    beta = tl.full((C,), 1.0, tl.float32)
    if STRENGTH:
        beta = tl.load(strength + first + rows.to(tl.int64) * H, mask=there, other=0.0).to(tl.float32)
    if SOLVE:
        t = tl.zeros((C, C), tl.float32)
        m = tl.zeros((C, C), tl.float32)
        own_m = tl.zeros((C,), tl.float32)
        for k in range(0, K, BK):
            columns = k + tl.arange(0, BK)
            q_k = _load(q, rows, there, H * K, columns, K)
            p_k = _load(p, rows, there, H * K, columns, K)
            e_k = _load(e, rows, there, H * K, columns, K)
            if CHANNEL:
                own = _load(g, rows, there, H * K, columns, K).to(tl.float32)
                whole = _is_whole(own, i, C, dtype)
                for level in range(tl.where(whole, 5, 0), 6):
                    since, until = _factors(own, i, level, whole, PRECISION)
                    pairs = _pairs(i[:, None], i[None, :], level, whole)
                    p_l = tl.trans((p_k * until).to(dtype))
                    t += tl.where(pairs, tl.dot((e_k * since).to(dtype), p_l, input_precision=PRECISION), 0.0)
                    m += tl.where(pairs, tl.dot((q_k * since).to(dtype), p_l, input_precision=PRECISION), 0.0)
                own_m += tl.sum(q_k.to(tl.float32) * p_k.to(tl.float32), axis=1)
            else:
                t += tl.dot(e_k, tl.trans(p_k), input_precision=PRECISION)
                m += tl.dot(q_k, tl.trans(p_k), input_precision=PRECISION)
        causal = i[:, None] >= i[None, :]
        if CHANNEL:
            m += tl.where(i[:, None] == i[None, :], own_m[:, None], 0.0)
        else:
            _, running = _scalar_decay(g, rows, there, H)
            decay = tl.exp(tl.where(causal, running[:, None] - running[None, :], 0.0))
            t *= decay
            m *= decay
        t = tl.where((i[:, None] > i[None, :]) & same, t * beta[:, None], 0.0)
        m = tl.where(causal & same, m, 0.0)
        a = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(_joins(i[:, None], i[None, :], 0), t, 0.0)
        for level in range(1, 6):
            part = tl.where(_joins(i[:, None], i[None, :], level), t, 0.0)
            a -= tl.dot(tl.dot(a, part, input_precision=INVERSE), a, input_precision=INVERSE)
        a = a.to(dtype)
        tl.store(A + inner[:, None] * C + i[None, :], a)
        tl.store(M + inner[:, None] * C + i[None, :], m.to(dtype))
    else:
        a = tl.load(A + inner[:, None] * C + i[None, :])
    for k in range(0, K, BK):
        columns = k + tl.arange(0, BK)
        here = (columns < K)[None, :]
        entering, leaving, through = _decays(
            g, rows, there, columns, i, enters, leaves, passes, H, K, CHANNEL, PRECISION
        )
        e_k = _load(e, rows, there, H * K, columns, K)
        y = tl.dot(a, (e_k * entering * beta[:, None]).to(dtype), input_precision=PRECISION)
        at = inner[:, None] * K + columns[None, :]
        tl.store(Y + at, y.to(dtype), mask=here)
        tl.store(Qin + at, (_load(q, rows, there, H * K, columns, K) * entering).to(dtype), mask=here)
        tl.store(Pout + at, (_load(p, rows, there, H * K, columns, K) * leaving).to(dtype), mask=here)
        tl.store(passing + (x * N + n) * K + columns, through, mask=columns < K)
    for v in range(0, V, BV):
        columns = v + tl.arange(0, BV)
        z_v = (_load(z, rows, there, z_row, columns, V) * beta[:, None]).to(dtype)
        u = tl.dot(a, z_v, input_precision=PRECISION)
        tl.store(U + inner[:, None] * V + columns[None, :], u.to(dtype), mask=(columns < V)[None, :])


@triton.jit
def _scan(
    Y,
    U,
    Pout,
    passing,
    R,
    states,
    start,
    end,
    N,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    START: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk: the state before each, and R. A program holds BV columns of one head's state."""
    v, x = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    dtype = Y.dtype.element_ty
    i, k = tl.arange(0, C), tl.arange(0, KP)
    in_k, in_v = k < K, (v < V)[None, :]
    at = x * K * V + k[:, None] * V + v[None, :]
    held = in_k[:, None] & in_v
    state = tl.zeros((KP, BV), tl.float32)
    if START:
        state += tl.load(start + at, mask=held, other=0.0)
    passing += x * N * K + k
    through = tl.load(passing, mask=in_k, other=0.0)
    for n in range(N):
        # a load that is no factor of a product is not fetched ahead by the compiler: the step would wait for it
        following = tl.load(passing + tl.minimum(n + 1, N - 1) * K, mask=in_k, other=0.0)
        inner = (x * N + n) * C + i
        tl.store(states + (x * N + n) * K * V + k[:, None] * V + v[None, :], state.to(dtype), mask=held)
        y = tl.load(Y + inner[:, None] * K + k[None, :], mask=in_k[None, :], other=0.0)
        u = tl.load(U + inner[:, None] * V + v[None, :], mask=in_v, other=0.0)
        r = (u - tl.dot(y, state.to(dtype), input_precision=PRECISION)).to(dtype)
        tl.store(R + inner[:, None] * V + v[None, :], r, mask=in_v)
        p_T = tl.load(Pout + inner[None, :] * K + k[:, None], mask=in_k[:, None], other=0.0)
        state = state * through[:, None] + tl.dot(p_T, r, input_precision=PRECISION)
        through = following
    tl.store(end + at, state, mask=held)


@triton.jit
def _output(
    Qin,
    M,
    R,
    states,
    o,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, x = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    rows, inner = n * C + i, n * C + i + x * N * C
    in_v = (v < V)[None, :]
    m = tl.load(M + inner[:, None] * C + i[None, :])
    r = tl.load(R + inner[:, None] * V + v[None, :], mask=in_v, other=0.0)
    out = tl.dot(m, r, input_precision=PRECISION)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        q_in = tl.load(Qin + inner[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        state = tl.load(
            states + (x * N + n) * K * V + k[:, None] * V + v[None, :], mask=(k < K)[:, None] & in_v, other=0.0
        )
        out += tl.dot(q_in, state, input_precision=PRECISION)
    at = o + ((x // H) * T * H + x % H) * V + rows.to(tl.int64)[:, None] * H * V + v[None, :]
    tl.store(at, out.to(o.dtype.element_ty), mask=(rows < T)[:, None] & in_v)


@triton.jit
def _local_gradient(
    M,
    do,
    dR,
    T,
    N,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dR = Mᵀ do, the part of dR that comes from the chunk itself."""
    n, x = tl.program_id(1), tl.program_id(2).to(tl.int64)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    rows, inner = n * C + i, n * C + i + x * N * C
    m_T = tl.load(M + inner[None, :] * C + i[:, None])
    do_v = _load(do + ((x // H) * T * H + x % H) * V, rows, rows < T, H * V, v, V)
    dr = tl.dot(m_T, do_v, input_precision=PRECISION)
    tl.store(dR + inner[:, None] * V + v[None, :], dr.to(dR.dtype.element_ty), mask=(v < V)[None, :])


@triton.jit
def _scan_back(
    Qin,
    Y,
    Pout,
    passing,
    do,
    dR,
    dstates,
    dend,
    dstart,
    T,
    N,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    BV: tl.constexpr,
    END: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: the gradient of the state behind each, and dR completed in place."""
    v, x = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    dtype = Y.dtype.element_ty
    i, k = tl.arange(0, C), tl.arange(0, KP)
    in_k, in_v = k < K, (v < V)[None, :]
    at = x * K * V + k[:, None] * V + v[None, :]
    held = in_k[:, None] & in_v
    do += ((x // H) * T * H + x % H) * V
    dstate = tl.zeros((KP, BV), tl.float32)
    if END:
        dstate += tl.load(dend + at, mask=held, other=0.0)
    passing += x * N * K + k
    dR += x * N * C * V + i[:, None] * V + v[None, :]
    through = tl.load(passing + (N - 1) * K, mask=in_k, other=0.0)
    dr_local = tl.load(dR + (N - 1) * C * V, mask=in_v, other=0.0)
    for back in range(N):
        n = N - 1 - back
        before = tl.maximum(n - 1, 0)
        following = tl.load(passing + before * K, mask=in_k, other=0.0)
        dr_following = tl.load(dR + before * C * V, mask=in_v, other=0.0)
        rows, inner = n * C + i, (x * N + n) * C + i
        tl.store(dstates + (x * N + n) * K * V + k[:, None] * V + v[None, :], dstate.to(dtype), mask=held)
        p_out = tl.load(Pout + inner[:, None] * K + k[None, :], mask=in_k[None, :], other=0.0)
        dr = (dr_local.to(tl.float32) + tl.dot(p_out, dstate.to(dtype), input_precision=PRECISION)).to(dtype)
        tl.store(dR + n * C * V, dr, mask=in_v)
        q_T = tl.load(Qin + inner[None, :] * K + k[:, None], mask=in_k[:, None], other=0.0)
        y_T = tl.load(Y + inner[None, :] * K + k[:, None], mask=in_k[:, None], other=0.0)
        do_v = _load(do, rows, rows < T, H * V, v, V)
        dstate = dstate * through[:, None] + tl.dot(q_T, do_v, input_precision=PRECISION)
        dstate -= tl.dot(y_T, dr, input_precision=PRECISION)
        through, dr_local = following, dr_following
    tl.store(dstart + at, dstate, mask=held)


@triton.jit
def _matrix_gradients(
    z,
    strength,
    segments,
    A,
    Y,
    U,
    R,
    states,
    do,
    dR,
    dT,
    dM,
    dz,
    dstrength,
    T,
    N,
    z_batch,
    z_row,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STRENGTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dM = do Rᵀ; dz̃ = Aᵀ dR; dT = -(dz̃ Uᵀ + (Aᵀ dY) Yᵀ) with dY = -dR Sᵀ, which is -Aᵀ dA Aᵀ."""
    n, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = x // H, x % H
    dtype = Y.dtype.element_ty
    i = tl.arange(0, C)
    rows, inner = n * C + i, n * C + i + x * N * C
    there = rows < T
    first = b * T * H + h
    z += b * z_batch + h * V
    do += first * V
    same, _, _, _ = _documents(segments + b * T, n, T, i, C, SEGMENTS)
    beta = tl.full((C,), 1.0, tl.float32)
    if STRENGTH:
        beta = tl.load(strength + first + rows.to(tl.int64) * H, mask=there, other=0.0).to(tl.float32)
    a_T = tl.load(A + inner[None, :] * C + i[:, None])
    dm = tl.zeros((C, C), tl.float32)
    w = tl.zeros((C, C), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        in_v = v < V
        r_T = tl.load(R + inner[None, :] * V + v[:, None], mask=in_v[:, None], other=0.0)
        dm += tl.dot(_load(do, rows, there, H * V, v, V), r_T, input_precision=PRECISION)
        dr = tl.load(dR + inner[:, None] * V + v[None, :], mask=in_v[None, :], other=0.0)
        dz_v = tl.dot(a_T, dr, input_precision=PRECISION)
        u_T = tl.load(U + inner[None, :] * V + v[:, None], mask=in_v[:, None], other=0.0)
        w += tl.dot(dz_v.to(dtype), u_T, input_precision=PRECISION)
        if STRENGTH:
            db += tl.sum(dz_v * _load(z, rows, there, z_row, v, V).to(tl.float32), axis=1)
        at = dz + first * V + rows.to(tl.int64)[:, None] * H * V + v[None, :]
        tl.store(at, (dz_v * beta[:, None]).to(dtype), mask=there[:, None] & in_v[None, :])
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        in_k = k < K
        dy = tl.zeros((C, BK), tl.float32)
        for v0 in range(0, V, BV):
            v = v0 + tl.arange(0, BV)
            dr = tl.load(dR + inner[:, None] * V + v[None, :], mask=(v < V)[None, :], other=0.0)
            state_T = tl.load(
                states + (x * N + n) * K * V + k[None, :] * V + v[:, None],
                mask=in_k[None, :] & (v < V)[:, None],
                other=0.0,
            )
            dy -= tl.dot(dr, state_T, input_precision=PRECISION)
        de = tl.dot(a_T, dy.to(dtype), input_precision=PRECISION)
        y_T = tl.load(Y + inner[None, :] * K + k[:, None], mask=in_k[:, None], other=0.0)
        w += tl.dot(de.to(dtype), y_T, input_precision=PRECISION)
    square = inner[:, None] * C + i[None, :]
    tl.store(dT + square, tl.where((i[:, None] > i[None, :]) & same, -w, 0.0).to(dtype))
    tl.store(dM + square, tl.where((i[:, None] >= i[None, :]) & same, dm, 0.0).to(dtype))
    if STRENGTH:
        tl.store(dstrength + first + rows.to(tl.int64) * H, db, mask=there)


@triton.jit
def _input_gradients(
    q,
    p,
    e,
    g,
    strength,
    segments,
    A,
    R,
    states,
    dstates,
    do,
    dR,
    dT,
    dM,
    dq,
    dp,
    de,
    dg,
    dstrength,
    T,
    N,
    parts,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    CHANNEL: tl.constexpr,
    STRENGTH: tl.constexpr,
    TIED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, p, e, g and the strength for BK channels of one chunk.

    dG = ẽ dẽ + q dq - p dp, and at the chunk's last row what G_C gives; dg is its sum over the rows behind. There what a pair of
    tokens gives its two rows must cancel where both lie behind. For decays a channel the factors of a pair are therefore taken as
    the products that made it saw them, rounded, in both rows; the chunk's own pairs of a decay a head cancel as they are.
    """
    n, x = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = x // H, x % H
    dtype = q.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    k = part * BK + tl.arange(0, BK)
    in_k = k < K
    i = tl.arange(0, C)
    rows, inner = n * C + i, n * C + i + x * N * C
    there = rows < T
    first = b * T * H + h
    q += first * K
    p += first * K
    e += first * K
    do += first * V
    g += first * K if CHANNEL else first
    _, enters, leaves, passes = _documents(segments + b * T, n, T, i, C, SEGMENTS)
    beta = tl.full((C,), 1.0, tl.float32)
    if STRENGTH:
        beta = tl.load(strength + first + rows.to(tl.int64) * H, mask=there, other=0.0).to(tl.float32)

    dq_k = tl.zeros((C, BK), tl.float32)
    dy = tl.zeros((C, BK), tl.float32)
    dp_k = tl.zeros((C, BK), tl.float32)
    dthrough = tl.zeros((BK,), tl.float32)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        in_v = v < V
        at = (x * N + n) * K * V + k[None, :] * V + v[:, None]
        state_T = tl.load(states + at, mask=in_k[None, :] & in_v[:, None], other=0.0)
        dstate_T = tl.load(dstates + at, mask=in_k[None, :] & in_v[:, None], other=0.0)
        dthrough += tl.sum(state_T.to(tl.float32) * dstate_T.to(tl.float32), axis=0)
        dq_k += tl.dot(_load(do, rows, there, H * V, v, V), state_T, input_precision=PRECISION)
        dr = tl.load(dR + inner[:, None] * V + v[None, :], mask=in_v[None, :], other=0.0)
        dy -= tl.dot(dr, state_T, input_precision=PRECISION)
        r = tl.load(R + inner[:, None] * V + v[None, :], mask=in_v[None, :], other=0.0)
        dp_k += tl.dot(r, dstate_T, input_precision=PRECISION)
    a_T = tl.load(A + inner[None, :] * C + i[:, None])
    de_k = tl.dot(a_T, dy.to(dtype), input_precision=PRECISION)
    q_k = _load(q, rows, there, H * K, k, K)
    p_k = _load(p, rows, there, H * K, k, K)
    e_k = _load(e, rows, there, H * K, k, K)
    edit = e_k * beta[:, None]
    entering, leaving, through = _decays(g, rows, there, k, i, enters, leaves, passes, H, K, CHANNEL, PRECISION)
    dq_k *= entering
    de_k *= entering
    dp_k *= leaving
    dlast = tl.sum(p_k * dp_k, axis=0) + through * dthrough

    square, square_T = inner[:, None] * C + i[None, :], inner[None, :] * C + i[:, None]
    if CHANNEL:
        dG = edit * de_k + q_k * dq_k - p_k * dp_k
        own = _load(g, rows, there, H * K, k, K).to(tl.float32)
        whole = _is_whole(own, i, C, dtype)
        for level in range(tl.where(whole, 5, 0), 6):
            since, until = _factors(own, i, level, whole, PRECISION)
            pairs = _pairs(i[:, None], i[None, :], level, whole)
            pairs_T = _pairs(i[None, :], i[:, None], level, whole)
            p_l = (p_k * until).to(dtype)
            e_l, q_l = (edit * since).to(dtype), (q_k * since).to(dtype)
            # rows and columns of other pairs get zeros from these products
            de_l = tl.dot(tl.load(dT + square, mask=pairs, other=0.0), p_l, input_precision=PRECISION)
            dG += e_l * de_l
            de_k += since * de_l
            dq_l = tl.dot(tl.load(dM + square, mask=pairs, other=0.0), p_l, input_precision=PRECISION)
            dG += q_l * dq_l
            dq_k += since * dq_l
            dp_l = tl.dot(tl.load(dT + square_T, mask=pairs_T, other=0.0), e_l, input_precision=PRECISION)
            dp_l += tl.dot(tl.load(dM + square_T, mask=pairs_T, other=0.0), q_l, input_precision=PRECISION)
            dG -= p_l * dp_l
            dp_k += until * dp_l
        own_m = tl.load(dM + inner * C + i).to(tl.float32)[:, None]
        dq_k += own_m * p_k
        dp_k += own_m * q_k
    else:
        _, running = _scalar_decay(g, rows, there, H)
        causal = i[:, None] >= i[None, :]
        decay = tl.exp(tl.where(causal, running[:, None] - running[None, :], 0.0))
        decay_T = tl.exp(tl.where(i[:, None] <= i[None, :], running[None, :] - running[:, None], 0.0))
        de_k += tl.dot((tl.load(dT + square) * decay).to(dtype), p_k, input_precision=PRECISION)
        dq_k += tl.dot((tl.load(dM + square) * decay).to(dtype), p_k, input_precision=PRECISION)
        dp_k += tl.dot((tl.load(dT + square_T) * decay_T).to(dtype), edit.to(dtype), input_precision=PRECISION)
        dp_k += tl.dot((tl.load(dM + square_T) * decay_T).to(dtype), q_k, input_precision=PRECISION)
        dG = edit * de_k + q_k * dq_k - p_k * dp_k

    dG += tl.where((i == C - 1)[:, None], dlast[None, :], 0.0)
    out = first * K + rows.to(tl.int64)[:, None] * H * K + k[None, :]
    here = there[:, None] & in_k[None, :]
    partial = part * parts + first + rows.to(tl.int64) * H
    if CHANNEL:
        tl.store(dg + out, _sums(i[:, None] <= i[None, :], dG, PRECISION), mask=here)
    else:
        tl.store(dg + partial, tl.cumsum(tl.sum(dG, axis=1), axis=0, reverse=True), mask=there)
    if STRENGTH:
        tl.store(dstrength + partial, tl.sum(e_k * de_k, axis=1), mask=there)
        de_k *= beta[:, None]
    if TIED:
        dp_k += de_k
    else:
        tl.store(de + out, de_k.to(dtype), mask=here)
    tl.store(dq + out, dq_k.to(dtype), mask=here)
    tl.store(dp + out, dp_k.to(dtype), mask=here)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":  # the interpreter
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


class _Launch:
    """Sizes, buffers and launches of one call. Block sizes and warps are fixed by shape, never searched."""

    def __init__(
        self,
        q: Tensor,
        p: Tensor,
        z: Tensor,
        g: Tensor,
        e: Tensor | None,
        strength: Tensor | None,
        segments: Tensor | None,
    ):
        self.B, self.T, self.H, self.K = q.shape
        self.V = z.shape[-1]
        self.N = triton.cdiv(self.T, CHUNK)
        self.q, self.p, self.g = (x.contiguous() for x in (q, p, g))
        # values are often a part of a wider tensor: read where they stand
        self.z = z if z.stride(3) == 1 and z.stride(2) == self.V else z.contiguous()
        self.z_strides = self.z.stride()[:2]
        self.e = self.p if e is None else e.contiguous()
        self.tied = e is None
        self.strength = self.g if strength is None else strength.contiguous()
        self.segments = self.g if segments is None else segments.contiguous()
        self.flags = {"STRENGTH": strength is not None, "SEGMENTS": segments is not None}
        self.channel = g.dim() == 4
        self.sizes = {"H": self.H, "K": self.K, "V": self.V, "C": CHUNK}
        self.precision = {"PRECISION": "tf32x3" if z.dtype == torch.float32 else "tf32"}

    def inner(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(B·H, N·C, width) in the type of z."""
        return self.z.new_empty(self.B * self.H, self.N * CHUNK, width, dtype=dtype)

    def states(self) -> Tensor:
        return self.z.new_empty(self.B * self.H, self.N, self.K, self.V)

    def scan_launch(self, name: str) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid, and block sizes and options of a scan."""
        KP, BV = max(BLOCK, triton.next_power_of_2(self.K)), min(BLOCK, SCAN_COLUMNS)
        grid = (triton.cdiv(self.V, BV), self.B * self.H)
        options = LAUNCH[name]
        if grid[0] * grid[1] < FEW:
            stage = CHUNK * ((2 if name == "scan" else 3) * KP + BV) * self.z.element_size()
            stages = min(DEEP, (_shared_memory(self.z.device) - 2**14) // stage)  # 2**14: the state and what is written
            options = {**options, "num_stages": max(stages, options["num_stages"])}
        return grid, {"KP": KP, "BV": BV, **options}

    def chunks(self, A: Tensor, M: Tensor, *, solve: bool) -> tuple[Tensor, ...]:
        """Qin, Y, U, Pout, passing; with ``solve`` A and M are written."""
        buffers = (self.inner(self.K), self.inner(self.K), self.inner(self.V), self.inner(self.K))
        passing = self.z.new_empty(self.B * self.H, self.N, self.K, dtype=torch.float32)
        _prepare[(self.N, self.B * self.H)](
            self.q,
            self.p,
            self.e,
            self.z,
            self.g,
            self.strength,
            self.segments,
            A,
            M,
            *buffers,
            passing,
            self.T,
            self.N,
            *self.z_strides,
            **self.sizes,
            BK=BLOCK,
            BV=BLOCK,
            CHANNEL=self.channel,
            SOLVE=solve,
            INVERSE=INVERSE if self.z.element_size() == 2 else "tf32x3",
            **self.flags,
            **self.precision,
            **LAUNCH["prepare"],
        )
        return (*buffers, passing)

    def scan(
        self, Y: Tensor, U: Tensor, Pout: Tensor, passing: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """R, the states before every chunk, the state after the last."""
        R, states = self.inner(self.V), self.states()
        end = self.z.new_empty(self.B, self.H, self.K, self.V, dtype=torch.float32)
        grid, options = self.scan_launch("scan")
        _scan[grid](
            Y,
            U,
            Pout,
            passing,
            R,
            states,
            end if state is None else state.contiguous(),
            end,
            self.N,
            K=self.K,
            V=self.V,
            C=CHUNK,
            START=state is not None,
            **self.precision,
            **options,
        )
        return R, states, end


@torch.library.custom_op("workbench::delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    p: Tensor,
    z: Tensor,
    g: Tensor,
    e: Tensor | None,
    strength: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = _Launch(q, p, z, g, e, strength, segments)
    A, M = launch.inner(CHUNK), launch.inner(CHUNK)
    Qin, Y, U, Pout, passing = launch.chunks(A, M, solve=True)
    R, states, end = launch.scan(Y, U, Pout, passing, state)
    o = z.new_empty(z.shape)
    _output[(triton.cdiv(launch.V, BLOCK), launch.N, launch.B * launch.H)](
        Qin,
        M,
        R,
        states,
        o,
        launch.T,
        launch.N,
        **launch.sizes,
        BK=BLOCK,
        BV=BLOCK,
        **launch.precision,
        **LAUNCH["output"],
    )
    return o, end, A, M


@_forward.register_fake
def _(q, p, z, g, e, strength, state, segments):
    B, T, H, K = q.shape
    square = z.new_empty(B * H, -(-T // CHUNK) * CHUNK, CHUNK)
    return (
        z.new_empty(z.shape),
        z.new_empty(B, H, K, z.shape[-1], dtype=torch.float32),
        square,
        torch.empty_like(square),
    )


@torch.library.custom_op("workbench::delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dend: Tensor | None,
    q: Tensor,
    p: Tensor,
    z: Tensor,
    g: Tensor,
    e: Tensor | None,
    strength: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    A: Tensor,
    M: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, p, z, g, e (empty where tied), strength (empty where none), state."""
    launch = _Launch(q, p, z, g, e, strength, segments)
    B, T, H, K = q.shape
    N, V, chunks = launch.N, launch.V, (launch.N, B * H)
    do = do.contiguous()
    Qin, Y, U, Pout, passing = launch.chunks(A, M, solve=False)
    R, states, _ = launch.scan(Y, U, Pout, passing, state)
    dR, dstates = launch.inner(V), launch.states()
    dstart = z.new_empty(B, H, K, V, dtype=torch.float32)
    _local_gradient[(triton.cdiv(V, BLOCK), *chunks)](
        M,
        do,
        dR,
        T,
        N,
        H=H,
        V=V,
        C=CHUNK,
        BV=BLOCK,
        **launch.precision,
        **LAUNCH["local_gradient"],
    )
    grid, options = launch.scan_launch("scan_back")
    _scan_back[grid](
        Qin,
        Y,
        Pout,
        passing,
        do,
        dR,
        dstates,
        dstart if dend is None else dend.contiguous(),
        dstart,
        T,
        N,
        **launch.sizes,
        END=dend is not None,
        **launch.precision,
        **options,
    )
    dT, dM = launch.inner(CHUNK), launch.inner(CHUNK)
    dz = z.new_empty(z.shape)
    parts = triton.cdiv(K, BLOCK)
    # one part more than there are blocks of channels: what the strength gets from z
    dstrength = z.new_empty(parts + 1 if strength is not None else 0, B, T, H, dtype=torch.float32)
    _matrix_gradients[chunks](
        launch.z,
        launch.strength,
        launch.segments,
        A,
        Y,
        U,
        R,
        states,
        do,
        dR,
        dT,
        dM,
        dz,
        dstrength[-1] if strength is not None else dstrength,
        T,
        N,
        *launch.z_strides,
        **launch.sizes,
        BK=BLOCK,
        BV=BLOCK,
        **launch.flags,
        **launch.precision,
        **LAUNCH["matrix_gradients"],
    )
    dq, dp = q.new_empty(q.shape), p.new_empty(p.shape)
    de = q.new_empty(0 if launch.tied else q.shape)
    dg = g.new_empty(g.shape if launch.channel else (parts, B, T, H), dtype=torch.float32)
    _input_gradients[(parts, *chunks)](
        launch.q,
        launch.p,
        launch.e,
        launch.g,
        launch.strength,
        launch.segments,
        A,
        R,
        states,
        dstates,
        do,
        dR,
        dT,
        dM,
        dq,
        dp,
        de,
        dg,
        dstrength,
        T,
        N,
        B * T * H,
        **launch.sizes,
        BK=BLOCK,
        BV=BLOCK,
        CHANNEL=launch.channel,
        TIED=launch.tied,
        **launch.flags,
        **launch.precision,
        **LAUNCH["input_gradients"],
    )
    if not launch.channel:
        dg = dg.sum(0)
    dstrength = dstrength.sum(0) if strength is not None else dstrength
    return dq, dp, dz, dg.to(g.dtype), de, dstrength.to(z.dtype if strength is None else strength.dtype), dstart


@_backward.register_fake
def _(do, dend, q, p, z, g, e, strength, state, segments, A, M):
    B, T, H, K = q.shape
    return (
        q.new_empty(q.shape),
        p.new_empty(p.shape),
        z.new_empty(z.shape),
        g.new_empty(g.shape),
        q.new_empty(0 if e is None else q.shape),
        z.new_empty(0, B, T, H) if strength is None else strength.new_empty(strength.shape),
        z.new_empty(B, H, K, z.shape[-1], dtype=torch.float32),
    )


def _keep(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[2:])


def _autograd(ctx, do, dend, dA, dM):
    q, p, z, g, e, strength, state, segments, A, M = ctx.saved_tensors
    do = torch.zeros_like(z) if do is None else do
    dq, dp, dz, dg, de, dstrength, dstate = _backward(do, dend, q, p, z, g, e, strength, state, segments, A, M)
    return (
        dq,
        dp,
        dz,
        dg,
        *(None if x is None else y for x, y in ((e, de), (strength, dstrength), (state, dstate))),
        None,
    )


_forward.register_autograd(_autograd, setup_context=_keep)


def delta_rule_triton(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of :func:`workbench.ops.delta_rule.delta_rule`; q, p and e are taken to the type of z."""
    q_BTHK, write_key_BTHK = q_BTHK.to(value_BTHV.dtype), write_key_BTHK.to(value_BTHV.dtype)
    erase_key_BTHK = None if erase_key_BTHK is None else erase_key_BTHK.to(value_BTHV.dtype)
    if g is None:
        g = torch.zeros(q_BTHK.shape[:3], device=q_BTHK.device)
    if state_BHKV is not None:
        state_BHKV = state_BHKV.float()
    o, end, _, _ = _forward(q_BTHK, write_key_BTHK, value_BTHV, g, erase_key_BTHK, beta_BTH, state_BHKV, segments)
    return o, end
