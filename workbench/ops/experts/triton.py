# mypy: allow-untyped-defs
"""Rows to the experts and back on GPUs: every byte is moved once, and sums run in one order.

A token's row is read once and written to its K places, or its K rows are read and summed in fp32 and written once; each is
the gradient of the other. The swiglu_grouped activation is one pass forward and one back, in which it is made again. Rows at and
behind ``end``, a number on the device, belong to no expert: they are neither read nor written, whatever they hold. The gradient of
the experts' weights is a product over rows, in which those of the fullest expert are summed one after the other: they begin first.

Legend: N tokens, K choices of a token, R = N·K rows sorted by expert, D width, E experts, F hidden, C categories. What
products compute is multiplied in the type it is in and summed in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHOICES, STEP = 256, 32
"""Choices that one program sorts; how many of them, or of the categories, it holds against each other at once."""
COLUMNS, TILE = 1024, 2048
"""Most columns of a row that a program holds; numbers of one tensor that a program of the swiglu_grouped activation holds."""
LAUNCH = {
    2: {"ROWS": 64, "LEFT": 128, "RIGHT": 128, "num_warps": 4, "num_stages": 3},
    4: {"ROWS": 32, "LEFT": 64, "RIGHT": 64, "num_warps": 4, "num_stages": 2},
}
"""Tiles of the gradient of weights by bytes a number: rows at a time, columns of inputs and of outputs."""
MOST_RANKED = 128
"""Experts up to which every program of that gradient ranks them by their rows; beyond they are taken as they come."""


# -- where rows go -------------------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(chosen, table, R, blocks, C: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr):
    """table[c, block]: choices of this block that are c; those from C on count as C."""
    block = tl.program_id(0)
    at = block * CHOICES + tl.arange(0, CHOICES)
    own = tl.load(chosen + at, mask=at < R, other=-1)
    own = tl.minimum(own, C).to(tl.int32)
    for start in range(0, C + 1, STEP):
        c = start + tl.arange(0, STEP)
        count = tl.sum((own[None, :] == c[:, None]).to(tl.int32), axis=1)
        tl.store(table + c * blocks + block, count, mask=c <= C)


@triton.jit
def _place_kernel(
    chosen, table, ends, row, order, R, blocks, C: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr
):
    """A choice stands behind all of lower categories, of its own in earlier blocks, and of its own before it in this one."""
    block = tl.program_id(0)
    i = tl.arange(0, CHOICES)
    at = block * CHOICES + i
    own = tl.load(chosen + at, mask=at < R, other=-1)
    own = tl.minimum(own, C).to(tl.int32)
    place = tl.zeros((CHOICES,), tl.int32)
    for start in range(0, CHOICES, STEP):
        j = start + tl.arange(0, STEP)
        others = tl.load(chosen + block * CHOICES + j, mask=block * CHOICES + j < R, other=-1)
        others = tl.minimum(others, C).to(tl.int32)
        before = (others[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(before.to(tl.int32), axis=1)
    cell = own * blocks + block
    place += tl.load(ends + cell, mask=at < R, other=0) - tl.load(table + cell, mask=at < R, other=0)
    tl.store(row + at, place.to(tl.int64), mask=at < R)
    tl.store(order + place, at.to(tl.int64), mask=at < R)


@torch.library.custom_op("workbench::expert_routes", mutates_args=())
def sort_choices_triton(chosen_NK: Tensor, categories: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) places, (R,) choices by place, (C,) counts; see :class:`workbench.ops.experts.Routes`.

    By counting, in blocks: no two programs write to one place, so nothing depends on which comes first.
    """
    chosen_NK = chosen_NK.contiguous()
    R = chosen_NK.numel()
    blocks = triton.cdiv(R, CHOICES)
    table = chosen_NK.new_empty(categories + 1, blocks, dtype=torch.int32)
    row, order = torch.empty_like(chosen_NK), chosen_NK.new_empty(R)
    options = {"C": categories, "CHOICES": CHOICES, "STEP": STEP, "num_warps": 8}
    _count_kernel[(blocks,)](chosen_NK, table, R, blocks, **options)
    ends = table.flatten().cumsum(0, dtype=torch.int32)
    _place_kernel[(blocks,)](chosen_NK, table, ends, row, order, R, blocks, **options)
    return row, order, table[:categories].sum(1)


@sort_choices_triton.register_fake
def _(chosen_NK, categories):
    return chosen_NK.new_empty(chosen_NK.shape), chosen_NK.new_empty(chosen_NK.numel()), chosen_NK.new_empty(categories)


# -- to the experts and back ---------------------------------------------------------------------------------------------


@triton.jit
def _dispatch_kernel(x, row, end, y, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(end)
    tile = tl.load(x + n * D + d, mask=d < D, other=0.0)
    for k in tl.static_range(K):
        place = tl.load(row + n * K + k)
        if place < real:
            tl.store(y + place * D + d, tile, mask=d < D)


@triton.jit
def _combine_kernel(y, row, end, x, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(end)
    total, nought = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int64)
    for k in tl.static_range(K):  # masks and no branches: all rows of a token are on their way at once
        place = tl.load(row + n * K + k)
        there = (d < D) & (nought + place < real)
        total += tl.load(y + place * D + d, mask=there, other=0.0).to(tl.float32)
    tl.store(x + n * D + d, total.to(x.dtype.element_ty), mask=d < D)


def _per_token(kernel, rows: Tensor, row_NK: Tensor, end: Tensor, out: Tensor) -> Tensor:
    (N, K), D = row_NK.shape, rows.shape[1]
    block = min(COLUMNS, triton.next_power_of_2(D))
    options = {"K": K, "D": D, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}
    kernel[(N, triton.cdiv(D, block))](rows.contiguous(), row_NK.contiguous(), end, out, **options)
    return out


@torch.library.custom_op("workbench::expert_dispatch", mutates_args=())
def dispatch(x_ND: Tensor, row_NK: Tensor, end: Tensor) -> Tensor:
    """(R, D): every token's row at its places before ``end``."""
    return _per_token(_dispatch_kernel, x_ND, row_NK, end, x_ND.new_empty(row_NK.numel(), x_ND.shape[1]))


@torch.library.custom_op("workbench::expert_combine", mutates_args=())
def combine(y_RD: Tensor, row_NK: Tensor, end: Tensor) -> Tensor:
    """(N, D): the sum of a token's rows before ``end``, in fp32, rounded once."""
    return _per_token(_combine_kernel, y_RD, row_NK, end, y_RD.new_empty(len(row_NK), y_RD.shape[1]))


@dispatch.register_fake
def _(x_ND, row_NK, end):
    return x_ND.new_empty(row_NK.numel(), x_ND.shape[1])


@combine.register_fake
def _(y_RD, row_NK, end):
    return y_RD.new_empty(row_NK.shape[0], y_RD.shape[1])


def _keep_places(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


dispatch.register_autograd(
    lambda ctx, dy_RD: (combine(dy_RD, *ctx.saved_tensors), None, None), setup_context=_keep_places
)
combine.register_autograd(
    lambda ctx, dx_ND: (dispatch(dx_ND, *ctx.saved_tensors), None, None), setup_context=_keep_places
)


# -- between the products ------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(both, weight, end, hidden, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = rows < tl.load(end)
    inside = here[:, None] & (f < F)[None, :]
    at = both + rows[:, None] * (2 * F) + f[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + rows, mask=here, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * value * scale[:, None]
    tl.store(hidden + rows[:, None] * F + f[None, :], out.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    dhidden, both, weight, end, dboth, dweight, R, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Also a row's gradient by its weight, which is 0 for rows of no expert."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < tl.load(end)
    scale = tl.load(weight + rows, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, F, COLUMNS):
        f = start + tl.arange(0, COLUMNS)
        inside = here[:, None] & (f < F)[None, :]
        at = rows[:, None] * (2 * F) + f[None, :]
        gate = tl.load(both + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(both + at + F, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dhidden + rows[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
        p = tl.sigmoid(gate)
        silu = gate * p
        total += tl.sum(slope * silu * value, axis=1)
        slope *= scale[:, None]
        dgate = slope * value * (p + silu * (1.0 - p))
        tl.store(dboth + at, dgate.to(dboth.dtype.element_ty), mask=inside)
        tl.store(dboth + at + F, (slope * silu).to(dboth.dtype.element_ty), mask=inside)
    tl.store(dweight + rows, total.to(dweight.dtype.element_ty), mask=rows < R)


def _tile(F: int) -> dict[str, int]:
    columns = min(COLUMNS, triton.next_power_of_2(F))
    return {"F": F, "ROWS": TILE // columns, "COLUMNS": columns, "num_warps": 4}


@torch.library.custom_op("workbench::expert_swiglu", mutates_args=())
def swiglu_grouped(gate_value_R2F: Tensor, weight_R: Tensor, end: Tensor) -> Tensor:
    """(R, F): w silu(g) v of rows [g | v] before ``end``, in fp32, rounded once."""
    gate_value_R2F, weight_R = gate_value_R2F.contiguous(), weight_R.contiguous()
    R, F = len(gate_value_R2F), gate_value_R2F.shape[1] // 2
    hidden_RF, tile = gate_value_R2F.new_empty(R, F), _tile(F)
    grid = triton.cdiv(R, tile["ROWS"]), triton.cdiv(F, tile["COLUMNS"])
    _swiglu_kernel[grid](gate_value_R2F, weight_R, end, hidden_RF, **tile)
    return hidden_RF


@swiglu_grouped.register_fake
def _(gate_value_R2F, weight_R, end):
    return gate_value_R2F.new_empty(gate_value_R2F.shape[0], gate_value_R2F.shape[1] // 2)


@torch.library.custom_op("workbench::expert_swiglu_backward", mutates_args=())
def _swiglu_backward(
    dhidden_RF: Tensor, gate_value_R2F: Tensor, weight_R: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    dhidden_RF, gate_value_R2F, weight_R = dhidden_RF.contiguous(), gate_value_R2F.contiguous(), weight_R.contiguous()
    R, F = dhidden_RF.shape
    dgate_value_R2F, dweight_R, tile = torch.empty_like(gate_value_R2F), torch.empty_like(weight_R), _tile(F)
    _swiglu_backward_kernel[(triton.cdiv(R, tile["ROWS"]),)](
        dhidden_RF, gate_value_R2F, weight_R, end, dgate_value_R2F, dweight_R, R, **tile
    )
    return dgate_value_R2F, dweight_R


@_swiglu_backward.register_fake
def _(dhidden_RF, gate_value_R2F, weight_R, end):
    return gate_value_R2F.new_empty(gate_value_R2F.shape), weight_R.new_empty(weight_R.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu_grouped.register_autograd(
    lambda ctx, dhidden_RF: (*_swiglu_backward(dhidden_RF, *ctx.saved_tensors), None), setup_context=_keep
)


# -- the gradient of weights ---------------------------------------------------------------------------------------------


@triton.jit
def _fullest(ends, rank, E: tl.constexpr, WIDE: tl.constexpr):
    """The expert of this rank by its rows; of equal ones the first."""
    e = tl.arange(0, WIDE)
    rows = tl.load(ends + e, mask=e < E, other=0) - tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    rows = tl.where(e < E, rows, -1)
    ahead = (rows[None, :] > rows[:, None]) | ((rows[None, :] == rows[:, None]) & (e[None, :] < e[:, None]))
    return tl.sum(tl.where(tl.sum(ahead.to(tl.int32), axis=1) == rank, e, 0), axis=0)


@triton.jit
def _weight_gradient_kernel(
    x,
    dy,
    ends,
    dw,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw = xᵀ dy over the rows of one expert: a tile of (D, F). Tiles of one expert run side by side and share what they read."""
    across: tl.constexpr = (F + RIGHT - 1) // RIGHT
    tiles: tl.constexpr = (D + LEFT - 1) // LEFT * across
    e = tl.program_id(0) // tiles
    if WIDE > 0:
        e = _fullest(ends, e, E, WIDE)
    tile = tl.program_id(0) % tiles
    d = tile // across * LEFT + tl.arange(0, LEFT)
    f = tile % across * RIGHT + tl.arange(0, RIGHT)
    end = tl.load(ends + e)
    start = tl.load(ends + e - 1, mask=e > 0, other=0)
    total = tl.zeros((LEFT, RIGHT), tl.float32)
    r = start.to(tl.int64) + tl.arange(0, ROWS)
    at_x, at_dy = x + r[:, None] * D + d[None, :], dy + r[:, None] * F + f[None, :]
    whole = (end - start) // ROWS
    for _ in range(whole):  # without a mask over rows
        left = tl.load(at_x, mask=(d < D)[None, :], other=0.0)
        right = tl.load(at_dy, mask=(f < F)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        at_x += ROWS * D
        at_dy += ROWS * F
    here = (r + whole * ROWS < end)[:, None]
    left = tl.load(at_x, mask=here & (d < D)[None, :], other=0.0)
    right = tl.load(at_dy, mask=here & (f < F)[None, :], other=0.0)
    total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    at = dw + e.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
    tl.store(at, total.to(dw.dtype.element_ty), mask=(d < D)[:, None] & (f < F)[None, :])


def weight_gradient(x_RD: Tensor, dy_RF: Tensor, ends_E: Tensor) -> Tensor:
    """(E, D, F): xᵀ dy over the rows of every expert, summed in fp32 and rounded once; zero where an expert has none."""
    x_RD, dy_RF = x_RD.contiguous(), dy_RF.contiguous()
    E, D, F = len(ends_E), x_RD.shape[1], dy_RF.shape[1]
    dw_EDF, launch = x_RD.new_empty(E, D, F), LAUNCH[x_RD.element_size()]
    grid = (E * triton.cdiv(D, launch["LEFT"]) * triton.cdiv(F, launch["RIGHT"]),)
    wide = triton.next_power_of_2(E) if E <= MOST_RANKED else 0
    _weight_gradient_kernel[grid](x_RD, dy_RF, ends_E, dw_EDF, E=E, D=D, F=F, WIDE=wide, PRECISION="tf32x3", **launch)
    return dw_EDF
