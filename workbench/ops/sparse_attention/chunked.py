"""The forms that run anywhere, chunk by chunk over queries: scores of one chunk are held, never all of them.

Sums and softmax in fp32 (fp64 for fp64 input). A query that sees nothing gives zero, a log-sum-exp of -inf and no gradient.

Legend: B batch, T queries, S keys, N slots of blocks, H query heads, G key–value heads, R = H / G, K key channels, V value
channels, C queries of a chunk, M gathered tokens, n blocks, J selection blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.sparse_attention.layout import block_overlaps

CHUNK_BYTES = 2**26
"""Largest size of one tensor of a chunk."""

DENSE = 4
"""Keys for every selected token up to which all keys are multiplied and masked instead of gathering the selected ones: matrix
products are so much quicker than gathers on a CPU (our estimate)."""


def _spans(T: int, bytes_a_query: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // max(1, bytes_a_query))
    for first in range(0, T, step):
        yield slice(first, min(T, first + step))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def bounds(start_BT: Tensor, rows_BT: Tensor, length: int, stride: int, window: int) -> tuple[Tensor, Tensor]:
    """First visible slot and the one behind the last, (B, T) each."""
    p_BT = rows_BT - start_BT
    count_BT = torch.where(p_BT + 1 >= length, (p_BT + 1 - length) // stride + 1, 0)
    low_BT = start_BT // stride
    high_BT = low_BT + count_BT
    if window:
        low_BT = torch.maximum(low_BT, high_BT - window)
    return low_BT, high_BT


def _rows(start_BT: Tensor, offset: int) -> Tensor:
    T = start_BT.shape[1]
    return torch.arange(offset, offset + T, device=start_BT.device, dtype=start_BT.dtype).expand_as(start_BT)


def _grouped(x_BTHC: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, C) -> (B, G, R, T, C)"""
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, G, H // G, C).permute(0, 2, 3, 1, 4).to(dtype)


def _flat(x_BGRTC: Tensor) -> Tensor:
    """(B, G, R, T, C) -> (B, T, H, C)"""
    return x_BGRTC.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the seen keys, and their log-sum-exp; zero and -inf where nothing is seen."""
    lse = scores.masked_fill(~seen, -math.inf).logsumexp(-1)
    return _probabilities(scores, seen, lse), lse


def _probabilities(scores: Tensor, seen: Tensor, lse: Tensor) -> Tensor:
    return torch.where(seen, (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp(), 0.0)


def _slope(p: Tensor, dp: Tensor, delta: Tensor, capped: Tensor, softcap: float) -> Tensor:
    """Gradient of the uncapped scores."""
    ds = p * (dp - delta[..., None])
    return ds * (1 - (capped / softcap).square()) if softcap else ds


Seen = Callable[[slice], Tensor]
"""Which keys the queries of a chunk see, broadcastable to (B, G, R, C, N)."""


def _masked_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    (B, T, H, _), (N, G), V, wide = q.shape, k.shape[1:3], v.shape[-1], _wide(q)
    o, lse = q.new_zeros(B, T, H, V), q.new_full((B, T, H), -math.inf, dtype=wide)
    k, v = k.to(wide), v.to(wide)
    for span in _spans(T if N else 0, B * H * N * wide.itemsize):
        s = _capped(torch.einsum("bgrck,bngk->bgrcn", _grouped(q[:, span], G, wide), k) * scale, softcap)
        p, sums = _softmax(s, seen(span))
        o[:, span] = _flat(torch.einsum("bgrcn,bngv->bgrcv", p, v))
        lse[:, span] = _flat(sums[..., None])[..., 0]
    return o, lse


def _masked_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    seen: Seen,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), (N, G), wide = q.shape, k.shape[1:3], _wide(q)
    dq, dk, dv = torch.zeros_like(q), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    kw, vw = k.to(wide), v.to(wide)
    for span in _spans(T if N else 0, B * H * N * wide.itemsize):
        qg, og, dog = (_grouped(x[:, span], G, wide) for x in (q, o, do))
        lg, dlg = (_grouped(x[:, span, :, None], G, wide)[..., 0] for x in (lse, dlse))
        s = _capped(torch.einsum("bgrck,bngk->bgrcn", qg, kw) * scale, softcap)
        p = _probabilities(s, seen(span), lg)
        dv += torch.einsum("bgrcn,bgrcv->bngv", p, dog)
        dp = torch.einsum("bgrcv,bngv->bgrcn", dog, vw)
        ds = _slope(p, dp, (og * dog).sum(-1) - dlg, s, softcap) * scale
        dq[:, span] = _flat(torch.einsum("bgrcn,bngk->bgrck", ds, kw))
        dk += torch.einsum("bgrcn,bgrck->bngk", ds, qg)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _run(start_BT: Tensor, offset: int, length: int, stride: int, window: int, N: int) -> Seen:
    low, high = bounds(start_BT, _rows(start_BT, offset), length, stride, window)
    at_N = torch.arange(N, device=start_BT.device)
    return lambda span: ((at_N >= low[:, span, None]) & (at_N < high[:, span, None]))[:, None, None]


def range_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start_BT: Tensor,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return _masked_forward(q, k, v, _run(start_BT, offset, length, stride, window, k.shape[1]), scale, softcap)


def range_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    seen = _run(start_BT, offset, length, stride, window, k.shape[1])
    return _masked_backward(do, dlse, q, k, v, o, lse, seen, scale, softcap)


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
    (B, Q, H, _), (N, G), wide = q.shape, ck.shape[1:3], _wide(q)
    J, ratio, pairs = -(-keys // block), block // stride, block_overlaps(length, stride, block)
    ck, at_N, at_J = ck.to(wide), torch.arange(N, device=q.device), torch.arange(J, device=q.device)
    out = torch.full((B, Q, G, count), -1, dtype=torch.int32, device=q.device)
    front = -min(m for m, _ in pairs)
    kept = min(count, J)
    for span in _spans(Q, B * (H + 2 * G) * max(N, J) * wide.itemsize):
        start, rows = start_BQ[:, span], rows_BQ[:, span]
        score = torch.zeros(B, G, rows.shape[1], J, dtype=wide, device=q.device)
        if N:
            low, high = bounds(start, rows, length, stride, 0)
            s = torch.einsum("bgrck,bngk->bgrcn", _grouped(q[:, span], G, wide), ck) * scale
            seen = (at_N >= low[..., None]) & (at_N < high[..., None])
            lse = _grouped(lse_BQH[:, span, :, None], G, wide)[..., 0]
            p_BGCN = _probabilities(s, seen[:, None, None], lse).sum(2)
            # from slots of the row to blocks of the query's document
            own = at_N + low[..., None]
            p_BGCN = torch.where(
                (own < high[..., None])[:, None],
                p_BGCN.gather(-1, own.clamp_max(N - 1)[:, None].expand_as(p_BGCN)),
                0.0,
            )
            padded = F.pad(p_BGCN, (front, max(0, J * ratio + ratio - N)))
            for m, weight in pairs:
                score += weight * padded[..., front + m :: ratio][..., :J]
        own_block = torch.div(rows - start, block, rounding_mode="floor")[:, None, :, None]
        score = score.masked_fill((at_J < initial) | (at_J > own_block - local), math.inf)
        score = score.masked_fill((at_J > own_block) | (rows < 0)[:, None, :, None], -math.inf)
        # the lower index first among equals, as the kernel has it
        best, order = score.sort(dim=-1, descending=True, stable=True)
        chosen = torch.where(best[..., :kept] > -math.inf, order[..., :kept], keys)
        chosen = chosen.sort(-1).values
        out[:, span, :, :kept] = torch.where(chosen == keys, -1, chosen).transpose(1, 2).to(torch.int32)
    return out


def _gathered(starts_BCGn: Tensor, first_row: int, block: int, S: int) -> tuple[Tensor, Tensor]:
    """Rows of the tokens of the blocks, and whether the query may see them: (B, G, C, M) each."""
    C = starts_BCGn.shape[1]
    rows = starts_BCGn.permute(0, 2, 1, 3)[..., None].long() + torch.arange(block, device=starts_BCGn.device)
    query_C = torch.arange(first_row, first_row + C, device=starts_BCGn.device)[:, None, None]
    seen = (starts_BCGn.permute(0, 2, 1, 3)[..., None] >= 0) & (rows <= query_C)
    return rows.clamp(0, S - 1).flatten(-2), seen.flatten(-2)


def _take(x_BGSC: Tensor, rows_BGCM: Tensor) -> Tensor:
    """(B, G, S, X) at (B, G, C, M) -> (B, G, C, M, X)"""
    B, G = x_BGSC.shape[:2]
    b = torch.arange(B, device=x_BGSC.device)[:, None, None, None]
    g = torch.arange(G, device=x_BGSC.device)[None, :, None, None]
    return x_BGSC[b, g, rows_BGCM]


def _add_at(total_BGSC: Tensor, rows_BGCM: Tensor, x_BGCMX: Tensor) -> None:
    B, G, S, X = total_BGSC.shape
    base = torch.arange(B * G, device=total_BGSC.device).view(B, G, 1, 1) * S
    total_BGSC.view(-1, X).index_add_(0, (rows_BGCM + base).flatten(), x_BGCMX.flatten(0, -2))


def _members(starts: Tensor, offset: int, block: int, S: int) -> Seen:
    """The selected tokens as a mask over all keys."""

    def seen(span: slice) -> Tensor:
        rows, there = _gathered(starts[:, span], offset + span.start, block, S)
        marked = torch.zeros(*rows.shape[:3], S + 1, dtype=torch.bool, device=rows.device)
        return marked.scatter_(-1, torch.where(there, rows, S), True)[:, :, None, :, :S]

    return seen


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, offset: int, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    (B, T, H, K), (S, G), V, wide = q.shape, k.shape[1:3], v.shape[-1], _wide(q)
    if DENSE * starts.shape[-1] * block >= S:
        return _masked_forward(q, k, v, _members(starts, offset, block, S), scale, 0.0)
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=wide)
    k_BGSK, v_BGSV = k.transpose(1, 2), v.transpose(1, 2)
    for span in _spans(T, B * G * starts.shape[-1] * block * (K + V) * wide.itemsize):
        rows, seen = _gathered(starts[:, span], offset + span.start, block, S)
        k_M, v_M = _take(k_BGSK, rows).to(wide), _take(v_BGSV, rows).to(wide)
        s = torch.einsum("bgrck,bgcmk->bgrcm", _grouped(q[:, span], G, wide), k_M) * scale
        p, sums = _softmax(s, seen[:, :, None])
        o[:, span] = _flat(torch.einsum("bgrcm,bgcmv->bgrcv", p, v_M))
        lse[:, span] = _flat(sums[..., None])[..., 0]
    return o, lse


def selected_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    o: Tensor,
    lse: Tensor,
    offset: int,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, _, K), (S, G), V, wide = q.shape, k.shape[1:3], v.shape[-1], _wide(q)
    if DENSE * starts.shape[-1] * block >= S:
        return _masked_backward(do, dlse, q, k, v, o, lse, _members(starts, offset, block, S), scale, 0.0)
    dq = torch.empty_like(q)
    dk, dv = k.new_zeros(B, G, S, K, dtype=wide), v.new_zeros(B, G, S, V, dtype=wide)
    k_BGSK, v_BGSV = k.transpose(1, 2), v.transpose(1, 2)
    for span in _spans(T, B * G * starts.shape[-1] * block * (K + V) * wide.itemsize):
        rows, seen = _gathered(starts[:, span], offset + span.start, block, S)
        k_M, v_M = _take(k_BGSK, rows).to(wide), _take(v_BGSV, rows).to(wide)
        qg, og, dog = (_grouped(x[:, span], G, wide) for x in (q, o, do))
        lg, dlg = (_grouped(x[:, span, :, None], G, wide)[..., 0] for x in (lse, dlse))
        s = torch.einsum("bgrck,bgcmk->bgrcm", qg, k_M) * scale
        p = _probabilities(s, seen[:, :, None], lg)
        _add_at(dv, rows, torch.einsum("bgrcm,bgrcv->bgcmv", p, dog))
        dp = torch.einsum("bgrcv,bgcmv->bgrcm", dog, v_M)
        ds = _slope(p, dp, (og * dog).sum(-1) - dlg, s, 0.0) * scale
        dq[:, span] = _flat(torch.einsum("bgrcm,bgcmk->bgrck", ds, k_M))
        _add_at(dk, rows, torch.einsum("bgrcm,bgrck->bgcmk", ds, qg))
    return dq, dk.transpose(1, 2).to(k.dtype).contiguous(), dv.transpose(1, 2).to(v.dtype).contiguous()
