"""Index scores, selection and divergence on any device, chunk by chunk over queries.

Where more than a quarter of the keys is selected, all keys of a chunk are multiplied and masked instead of gathering
the selected ones, as in :mod:`workbench.ops.sparse_attention.chunked`.

Legend as in the package, and C queries of a chunk, M keys that meet them: all S, or gathered ones; R = H / G.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.ops.sparse_attention.chunked import MAX_MASKED_RATIO, probabilities, softmax, spans


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _visible(start_BC: Tensor, rows_C: Tensor, S: int) -> Tensor:
    """(B, C, S): whether the query of a row sees a key."""
    token_S = torch.arange(S, device=start_BC.device)
    return (token_S >= start_BC[..., None]) & (token_S <= rows_C[:, None])


def _best(score_BCS: Tensor, count: int) -> Tensor:
    """(B, C, n) int64 keys with the largest scores, of equal ones the first, ascending; S where the score is -inf."""
    S = score_BCS.shape[-1]
    best, order = score_BCS.sort(dim=-1, descending=True, stable=True)
    n = min(count, S)
    return torch.where(best[..., :n] > -math.inf, order[..., :n], S).sort(-1).values


def select(
    q: Tensor, k: Tensor, w: Tensor, start_BT: Tensor, count: int, offset: int, initial: int, local: int
) -> Tensor:
    """(B, T, n) int32. Arguments as of :func:`workbench.ops.token_index.select_tokens`."""
    (B, T, J, _), S, wide = q.shape, k.shape[1], _wide(q)
    out = torch.full((B, T, count), -1, dtype=torch.int32, device=q.device)
    token_S, k = torch.arange(S, device=q.device), k.to(wide)
    for span in spans(T, B * (J + 3) * S * wide.itemsize):
        rows_C, start_BC = torch.arange(offset, offset + T, device=q.device)[span], start_BT[:, span]
        visible = _visible(start_BC, rows_C, S)
        if offset + span.stop <= count:  # these queries see no more tokens than they select
            score = torch.zeros_like(visible, dtype=wide)
        else:
            products = torch.einsum("bcjx,bsx->bcjs", q[:, span].to(wide), k)
            score = torch.einsum("bcj,bcjs->bcs", w[:, span].to(wide), products.relu_())
        is_forced = (token_S < start_BC[..., None] + initial) | (token_S > rows_C[:, None] - local)
        score = score.masked_fill_(is_forced, math.inf).masked_fill_(~visible, -math.inf)
        chosen = _best(score, count)
        out[:, span, : chosen.shape[-1]] = torch.where(chosen == S, -1, chosen - start_BC[..., None]).to(torch.int32)
    return out


# -- divergence ------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Keys that the queries of a chunk meet: one set for all of them ("bs" in products), or one for each ("bcs")."""

    span: slice
    axes: str
    mask_BCM: Tensor
    """Keys that are summed over."""
    keys: Tensor
    """Of attention, (B, [C,] M, G, K)."""
    index_keys: Tensor
    """(B, [C,] M, X)."""
    rows_BCM: Tensor | None
    """Rows of gathered keys."""

    def scores(self, queries: Tensor, scale: float) -> Tensor:
        """(B, C, H, M) of attention."""
        wide, G = self.keys.dtype, self.keys.shape[-2]
        grouped = queries[:, self.span].to(wide).unflatten(2, (G, -1))
        return (torch.einsum(f"bcgrk,{self.axes}gk->bcgrs", grouped, self.keys) * scale).flatten(2, 3)

    def products(self, q: Tensor) -> Tensor:
        """(B, C, J, M) index queries with index keys."""
        return torch.einsum(f"bcjx,{self.axes}x->bcjs", q[:, self.span].to(self.index_keys.dtype), self.index_keys)


def _chunks(
    q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, tokens: Tensor | None, start_BT: Tensor
) -> Iterator[_Chunk]:
    (B, T, J, X), (S, G, K), H, wide = q.shape, keys.shape[1:], queries.shape[2], _wide(q)
    n = S if tokens is None else tokens.shape[-1]
    gathers = n * MAX_MASKED_RATIO < S
    per_query = n * max(G * K + X, H, J) if gathers else S * max(H, J)
    if not gathers:
        keys, k = keys.to(wide), k.to(wide)
    sequence = torch.arange(B, device=q.device)[:, None, None]
    for span in spans(T, B * per_query * wide.itemsize):
        if tokens is None:
            mask = _visible(start_BT[:, span], torch.arange(T, device=q.device)[span], S)
            yield _Chunk(span, "bs", mask, keys, k, None)
            continue
        chosen, is_chosen = tokens[:, span], tokens[:, span] >= 0
        rows = (start_BT[:, span, None] + chosen).long()
        if gathers:
            rows = torch.where(is_chosen, rows, 0)
            yield _Chunk(span, "bcs", is_chosen, keys[sequence, rows].to(wide), k[sequence, rows].to(wide), rows)
        else:
            yield _Chunk(span, "bs", _marked(torch.where(is_chosen, rows, S), S)[..., :S], keys, k, None)


def _marked(rows_BCn: Tensor, S: int) -> Tensor:
    """(B, C, S + 1) whether a row is listed; S stands for none."""
    return torch.zeros(*rows_BCn.shape[:2], S + 1, dtype=torch.bool, device=rows_BCn.device).scatter_(
        -1, rows_BCn, True
    )


def divergence(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    start_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(B, T), and the log-sum-exps (B, T, H + 1) of the scores of every head and of the index. Arguments as of
    :func:`workbench.ops.token_index.index_divergence`."""
    (B, T), wide = q.shape[:2], _wide(q)
    out = torch.empty(B, T, dtype=wide, device=q.device)
    lse = torch.empty(B, T, queries.shape[2] + 1, dtype=wide, device=q.device)
    for chunk in _chunks(q, k, queries, keys, tokens, start_BT):
        p, lse[:, chunk.span, :-1] = softmax(chunk.scores(queries, scale), chunk.mask_BCM[:, :, None])
        p = p.mean(2)
        scores = torch.einsum("bcj,bcjs->bcs", w[:, chunk.span].to(p.dtype), chunk.products(q).relu_())
        lse[:, chunk.span, -1] = of_index = softmax(scores, chunk.mask_BCM)[1]
        log_index = torch.where(chunk.mask_BCM, scores - of_index[..., None], 0.0)
        out[:, chunk.span] = (torch.xlogy(p, p) - p * log_index).sum(-1)
    return out, lse


def divergence_backward(
    dkl: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    start_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of index queries, index keys and weights. ``lse``: log-sum-exps of :func:`divergence`."""
    wide = _wide(q)
    dq, dw, dk = torch.empty_like(q), torch.empty_like(w), torch.zeros_like(k, dtype=wide)
    for chunk in _chunks(q, k, queries, keys, tokens, start_BT):
        mask, of_heads, of_index = chunk.mask_BCM, lse[:, chunk.span, :-1], lse[:, chunk.span, -1]
        p = probabilities(chunk.scores(queries, scale), mask[:, :, None], of_heads).mean(2)
        products = chunk.products(q)
        w_BCJ, kept = w[:, chunk.span].to(wide), products.relu()
        pi = probabilities(torch.einsum("bcj,bcjs->bcs", w_BCJ, kept), mask, of_index)
        # of -Σ p log softmax(I): softmax(I) Σ p - p, and Σ p is 1, or 0 where nothing is visible
        ds = dkl[:, chunk.span, None].to(wide) * (pi * p.sum(-1, keepdim=True) - p)
        dw[:, chunk.span] = torch.einsum("bcs,bcjs->bcj", ds, kept).to(w.dtype)
        da = torch.where(products > 0, ds[:, :, None] * w_BCJ[..., None], 0.0)
        dq[:, chunk.span] = torch.einsum(f"bcjs,{chunk.axes}x->bcjx", da, chunk.index_keys).to(q.dtype)
        dk_part = torch.einsum(f"bcjs,bcjx->{chunk.axes}x", da, q[:, chunk.span].to(wide))
        if chunk.rows_BCM is None:
            dk += dk_part
        else:
            base = torch.arange(k.shape[0], device=k.device)[:, None, None] * k.shape[1]
            dk.view(-1, k.shape[-1]).index_add_(0, (chunk.rows_BCM + base).flatten(), dk_part.flatten(0, 2))
    return dq, dk.to(k.dtype), dw


def recall(
    queries: Tensor, keys: Tensor, tokens: Tensor, start_BQ: Tensor, rows_Q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, Q) recall and mass of :func:`workbench.ops.token_index.index_recall`."""
    (B, Q, H, _), S, wide = queries.shape, keys.shape[1], _wide(queries)
    of_best, mass = (torch.empty(B, Q, dtype=wide, device=queries.device) for _ in range(2))
    keys = keys.to(wide)
    for span in spans(Q, B * H * S * wide.itemsize):
        visible = _visible(start_BQ[:, span], rows_Q[span], S)
        scores = _Chunk(span, "bs", visible, keys, keys, None).scores(queries, scale)
        p = softmax(scores, visible[:, :, None])[0].mean(2)
        rows = torch.where(tokens[:, span] >= 0, start_BQ[:, span, None] + tokens[:, span], S).long()
        selected = _marked(rows, S)
        mass[:, span] = torch.where(selected[..., :S], p, 0.0).sum(-1)
        best = _best(p.masked_fill(~visible, -math.inf), tokens.shape[-1])
        found = selected.gather(-1, best) & (best < S)
        of_best[:, span] = found.sum(-1) / (best < S).sum(-1).clamp_min(1)
    return of_best, mass
