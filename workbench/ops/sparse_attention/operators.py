"""The operators behind the public functions, opaque to torch.compile: each chooses its implementation when it runs.

FLOP formulas count the pairs of one document as long as the row, as :class:`workbench.contract.Cost` does.
Legend: B batch, T queries, S keys, N slots of compression blocks, Q queries that select, H query heads, G key–value heads,
K key channels, V value channels, n selected blocks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.ops.dispatch import choose_backend, disable_autocast, record
from workbench.ops.sparse_attention import chunked
from workbench.ops.sparse_attention.layout import num_visible_blocks, selected_pairs, visible_pairs


def _implementation(q: Tensor) -> ModuleType:
    """:mod:`.chunked` or the kernels; one query per row (decoding) is too little work for the kernels' tiles."""
    if record("sparse_attention", choose_backend(q, supported=q.shape[1] > 1)) == "torch":
        return chunked
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


@torch.library.custom_op("workbench::visible_block_attention", mutates_args=())
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
    implementation = _implementation(q)
    settings = (offset, length, stride, window, scale, softcap)
    if implementation is chunked:
        with disable_autocast(q):
            return chunked.range_forward(q, k, _values(k, v, value_dim), start_BT, *settings)
    return implementation.range_forward(q, k, v, start_BT, value_dim, *settings)


@torch.library.custom_op("workbench::visible_block_attention_backward", mutates_args=())
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
    implementation = _implementation(q)
    settings = (offset, length, stride, window, scale, softcap)
    if implementation is chunked:
        with disable_autocast(q):
            dq, dk, dv = chunked.range_backward(do, dlse, q, k, _values(k, v, value_dim), start_BT, o, lse, *settings)
            return (dq, *_key_gradients(k, v, dk, dv))
    return implementation.range_backward(do, dlse, q, k, v, start_BT, o, lse, value_dim, *settings)


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
    reuse: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v, starts, start_BT = _contiguous(q, k, v, starts, start_BT)
    implementation = _implementation(q)
    if implementation is chunked:
        with disable_autocast(q):
            return chunked.selected_forward(q, k, _values(k, v, value_dim), starts, offset, block, scale)
    return implementation.selected_forward(q, k, v, starts, start_BT, value_dim, offset, block, reuse, scale)


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
    reuse: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    do, dlse, q, k, v, starts, start_BT, o, lse = _contiguous(do, dlse, q, k, v, starts, start_BT, o, lse)
    implementation = _implementation(q)
    if implementation is chunked:
        with disable_autocast(q):
            values = _values(k, v, value_dim)
            dq, dk, dv = chunked.selected_backward(do, dlse, q, k, values, starts, o, lse, offset, block, scale)
            return (dq, *_key_gradients(k, v, dk, dv))
    return implementation.selected_backward(
        do, dlse, q, k, v, starts, start_BT, o, lse, value_dim, offset, block, reuse, scale
    )


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
    reuse: int,
) -> Tensor:
    q, ck, lse_BQH, start_BQ, rows_BQ = _contiguous(q, ck, lse_BQH, start_BQ, rows_BQ)
    with disable_autocast(q):
        return _implementation(q).select(
            q, ck, lse_BQH, start_BQ, rows_BQ, keys, length, stride, block, count, initial, local, scale
        )


@_select.register_fake
def _(q, ck, lse, start, rows, keys, length, stride, block, count, initial, local, scale, reuse) -> Tensor:  # type: ignore[no-untyped-def]
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


@register_flop_formula(torch.ops.workbench.visible_block_attention)
def _(q, k, v, start, value_dim, offset, length, stride, window, scale, softcap, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = visible_pairs(q[1], offset + q[1], length, stride, window)
    return _flops(q, q[3], value_dim, pairs, backward=False)


@register_flop_formula(torch.ops.workbench.visible_block_attention_backward)
def _(do, dlse, q, k, v, start, o, lse, value_dim, offset, length, stride, window, scale, softcap, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = visible_pairs(q[1], offset + q[1], length, stride, window)
    return _flops(q, q[3], value_dim, pairs, backward=True)


@register_flop_formula(torch.ops.workbench.selected_attention)
def _(q, k, v, starts, start, value_dim, offset, block, reuse, scale, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = selected_pairs(q[1], offset + q[1], starts[3] * block)
    return _flops(q, q[3], value_dim, pairs, backward=False)


@register_flop_formula(torch.ops.workbench.selected_attention_backward)
def _(do, dlse, q, k, v, starts, start, o, lse, value_dim, offset, block, reuse, scale, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = selected_pairs(q[1], offset + q[1], starts[3] * block)
    return _flops(q, q[3], value_dim, pairs, backward=True)


@register_flop_formula(torch.ops.workbench.select_blocks)
def _(q, ck, lse, start, rows, keys, length, stride, block, count, initial, local, scale, reuse, **_) -> int:  # type: ignore[no-untyped-def]
    last = (keys - 1) // reuse * reuse
    pairs = sum(
        num_visible_blocks(p, length, stride) for p in range(max(0, last - (q[1] - 1) * reuse), last + 1, reuse)
    )
    return 2 * q[0] * q[2] * q[3] * pairs
