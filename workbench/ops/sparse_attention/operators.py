"""The operators that mixers call, opaque to torch.compile: each finds its implementation when it runs (:func:`path`).

FLOP formulas count the pairs of one document as long as the row, as :class:`workbench.contract.Cost` does.
Legend: B batch, T queries, S keys, N slots of compression blocks, Q queries that select, H query heads, G key–value heads,
K key channels, V value channels, n selected blocks.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.ops import paths
from workbench.ops.sparse_attention import chunked as plain
from workbench.ops.sparse_attention.layout import range_pairs, selected_pairs, visible_blocks

forced: str | None = None
"""Set to "torch" or "triton" to take that implementation wherever it can be taken (measurements, tests)."""

TRITON = importlib.util.find_spec("triton") is not None


def path(device: str, *, dtype: torch.dtype, queries: int) -> str:
    """Which implementation computes a call: "torch" (chunked, any device and type) or "triton" (our kernels).

    One query a row (decode) is too little work for the kernels' tiles and takes the plain form.
    """
    if forced == "torch" or not TRITON or device != "cuda" or dtype == torch.float64 or queries == 1:
        return "torch"
    return "triton"


def _chosen(q: Tensor) -> ModuleType:
    if paths.note("sparse_attention", path(q.device.type, dtype=q.dtype, queries=q.shape[1])) == "torch":
        return plain
    from workbench.ops.sparse_attention import triton as kernels

    return kernels


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    # what compiled code hands over may lie in memory in any order
    return [None if x is None else x.contiguous() for x in tensors]


def _values(k: Tensor, v: Tensor | None, value_dim: int) -> Tensor:
    return k[..., :value_dim] if v is None else v


def _lse_type(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _key_gradients(k: Tensor, v: Tensor | None, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """Where the values are channels of the keys, their gradient is added there, and an empty one returned beside it."""
    if v is not None:
        return dk, dv
    dk[..., : dv.shape[-1]] += dv
    return dk, dv.new_empty(0)


# -- attention over one run of keys ----------------------------------------------------------------------------------


@torch.library.custom_op("workbench::range_attention", mutates_args=())
def _range(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    value_dim: int,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, start_BT = _contiguous(q, k, v, start_BT)
    chosen = _chosen(q)
    settings = (offset, length, stride, window, scale, softcap)
    if chosen is plain:
        return plain.range_forward(q, k, _values(k, v, value_dim), start_BT, *settings)
    return chosen.range_forward(q, k, v, start_BT, value_dim, *settings)


@torch.library.custom_op("workbench::range_attention_backward", mutates_args=())
def _range_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    value_dim: int,
    offset: int,
    length: int,
    stride: int,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    do, dlse, q, k, v, start_BT, o, lse = _contiguous(do, dlse, q, k, v, start_BT, o, lse)
    chosen = _chosen(q)
    settings = (offset, length, stride, window, scale, softcap)
    if chosen is plain:
        dq, dk, dv = plain.range_backward(do, dlse, q, k, _values(k, v, value_dim), start_BT, o, lse, *settings)
        return (dq, *_key_gradients(k, v, dk, dv))
    return chosen.range_backward(do, dlse, q, k, v, start_BT, o, lse, value_dim, *settings)


# -- attention over selected blocks ----------------------------------------------------------------------------------


@torch.library.custom_op("workbench::selected_attention", mutates_args=())
def _selected(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    starts: Tensor,
    start_BT: Tensor,
    value_dim: int,
    offset: int,
    block: int,
    share: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, starts, start_BT = _contiguous(q, k, v, starts, start_BT)
    chosen = _chosen(q)
    if chosen is plain:
        return plain.selected_forward(q, k, _values(k, v, value_dim), starts, offset, block, scale)
    return chosen.selected_forward(q, k, v, starts, start_BT, value_dim, offset, block, share, scale)


@torch.library.custom_op("workbench::selected_attention_backward", mutates_args=())
def _selected_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    starts: Tensor,
    start_BT: Tensor,
    o: Tensor,
    lse: Tensor,
    value_dim: int,
    offset: int,
    block: int,
    share: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    do, dlse, q, k, v, starts, start_BT, o, lse = _contiguous(do, dlse, q, k, v, starts, start_BT, o, lse)
    chosen = _chosen(q)
    if chosen is plain:
        values = _values(k, v, value_dim)
        dq, dk, dv = plain.selected_backward(do, dlse, q, k, values, starts, o, lse, offset, block, scale)
        return (dq, *_key_gradients(k, v, dk, dv))
    return chosen.selected_backward(do, dlse, q, k, v, starts, start_BT, o, lse, value_dim, offset, block, share, scale)


# -- selection -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("workbench::select_blocks", mutates_args=())
def _select(
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
    share: int,
) -> Tensor:
    q, ck, lse_BQH, start_BQ, rows_BQ = _contiguous(q, ck, lse_BQH, start_BQ, rows_BQ)
    call = _chosen(q).select
    return call(q, ck, lse_BQH, start_BQ, rows_BQ, keys, length, stride, block, count, initial, local, scale)


@_select.register_fake
def _(q, ck, lse, start, rows, keys, length, stride, block, count, initial, local, scale, share) -> Tensor:  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1], ck.shape[2], count, dtype=torch.int32)


# -- shapes, gradients, FLOPs ----------------------------------------------------------------------------------------


@_range.register_fake
@_selected.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    value_dim = next(x for x in args if isinstance(x, int))
    return q.new_empty(*q.shape[:-1], value_dim), q.new_empty(q.shape[:-1], dtype=_lse_type(q))


@_range_backward.register_fake
@_selected_backward.register_fake
def _(do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(0 if v is None else v.shape)


def _keep_range(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, start, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, start, *output)


def _differentiate_range(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, start, o, lse = ctx.saved_tensors
    dq, dk, dv = _range_backward(do, dlse, q, k, v, start, o, lse, *ctx.settings)
    return dq, dk, None if v is None else dv, None, *(None for _ in ctx.settings)


def _keep_selected(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, starts, start, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, starts, start, *output)


def _differentiate_selected(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, starts, start, o, lse = ctx.saved_tensors
    dq, dk, dv = _selected_backward(do.contiguous(), dlse.contiguous(), q, k, v, starts, start, o, lse, *ctx.settings)
    return dq, dk, None if v is None else dv, None, None, *(None for _ in ctx.settings)


_range.register_autograd(_differentiate_range, setup_context=_keep_range)
_selected.register_autograd(_differentiate_selected, setup_context=_keep_selected)


def _flops(q_shape: Any, K: int, V: int, pairs: int, *, backward: bool) -> int:
    B, _, H, _ = q_shape
    # scores and weighted values; backward scores again, and the gradients of values, probabilities, queries and keys
    return B * H * pairs * 2 * ((3 * K + 2 * V) if backward else (K + V))


@register_flop_formula(torch.ops.workbench.range_attention)
def _(q, k, v, start, value_dim, offset, length, stride, window, scale, softcap, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = range_pairs(q[1], offset + q[1], length, stride, window)
    return _flops(q, q[3], value_dim, pairs, backward=False)


@register_flop_formula(torch.ops.workbench.range_attention_backward)
def _(do, dlse, q, k, v, start, o, lse, value_dim, offset, length, stride, window, scale, softcap, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = range_pairs(q[1], offset + q[1], length, stride, window)
    return _flops(q, q[3], value_dim, pairs, backward=True)


@register_flop_formula(torch.ops.workbench.selected_attention)
def _(q, k, v, starts, start, value_dim, offset, block, share, scale, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = selected_pairs(q[1], offset + q[1], starts[3] * block)
    return _flops(q, q[3], value_dim, pairs, backward=False)


@register_flop_formula(torch.ops.workbench.selected_attention_backward)
def _(do, dlse, q, k, v, starts, start, o, lse, value_dim, offset, block, share, scale, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = selected_pairs(q[1], offset + q[1], starts[3] * block)
    return _flops(q, q[3], value_dim, pairs, backward=True)


@register_flop_formula(torch.ops.workbench.select_blocks)
def _(q, ck, lse, start, rows, keys, length, stride, block, count, initial, local, scale, share, **_) -> int:  # type: ignore[no-untyped-def]
    last = (keys - 1) // share * share
    pairs = sum(visible_blocks(p, length, stride) for p in range(max(0, last - (q[1] - 1) * share), last + 1, share))
    return 2 * q[0] * q[2] * q[3] * pairs
