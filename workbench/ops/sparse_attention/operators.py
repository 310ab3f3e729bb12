"""The operators behind the public functions, opaque to torch.compile: each chooses its implementation when it runs.

FLOP formulas count the pairs of one document as long as the row, as :class:`workbench.contract.Cost` does. Legend: B
batch, T queries, S keys, N slots of pooled blocks, Q queries that select, H query heads, G key–value heads, K key
channels, V value channels, n selected blocks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.ops.dispatch import choose_backend, disable_autocast, is_forced, record
from workbench.ops.sparse_attention import chunked
from workbench.ops.sparse_attention.layout import (
    SelectedBlocks,
    Selection,
    VisibleBlocks,
    num_visible_blocks,
    selected_pairs,
    visible_pairs,
)

MAX_UNITED_BLOCKS = 128
"""Selected blocks of a query up to which the kernels are used: they sort those of neighbouring queries in registers,
which takes 5 s to compile for 64 blocks, 13 s for 128 and 55 s for 256."""

MAX_TOKENS = 8192
"""Selected single tokens of a query up to which the kernels are used: one program marks all of them."""
MAX_CHANNELS = 256
"""Channels of keys and of values of their own up to which the kernels of single tokens are used."""
MAX_LATENT_CHANNELS = (512, 64)
"""The same for keys whose first channels are the values: those, and the others. Tiles of more do not fit into the
shared memory of an SM."""


def _implementation(q: Tensor, count: int = 0) -> ModuleType:
    """:mod:`.chunked` or :mod:`.kernels`. One query per row (decoding) is too little work for the kernels' tiles."""
    return _chosen(q, q.shape[1] > 1 and count <= MAX_UNITED_BLOCKS)


def _selected_implementation(q: Tensor, v: Tensor | None, block: int, count: int, value_dim: int) -> ModuleType:
    """:func:`_implementation` of selected blocks; :mod:`.kernels.tokens` for single tokens."""
    if block > 1:
        return _implementation(q, count)
    # Checked on a GPU in bf16 alone: the check in fp32 has not been completed there, so that fp32 takes torch unless
    # kernels are asked for by name.
    supported = q.shape[1] > 1 and (q.dtype == torch.bfloat16 or is_forced()) and count <= MAX_TOKENS
    if v is None:
        latent, rest = MAX_LATENT_CHANNELS
        supported &= value_dim <= latent and q.shape[-1] - value_dim <= rest
    else:
        supported &= max(q.shape[-1], value_dim) <= MAX_CHANNELS
    implementation = _chosen(q, supported)
    return implementation if implementation is chunked else implementation.tokens


def _chosen(q: Tensor, supported: bool) -> ModuleType:
    if record("sparse_attention", choose_backend(q, supported=supported)) == "torch":
        return chunked
    from workbench.ops.sparse_attention import kernels

    return kernels


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    # compiled code passes tensors with arbitrary strides
    return [None if x is None else x.contiguous() for x in tensors]


# -- attention over visible blocks -----------------------------------------------------------------------------------


@torch.library.custom_op("workbench::visible_block_attention", mutates_args=())
def _visible(
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
    blocks = VisibleBlocks(offset, length, stride, window, scale, softcap)
    with disable_autocast(q):
        return _implementation(q).visible_forward(q, k, v, start_BT, value_dim, blocks)


@torch.library.custom_op("workbench::visible_block_attention_backward", mutates_args=())
def _visible_backward(
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
    blocks = VisibleBlocks(offset, length, stride, window, scale, softcap)
    with disable_autocast(q):
        return _implementation(q).visible_backward(do, dlse, q, k, v, start_BT, o, lse, value_dim, blocks)


# -- attention over selected blocks ----------------------------------------------------------------------------------


def _for_groups(starts: Tensor, k: Tensor, block: int, implementation: ModuleType) -> Tensor:
    """Starts for every group; kernels of single tokens read one selection of all groups once."""
    if block == 1 and implementation is not chunked:
        return starts
    return starts.expand(-1, -1, k.shape[2], -1).contiguous()


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
    blocks = SelectedBlocks(offset, block, reuse, scale)
    implementation = _selected_implementation(q, v, block, starts.shape[-1], value_dim)
    starts = _for_groups(starts, k, block, implementation)
    with disable_autocast(q):
        return implementation.selected_forward(q, k, v, starts, start_BT, value_dim, blocks)


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
    blocks = SelectedBlocks(offset, block, reuse, scale)
    implementation = _selected_implementation(q, v, block, starts.shape[-1], value_dim)
    starts = _for_groups(starts, k, block, implementation)
    with disable_autocast(q):
        return implementation.selected_backward(do, dlse, q, k, v, starts, start_BT, o, lse, value_dim, blocks)


# -- selection -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("workbench::select_blocks", mutates_args=())
def _select(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    num_keys: int,
    length: int,
    stride: int,
    block: int,
    count: int,
    initial: int,
    local: int,
    scale: float,
    reuse: int,
    budget: Tensor | None = None,
) -> Tensor:
    q, ck, lse_BQH, start_BQ, rows_BQ = _contiguous(q, ck, lse_BQH, start_BQ, rows_BQ)
    selection = Selection(num_keys, length, stride, block, count, initial, local, scale)
    with disable_autocast(q):
        return _implementation(q).select(q, ck, lse_BQH, start_BQ, rows_BQ, selection, budget)


@_select.register_fake
def _(q, ck, lse, start, rows, num_keys, length, stride, block, count, initial, local, scale, reuse, *_) -> Tensor:  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1], ck.shape[2], count, dtype=torch.int32)


@torch.library.custom_op("workbench::block_coverage", mutates_args=())
def _coverage(
    q: Tensor,
    ck: Tensor,
    lse_BQH: Tensor,
    start_BQ: Tensor,
    rows_BQ: Tensor,
    counts_K: Tensor,
    num_keys: int,
    length: int,
    stride: int,
    block: int,
    initial: int,
    local: int,
    scale: float,
) -> Tensor:
    # few queries, on any device: the kernels find one number of best blocks, not the order of all
    selection = Selection(num_keys, length, stride, block, 0, initial, local, scale)
    with disable_autocast(q):
        return chunked.coverage(q, ck, lse_BQH, start_BQ, rows_BQ, counts_K, selection)


@_coverage.register_fake
def _(q, ck, lse, start, rows, counts_K, *args) -> Tensor:  # type: ignore[no-untyped-def]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], ck.shape[2], counts_K.shape[0], dtype=wide)


# -- shapes, gradients, FLOPs ----------------------------------------------------------------------------------------


@_visible.register_fake
@_selected.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    value_dim = next(x for x in args if isinstance(x, int))
    return q.new_empty(*q.shape[:-1], value_dim), q.new_empty(
        q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32)
    )


@_visible_backward.register_fake
@_selected_backward.register_fake
def _(do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(0 if v is None else v.shape)


def _save_visible(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, start, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, start, *output)


def _differentiate_visible(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, start, o, lse = ctx.saved_tensors
    dq, dk, dv = _visible_backward(do, dlse, q, k, v, start, o, lse, *ctx.settings)
    return dq, dk, None if v is None else dv, None, *(None for _ in ctx.settings)


def _save_selected(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, starts, start, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, starts, start, *output)


def _differentiate_selected(ctx, do: Tensor, dlse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, starts, start, o, lse = ctx.saved_tensors
    dq, dk, dv = _selected_backward(do.contiguous(), dlse.contiguous(), q, k, v, starts, start, o, lse, *ctx.settings)
    return dq, dk, None if v is None else dv, None, None, *(None for _ in ctx.settings)


_visible.register_autograd(_differentiate_visible, setup_context=_save_visible)
_selected.register_autograd(_differentiate_selected, setup_context=_save_selected)


def _flops(q_shape: Any, K: int, V: int, pairs: int, *, backward: bool) -> int:
    B, _, H, _ = q_shape
    # forward: scores, weighted values; backward: scores again, gradients of values, probabilities, queries and keys
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
    pairs = selected_pairs(q[1], offset + q[1], block, starts[3])
    return _flops(q, q[3], value_dim, pairs, backward=False)


@register_flop_formula(torch.ops.workbench.selected_attention_backward)
def _(do, dlse, q, k, v, starts, start, o, lse, value_dim, offset, block, reuse, scale, **_) -> int:  # type: ignore[no-untyped-def]
    pairs = selected_pairs(q[1], offset + q[1], block, starts[3])
    return _flops(q, q[3], value_dim, pairs, backward=True)


@register_flop_formula(torch.ops.workbench.select_blocks)
def _(q, ck, lse, start, rows, num_keys, length, stride, block, count, initial, local, scale, reuse, *_, **__) -> int:  # type: ignore[no-untyped-def]
    last = (num_keys - 1) // reuse * reuse
    pairs = sum(
        num_visible_blocks(p, length, stride) for p in range(max(0, last - (q[1] - 1) * reuse), last + 1, reuse)
    )
    return 2 * q[0] * q[2] * q[3] * pairs
