"""Sparse attention on any device, chunk by chunk over queries, so that the scores of only one chunk are in memory.

Sums and softmax are float32 (float64 for float64 input). A query without visible keys gives zero, a log-sum-exp of -inf
and zero gradients.

Legend: B batch, T queries, S keys, N slots of pooled blocks, H query heads, G key–value heads, R = H / G, K key
channels, V value channels, C queries of a chunk, M gathered tokens, n selected blocks, J selection blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.sparse_attention.layout import SelectedBlocks, Selection, VisibleBlocks, block_overlaps

CHUNK_BYTES = 2**26
"""Largest size of one tensor of a chunk."""

MAX_MASKED_RATIO = 4
"""Keys per selected token up to which all keys are multiplied and masked, instead of gathering the selected ones: on a
CPU matrix products are that much faster than gathers (our estimate)."""

MAX_MASKED_TOKEN_RATIO = 16
"""The same for blocks of one token, which are gathered row by row (one core, heads of 32: even at about 30)."""


def spans(T: int, bytes_per_query: int) -> Iterator[slice]:
    """Chunks of ``T`` queries, no tensor of which has more than :data:`CHUNK_BYTES`, or that of one query."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_query))
    for first in range(0, T, step):
        yield slice(first, min(T, first + step))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def visible_bounds(start_BT: Tensor, rows_BT: Tensor, length: int, stride: int, window: int) -> tuple[Tensor, Tensor]:
    """First visible slot and the end (exclusive), (B, T) each."""
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


def softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the visible keys, and their log-sum-exp; zero and -inf where none is visible."""
    lse = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    return probabilities(scores, mask, lse), lse


def probabilities(scores: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
    return torch.where(mask, (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp(), 0.0)


def _score_gradient(p: Tensor, dp: Tensor, delta: Tensor, capped: Tensor, softcap: float) -> Tensor:
    """Gradient of the uncapped scores."""
    ds = p * (dp - delta[..., None])
    return ds * (1 - (capped / softcap).square()) if softcap else ds


Mask = Callable[[slice], Tensor]
"""Which keys the queries of a chunk see, broadcastable to (B, G, R, C, N)."""


def _masked_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    (B, T, H, _), (N, G), V, wide = q.shape, k.shape[1:3], v.shape[-1], _wide(q)
    o, lse = q.new_zeros(B, T, H, V), q.new_full((B, T, H), -math.inf, dtype=wide)
    k, v = k.to(wide), v.to(wide)
    for span in spans(T if N else 0, B * H * N * wide.itemsize):
        s = _capped(torch.einsum("bgrck,bngk->bgrcn", _grouped(q[:, span], G, wide), k) * scale, softcap)
        p, sums = softmax(s, mask(span))
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
    mask: Mask,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, _), (N, G), wide = q.shape, k.shape[1:3], _wide(q)
    dq, dk, dv = torch.zeros_like(q), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    kw, vw = k.to(wide), v.to(wide)
    for span in spans(T if N else 0, B * H * N * wide.itemsize):
        qg, og, dog = (_grouped(x[:, span], G, wide) for x in (q, o, do))
        lg, dlg = (_grouped(x[:, span, :, None], G, wide)[..., 0] for x in (lse, dlse))
        s = _capped(torch.einsum("bgrck,bngk->bgrcn", qg, kw) * scale, softcap)
        p = probabilities(s, mask(span), lg)
        dv += torch.einsum("bgrcn,bgrcv->bngv", p, dog)
        dp = torch.einsum("bgrcv,bngv->bgrcn", dog, vw)
        ds = _score_gradient(p, dp, (og * dog).sum(-1) - dlg, s, softcap) * scale
        dq[:, span] = _flat(torch.einsum("bgrcn,bngk->bgrck", ds, kw))
        dk += torch.einsum("bgrcn,bgrck->bngk", ds, qg)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _visibility(start_BT: Tensor, blocks: VisibleBlocks, N: int) -> Mask:
    low, high = visible_bounds(start_BT, _rows(start_BT, blocks.offset), blocks.length, blocks.stride, blocks.window)
    slot_N = torch.arange(N, device=start_BT.device)
    return lambda span: ((slot_N >= low[:, span, None]) & (slot_N < high[:, span, None]))[:, None, None]


def _values(k: Tensor, v: Tensor | None, V: int) -> Tensor:
    return k[..., :V] if v is None else v


def _key_value_gradients(v: Tensor | None, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the gradient of values that are channels of the keys to that of the keys; then that of ``v`` is empty."""
    if v is not None:
        return dk, dv
    dk[..., : dv.shape[-1]] += dv
    return dk, dv.new_empty(0)


def visible_forward(
    q: Tensor, k: Tensor, v: Tensor | None, start_BT: Tensor, V: int, blocks: VisibleBlocks
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and log-sum-exp (B, T, H); without ``v`` the values are the first V channels of the keys."""
    mask = _visibility(start_BT, blocks, k.shape[1])
    return _masked_forward(q, k, _values(k, v, V), mask, blocks.scale, blocks.softcap)


def visible_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    V: int,
    blocks: VisibleBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the last is empty where the values are channels of the keys."""
    mask = _visibility(start_BT, blocks, k.shape[1])
    values = _values(k, v, V)
    dq, dk, dv = _masked_backward(do, dlse, q, k, values, o, lse, mask, blocks.scale, blocks.softcap)
    return dq, *_key_value_gradients(v, dk, dv)


def _block_scores(
    q: Tensor, ck: Tensor, lse_BQH: Tensor, start_BQ: Tensor, rows_BQ: Tensor, selection: Selection
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For spans of queries: the span, (B, G, C, J) scores of selection blocks, and the order of selection, the same
    with forced blocks +inf and blocks that are not visible -inf."""
    num_keys, length, stride, block, _, initial, local, scale = selection
    (B, Q, H, _), (N, G), wide = q.shape, ck.shape[1:3], _wide(q)
    J, ratio, pairs = -(-num_keys // block), block // stride, block_overlaps(length, stride, block)
    ck, slot_N, block_J = ck.to(wide), torch.arange(N, device=q.device), torch.arange(J, device=q.device)
    front = -min(m for m, _ in pairs)
    for span in spans(Q, B * (H + 2 * G) * max(N, J) * wide.itemsize):
        start, rows = start_BQ[:, span], rows_BQ[:, span]
        score = torch.zeros(B, G, rows.shape[1], J, dtype=wide, device=q.device)
        if N:
            # 1. probabilities of the pooled blocks, summed over the heads of a group
            low, high = visible_bounds(start, rows, length, stride, 0)
            s = torch.einsum("bgrck,bngk->bgrcn", _grouped(q[:, span], G, wide), ck) * scale
            mask = (slot_N >= low[..., None]) & (slot_N < high[..., None])
            lse = _grouped(lse_BQH[:, span, :, None], G, wide)[..., 0]
            p_BGCN = probabilities(s, mask[:, None, None], lse).sum(2)
            # 2. from slots of the row to blocks of the query's document
            slot = slot_N + low[..., None]
            p_BGCN = torch.where(
                (slot < high[..., None])[:, None],
                p_BGCN.gather(-1, slot.clamp_max(N - 1)[:, None].expand_as(p_BGCN)),
                0.0,
            )
            # 3. from pooled blocks to selection blocks
            padded = F.pad(p_BGCN, (front, max(0, J * ratio + ratio - N)))
            for m, weight in pairs:
                score += weight * padded[..., front + m :: ratio][..., :J]
        query_block = torch.div(rows - start, block, rounding_mode="floor")[:, None, :, None]
        order = score.masked_fill((block_J < initial) | (block_J > query_block - local), math.inf)
        hidden = (block_J > query_block) | (rows < 0)[:, None, :, None]
        yield span, score.masked_fill_(hidden, 0.0), order.masked_fill_(hidden, -math.inf)


def select(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    selection: Selection,
    budget: Tensor | None = None,
) -> Tensor:
    """(B, Q, G, n) int32 blocks, ascending, padded with -1; at most ``budget`` of them where one is given."""
    (B, Q, _, _), G, num_keys, count = q.shape, ck.shape[2], selection.num_keys, selection.selected
    out = torch.full((B, Q, G, count), -1, dtype=torch.int32, device=q.device)
    n = min(count, -(-num_keys // selection.block))
    rank_n = torch.arange(n, device=q.device)
    for span, _, score in _block_scores(q, ck, lse_BQH, start_BQ, rows_BQ, selection):
        # of equal scores the lower index, as in the kernel
        best, order = score.sort(dim=-1, descending=True, stable=True)
        is_chosen = best[..., :n] > -math.inf
        if budget is not None:
            is_chosen &= rank_n < budget
        chosen = torch.where(is_chosen, order[..., :n], num_keys).sort(-1).values
        out[:, span, :, :n] = torch.where(chosen == num_keys, -1, chosen).transpose(1, 2).to(torch.int32)
    return out


def coverage(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    counts_K: Tensor,
    selection: Selection,
) -> Tensor:
    """(B, Q, G, K) share of the scores of all visible blocks in the first ``counts_K`` of the order of selection; 1
    where no block has a score."""
    (B, Q, _, _), G, wide = q.shape, ck.shape[2], _wide(q)
    J = -(-selection.num_keys // selection.block)
    out = torch.ones(B, Q, G, counts_K.shape[0], dtype=wide, device=q.device)
    rank_J = torch.arange(J, device=q.device)
    for span, score, order in _block_scores(q, ck, lse_BQH, start_BQ, rows_BQ, selection):
        ordered = score.gather(-1, order.sort(dim=-1, descending=True, stable=True).indices)
        total = ordered.sum(-1, keepdim=True)
        # not a cumulative sum, which is not deterministic on CUDA devices
        first = torch.stack([torch.where(rank_J < count, ordered, 0.0).sum(-1) for count in counts_K], dim=-1)
        out[:, span] = torch.where(total > 0, first / torch.where(total > 0, total, 1.0), 1.0).transpose(1, 2)
    return out


def _used(starts_BTGn: Tensor) -> Tensor:
    """Without the last columns, where these are -1 for every query: buffers are larger than most budgets. On a device
    other than a CPU unchanged, whose values the host would wait for."""
    if starts_BTGn.device.type != "cpu" or starts_BTGn.shape[-1] == 1:
        return starts_BTGn
    columns = (starts_BTGn >= 0).flatten(0, 2).any(0).nonzero()
    return starts_BTGn[..., : int(columns[-1]) + 1 if len(columns) else 1]


def _gathered(starts_BCGn: Tensor, first_row: int, block: int, S: int) -> tuple[Tensor, Tensor]:
    """Rows of the tokens of the blocks, and whether the query sees them: (B, G, C, M) each."""
    C = starts_BCGn.shape[1]
    rows = starts_BCGn.permute(0, 2, 1, 3)[..., None].long() + torch.arange(block, device=starts_BCGn.device)
    query_C = torch.arange(first_row, first_row + C, device=starts_BCGn.device)[:, None, None]
    mask = (starts_BCGn.permute(0, 2, 1, 3)[..., None] >= 0) & (rows <= query_C)
    return rows.clamp(0, S - 1).flatten(-2), mask.flatten(-2)


def _gather_rows(x_BGSX: Tensor, rows_BGCM: Tensor) -> Tensor:
    """(B, G, S, X) at (B, G, C, M) -> (B, G, C, M, X)"""
    B, G = x_BGSX.shape[:2]
    b = torch.arange(B, device=x_BGSX.device)[:, None, None, None]
    g = torch.arange(G, device=x_BGSX.device)[None, :, None, None]
    return x_BGSX[b, g, rows_BGCM]


def _add_rows(total_BGSX: Tensor, rows_BGCM: Tensor, x_BGCMX: Tensor) -> None:
    """Adds to the rows of ``total``; the inverse of :func:`_gather_rows`."""
    B, G, S, X = total_BGSX.shape
    base = torch.arange(B * G, device=total_BGSX.device).view(B, G, 1, 1) * S
    total_BGSX.view(-1, X).index_add_(0, (rows_BGCM + base).flatten(), x_BGCMX.flatten(0, -2))


def _masks(starts: Tensor, block: int, S: int) -> bool:
    """Whether all keys are multiplied and masked."""
    ratio = MAX_MASKED_TOKEN_RATIO if block == 1 else MAX_MASKED_RATIO
    return ratio * starts.shape[-1] * block >= S


def _selected_mask(starts: Tensor, offset: int, block: int, S: int) -> Mask:
    """The selected tokens as a mask over all keys."""

    def mask(span: slice) -> Tensor:
        rows, is_visible = _gathered(starts[:, span], offset + span.start, block, S)
        selected = torch.zeros(*rows.shape[:3], S + 1, dtype=torch.bool, device=rows.device)
        return selected.scatter_(-1, torch.where(is_visible, rows, S), True)[:, :, None, :, :S]

    return mask


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor | None, starts: Tensor, start_BT: Tensor, V: int, blocks: SelectedBlocks
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, V) and log-sum-exp (B, T, H); without ``v`` the values are the first V channels of the keys."""
    (B, T, H, K), (S, G), wide, v = q.shape, k.shape[1:3], _wide(q), _values(k, v, V)
    offset, block, scale, starts = blocks.offset, blocks.block, blocks.scale, _used(starts)
    if _masks(starts, block, S):
        return _masked_forward(q, k, v, _selected_mask(starts, offset, block, S), scale, 0.0)
    o, lse = q.new_empty(B, T, H, V), q.new_empty(B, T, H, dtype=wide)
    k_BGSK, v_BGSV = k.transpose(1, 2), v.transpose(1, 2)
    for span in spans(T, B * G * starts.shape[-1] * block * (K + V) * wide.itemsize):
        rows, mask = _gathered(starts[:, span], offset + span.start, block, S)
        k_M, v_M = _gather_rows(k_BGSK, rows).to(wide), _gather_rows(v_BGSV, rows).to(wide)
        s = torch.einsum("bgrck,bgcmk->bgrcm", _grouped(q[:, span], G, wide), k_M) * scale
        p, sums = softmax(s, mask[:, :, None])
        o[:, span] = _flat(torch.einsum("bgrcm,bgcmv->bgrcv", p, v_M))
        lse[:, span] = _flat(sums[..., None])[..., 0]
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
    (B, T, _, K), (S, G), wide, values = q.shape, k.shape[1:3], _wide(q), _values(k, v, V)
    offset, block, scale, starts = blocks.offset, blocks.block, blocks.scale, _used(starts)
    if _masks(starts, block, S):
        mask = _selected_mask(starts, offset, block, S)
        dq, dk, dv = _masked_backward(do, dlse, q, k, values, o, lse, mask, scale, 0.0)
        return dq, *_key_value_gradients(v, dk, dv)
    dq = torch.empty_like(q)
    dk, dv = k.new_zeros(B, G, S, K, dtype=wide), values.new_zeros(B, G, S, V, dtype=wide)
    k_BGSK, v_BGSV = k.transpose(1, 2), values.transpose(1, 2)
    for span in spans(T, B * G * starts.shape[-1] * block * (K + V) * wide.itemsize):
        rows, is_visible = _gathered(starts[:, span], offset + span.start, block, S)
        k_M, v_M = _gather_rows(k_BGSK, rows).to(wide), _gather_rows(v_BGSV, rows).to(wide)
        qg, og, dog = (_grouped(x[:, span], G, wide) for x in (q, o, do))
        lg, dlg = (_grouped(x[:, span, :, None], G, wide)[..., 0] for x in (lse, dlse))
        s = torch.einsum("bgrck,bgcmk->bgrcm", qg, k_M) * scale
        p = probabilities(s, is_visible[:, :, None], lg)
        _add_rows(dv, rows, torch.einsum("bgrcm,bgrcv->bgcmv", p, dog))
        dp = torch.einsum("bgrcv,bgcmv->bgrcm", dog, v_M)
        ds = _score_gradient(p, dp, (og * dog).sum(-1) - dlg, s, 0.0) * scale
        dq[:, span] = _flat(torch.einsum("bgrcm,bgcmk->bgrck", ds, k_M))
        _add_rows(dk, rows, torch.einsum("bgrcm,bgrck->bgcmk", ds, qg))
    dk, dv = dk.transpose(1, 2).to(k.dtype).contiguous(), dv.transpose(1, 2).to(values.dtype).contiguous()
    return dq, *_key_value_gradients(v, dk, dv)
