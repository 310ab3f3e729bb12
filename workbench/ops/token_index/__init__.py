"""A learned index of tokens: which keys a query attends, and what trains the choice (DSA, arXiv 2512.02556, §2.1).

    I_{t,s} = Σ_j w_{t,j} ReLU(q_{t,j} · k_s)               index scores of the visible keys s ≤ t of the document
    tokens = select_tokens(q, k, w, …)                      the n with the largest scores, forced ones first
    D_t = index_divergence(…) = KL(p_t ‖ softmax_s I_{t,s})  with p_t the attention, the mean over its heads

Everything runs chunk by chunk over queries and is computed again in the backward pass: neither the T × T index scores
nor the T × T attention is ever in memory. Scores have at least fp32, and of equal ones the earlier token is selected.
On GPUs Triton kernels compute bf16, which autocast makes of fp32, and plain torch every other type. Attention
to the selected tokens is :func:`workbench.ops.sparse_attention.selected_attention` with blocks of one token.

Legend: B batch, T queries (the last T of S rows), S keys, J index heads, X index channels, H query heads, G key–value
heads, K key channels, n selected tokens, Q queries of a sample.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.ops.dispatch import choose_backend, disable_autocast, is_forced, matmul_dtype, record
from workbench.ops.token_index import chunked

__all__ = ["IndexKeys", "index_divergence", "index_recall", "scored_pairs", "select_tokens"]

MAX_CHOSEN = 8192
"""Tokens of a query up to which the kernels select: half of what one program chooses from."""
MAX_INDEX_BYTES = 512
"""Bytes of an index key up to which the kernels are used (256 channels in 16 bits): the gradients' tiles of longer ones
do not fit into shared memory."""
MAX_KEY_CHANNELS = 576
"""The same for channels of attention, whose normalisers the divergence needs."""


class IndexKeys(NamedTuple):
    """What index scores are made of."""

    q_BTJX: Tensor
    """Index queries."""
    k_BSX: Tensor
    """Index keys, which all index heads share."""
    w_BTJ: Tensor
    """Weights of the index heads, with every factor of the scores."""


def scored_pairs(length: int, count: int) -> int:
    """Pairs (query, key) of one document whose index score is needed: a query that sees at most ``count`` tokens
    selects all of them."""
    return 0 if length <= count else (length * (length + 1) - count * (count + 1)) // 2


@torch.no_grad()
def select_tokens(
    index: IndexKeys, *, count: int, start_BT: Tensor, offset: int = 0, initial: int = 0, local: int = 0
) -> Tensor:
    """The tokens that each query attends.

    Args:
        index: queries of the rows ``offset`` to ``offset + T - 1``, keys of the rows 0 to S - 1 = ``offset + T - 1``.
        count: tokens n of a query, the forced ones included; all where it sees no more.
        start_BT: rows at which the queries' documents start (:func:`workbench.ops.sparse_attention.document_starts`).
        initial: first tokens of the document, selected whatever their scores.
        local: last tokens up to the query's own, likewise.

    Returns:
        (B, T, n) int32, counted from the start of the document, ascending, padded with -1.

    Raises:
        ValueError: if there are keys of fewer rows.
    """
    T, S = index.q_BTJX.shape[1], index.k_BSX.shape[1]
    if offset + T > S:
        raise ValueError(f"select_tokens: index: got keys of {S} rows; expected offset + T = {offset + T}.")
    return _select(*(x.detach() for x in _cast(index)), start_BT, count, offset, initial, local)


def index_divergence(
    index: IndexKeys,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    tokens_BTn: Tensor | None = None,
    *,
    start_BT: Tensor,
    scale: float | None = None,
) -> Tensor:
    """(B, T) KL(p_t ‖ softmax_s I_{t,s}) in nats over the selected tokens, at least fp32; gradients reach ``index``
    alone.

    p_{t,s} = 1/H Σ_h softmax_s(scale · q_{t,h} · k_s) is the head-summed attention, L1-normalised.

    Args:
        index: of the same rows as the queries, with gradients.
        q_BTHK, k_BTGK: queries and keys of attention, H a multiple of G; constants here.
        tokens_BTn: from :func:`select_tokens`; None for all visible tokens, as in the dense warm-up.
        start_BT: as of :func:`select_tokens`.
        scale: factor on the scores of attention; default 1/sqrt(K).

    Raises:
        ValueError: if the numbers of rows differ, or H is no multiple of G.
    """
    (T, H), (S, G) = q_BTHK.shape[1:3], k_BTGK.shape[1:3]
    rows = (index.q_BTJX.shape[1], index.k_BSX.shape[1], index.w_BTJ.shape[1], T, S)
    if len(set(rows)) > 1:
        raise ValueError(
            f"index_divergence: got {rows} rows of index queries, index keys, weights, queries and keys; expected one "
            "number."
        )
    if H % G:
        raise ValueError(f"index_divergence: q_BTHK: got {H} heads; expected a multiple of the {G} of k_BTGK.")
    scale = 1 / math.sqrt(q_BTHK.shape[-1]) if scale is None else scale
    queries, keys = (x.detach().to(matmul_dtype(x)) for x in (q_BTHK, k_BTGK))
    return _divergence(*_cast(index), queries, keys, tokens_BTn, start_BT, scale)[0]


@torch.no_grad()
def index_recall(
    tokens_BTn: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    *,
    start_BT: Tensor,
    queries: int,
    scale: float | None = None,
    valid_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What selected tokens have of attention to all visible tokens, p_t of :func:`index_divergence`.

    Args:
        tokens_BTn: from :func:`select_tokens`.
        q_BTHK, k_BTGK, start_BT, scale: as of :func:`index_divergence`.
        queries: positions of a row that are measured, evenly spaced and the last one among them.
        valid_BT: positions that count. Default: all.

    Returns:
        (B, Q) share of the n tokens with the largest p_t that are selected; (B, Q) sum of p_t over the selected tokens;
        (B, Q) whether the query counts: it sees more than n tokens.
    """
    scale = 1 / math.sqrt(q_BTHK.shape[-1]) if scale is None else scale
    T, n = tokens_BTn.shape[1:]
    step = -(-T // queries)
    rows_Q = torch.arange((T - 1) % step, T, step, dtype=torch.int32, device=q_BTHK.device)
    start_BQ = start_BT[:, rows_Q]
    sampled = q_BTHK.detach()[:, rows_Q], k_BTGK.detach(), tokens_BTn[:, rows_Q]
    recall_BQ, mass_BQ = _recall(*sampled, start_BQ, rows_Q, scale)
    counts_BQ = rows_Q - start_BQ >= n
    return recall_BQ, mass_BQ, counts_BQ if valid_BT is None else counts_BQ & valid_BT[:, rows_Q]


def _cast(index: IndexKeys) -> IndexKeys:
    """Factors of products in the type of matrix products, which is what a cache of keys has."""
    q, k, w = index
    return IndexKeys(q.to(matmul_dtype(q)), k.to(matmul_dtype(k)), w)


# -- operators, opaque to torch.compile ------------------------------------------------------------------------------


def _implementation(index: IndexKeys, *attention: Tensor, chosen: int = 0) -> ModuleType:
    """:mod:`.chunked` or :mod:`.kernels`, for the selection of ``chosen`` tokens, or for the divergence from the
    ``attention`` of queries and keys."""
    q, k, w = index
    # Checked and measured on a GPU with the factors of all products in bf16, which is what autocast makes of them, and
    # weights in bf16 or fp32. fp32 factors were checked there, but not measured: they take torch unless kernels are
    # asked for by name.
    dtypes = (torch.bfloat16, torch.float32) if is_forced() else (torch.bfloat16,)
    supported = (
        all(x.dtype in dtypes for x in (q, k, *attention))
        and w.dtype in (torch.bfloat16, torch.float32)
        and chosen <= MAX_CHOSEN
        and q.shape[-1] * torch.promote_types(q.dtype, k.dtype).itemsize <= MAX_INDEX_BYTES
        and all(x.shape[-1] <= MAX_KEY_CHANNELS for x in attention)
    )
    if record("token_index", choose_backend(q, supported=supported)) == "torch":
        return chunked
    from workbench.ops.token_index import kernels

    return kernels


@torch.library.custom_op("workbench::select_tokens", mutates_args=())
def _select(
    q: Tensor, k: Tensor, w: Tensor, start_BT: Tensor, count: int, offset: int, initial: int, local: int
) -> Tensor:
    with disable_autocast(q):
        implementation = _implementation(IndexKeys(q, k, w), chosen=count)
        return implementation.select(q, k, w, start_BT, count, offset, initial, local)


@_select.register_fake
def _(q, k, w, start, count, *_) -> Tensor:  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:2], count, dtype=torch.int32)


@register_flop_formula(torch.ops.workbench.select_tokens)
def _(q, k, w, start, count, offset, initial, local, **_) -> int:  # type: ignore[no-untyped-def]
    last = offset + q[1]
    return 2 * q[0] * q[2] * q[3] * (scored_pairs(last, count) - scored_pairs(offset, count))


@torch.library.custom_op("workbench::index_divergence", mutates_args=())
def _divergence(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    queries: Tensor,
    keys: Tensor,
    tokens: Tensor | None,
    start_BT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with disable_autocast(q):
        implementation = _implementation(IndexKeys(q, k, w), queries, keys)
        return implementation.divergence(q, k, w, queries, keys, tokens, start_BT, scale)


@torch.library.custom_op("workbench::index_divergence_backward", mutates_args=())
def _divergence_backward(
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
    with disable_autocast(q):
        implementation = _implementation(IndexKeys(q, k, w), queries, keys)
        return implementation.divergence_backward(dkl, lse, q, k, w, queries, keys, tokens, start_BT, scale)


@_divergence.register_fake
def _(q, k, w, queries, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    B, T, H, _ = queries.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, T, dtype=wide), q.new_empty(B, T, H + 1, dtype=wide)


@_divergence_backward.register_fake
def _(dkl, lse, q, k, w, *args) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), w.new_empty(w.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(output[1], *tensors)


def _differentiate(ctx: Any, dkl: Tensor, _: Tensor) -> Any:
    return *_divergence_backward(dkl.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None, None, None


_divergence.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("workbench::index_recall", mutates_args=())
def _recall(
    queries: Tensor, keys: Tensor, tokens: Tensor, start_BQ: Tensor, rows_Q: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    with disable_autocast(queries):
        return chunked.recall(queries, keys, tokens, start_BQ, rows_Q, scale)


@_recall.register_fake
def _(queries, *args) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    wide = torch.promote_types(queries.dtype, torch.float32)
    return queries.new_empty(queries.shape[:2], dtype=wide), queries.new_empty(queries.shape[:2], dtype=wide)
