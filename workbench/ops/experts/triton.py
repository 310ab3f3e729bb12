# mypy: allow-untyped-defs
"""Routing and activation of experts on GPUs: every byte is moved once, and sums run in one order.

Dispatch reads a token's row once and writes it to its K rows; combine reads these, sums them in fp32 and writes the
sum; each is the gradient of the other. The SwiGLU activation is one pass forward and one backward, which recomputes it.
Rows from ``end`` on, a number on the device, belong to no expert: they are neither read nor written, whatever they
hold. The gradient of the experts' weights is a product over rows, in which the rows of one expert are summed one after
the other: the experts with most rows start first.

Legend: N tokens, K choices of a token, R = N·K rows sorted by expert, D width, E experts, F hidden, C categories.
Factors of products keep their dtype; sums are fp32. Naming as in flash-linear-attention: ``i_`` program indices, ``o_``
offsets, ``m_`` masks, ``p_`` pointers, ``b_`` tiles in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHOICES, STEP = 256, 32
"""Choices that one program sorts; how many of them, or of the categories, it compares at once."""
COLUMNS, TILE = 1024, 2048
"""Most columns of a row in one program; elements of one tensor in one program of the activation."""
LAUNCH = {
    2: {"ROWS": 64, "LEFT": 128, "RIGHT": 128, "num_warps": 4, "num_stages": 3},
    4: {"ROWS": 32, "LEFT": 64, "RIGHT": 64, "num_warps": 4, "num_stages": 2},
}
"""Tiles of the weights' gradient by bytes per element: rows at a time, columns of inputs and of outputs."""
MAX_RANKED = 128
"""Most experts that the programs of that gradient rank by their rows; beyond, they run in the given order."""


# -- sorting choices -------------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(chosen, table, R, blocks, C: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr):
    """table[c, block]: number of choices of c in this block; categories from C on count as C."""
    i_block = tl.program_id(0)
    o_r = i_block * CHOICES + tl.arange(0, CHOICES)
    b_chosen = tl.load(chosen + o_r, mask=o_r < R, other=-1)
    b_chosen = tl.minimum(b_chosen, C).to(tl.int32)
    for start in range(0, C + 1, STEP):
        o_c = start + tl.arange(0, STEP)
        b_count = tl.sum((b_chosen[None, :] == o_c[:, None]).to(tl.int32), axis=1)
        tl.store(table + o_c * blocks + i_block, b_count, mask=o_c <= C)


@triton.jit
def _rank_kernel(
    chosen, table, ends, row, order, R, blocks, C: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr
):
    """The row of a choice: the number of choices of lower categories, of its own in earlier blocks, and of its own
    before it in this block."""
    i_block = tl.program_id(0)
    o_i = tl.arange(0, CHOICES)
    o_r = i_block * CHOICES + o_i
    b_chosen = tl.load(chosen + o_r, mask=o_r < R, other=-1)
    b_chosen = tl.minimum(b_chosen, C).to(tl.int32)
    # 1. equal choices before it in this block
    b_row = tl.zeros((CHOICES,), tl.int32)
    for start in range(0, CHOICES, STEP):
        o_j = start + tl.arange(0, STEP)
        b_other = tl.load(chosen + i_block * CHOICES + o_j, mask=i_block * CHOICES + o_j < R, other=-1)
        b_other = tl.minimum(b_other, C).to(tl.int32)
        is_before = (b_other[None, :] == b_chosen[:, None]) & (o_j[None, :] < o_i[:, None])
        b_row += tl.sum(is_before.to(tl.int32), axis=1)
    # 2. all other choices before it
    o_cell = b_chosen * blocks + i_block
    b_row += tl.load(ends + o_cell, mask=o_r < R, other=0) - tl.load(table + o_cell, mask=o_r < R, other=0)
    tl.store(row + o_r, b_row.to(tl.int64), mask=o_r < R)
    tl.store(order + b_row, o_r.to(tl.int64), mask=o_r < R)


@torch.library.custom_op("workbench::expert_routes", mutates_args=())
def sort_choices_triton(chosen_NK: Tensor, categories: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) rows of choices, (R,) choices of rows, (C,) counts; see :class:`workbench.ops.experts.Routes`.

    A counting sort in blocks: no two programs write to one address, so the result does not depend on their order.
    """
    chosen_NK = chosen_NK.contiguous()
    R = chosen_NK.numel()
    blocks = triton.cdiv(R, CHOICES)
    table = chosen_NK.new_empty(categories + 1, blocks, dtype=torch.int32)
    row, order = torch.empty_like(chosen_NK), chosen_NK.new_empty(R)
    options = {"C": categories, "CHOICES": CHOICES, "STEP": STEP, "num_warps": 8}
    _count_kernel[(blocks,)](chosen_NK, table, R, blocks, **options)
    ends = table.flatten().cumsum(0, dtype=torch.int32)
    _rank_kernel[(blocks,)](chosen_NK, table, ends, row, order, R, blocks, **options)
    return row, order, table[:categories].sum(1)


@sort_choices_triton.register_fake
def _(chosen_NK, categories):
    return chosen_NK.new_empty(chosen_NK.shape), chosen_NK.new_empty(chosen_NK.numel()), chosen_NK.new_empty(categories)


# -- dispatch and combine --------------------------------------------------------------------------------------------


@triton.jit
def _dispatch_kernel(x, row, end, y, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_rows = tl.load(end)
    b_x = tl.load(x + i_n * D + o_d, mask=o_d < D, other=0.0)
    for k in tl.static_range(K):
        i_row = tl.load(row + i_n * K + k)
        if i_row < num_rows:
            tl.store(y + i_row * D + o_d, b_x, mask=o_d < D)


@triton.jit
def _combine_kernel(y, row, end, x, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_rows = tl.load(end)
    b_sum, zeros = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int64)
    for k in tl.static_range(K):  # masks instead of branches: all rows of a token are loaded at once
        i_row = tl.load(row + i_n * K + k)
        mask = (o_d < D) & (zeros + i_row < num_rows)
        b_sum += tl.load(y + i_row * D + o_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + i_n * D + o_d, b_sum.to(x.dtype.element_ty), mask=o_d < D)


def _per_token(kernel, rows: Tensor, row_NK: Tensor, end: Tensor, out: Tensor) -> Tensor:
    (N, K), D = row_NK.shape, rows.shape[1]
    block = min(COLUMNS, triton.next_power_of_2(D))
    options = {"K": K, "D": D, "BLOCK": block, "num_warps": max(1, min(4, block // 256))}
    kernel[(N, triton.cdiv(D, block))](rows.contiguous(), row_NK.contiguous(), end, out, **options)
    return out


@torch.library.custom_op("workbench::expert_dispatch", mutates_args=())
def dispatch(x_ND: Tensor, row_NK: Tensor, end: Tensor) -> Tensor:
    """(R, D): the token of each row before ``end``."""
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


def _save_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


dispatch.register_autograd(
    lambda ctx, dy_RD: (combine(dy_RD, *ctx.saved_tensors), None, None), setup_context=_save_rows
)
combine.register_autograd(
    lambda ctx, dx_ND: (dispatch(dx_ND, *ctx.saved_tensors), None, None), setup_context=_save_rows
)


# -- activation ------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(gate_value, weight, end, hidden, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_r = o_r < tl.load(end)
    mask = m_r[:, None] & (o_f < F)[None, :]
    # [ROWS, COLUMNS]
    p_gate = gate_value + o_r[:, None] * (2 * F) + o_f[None, :]
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    b_value = tl.load(p_gate + F, mask=mask, other=0.0).to(tl.float32)
    b_weight = tl.load(weight + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_hidden = b_gate * tl.sigmoid(b_gate) * b_value * b_weight[:, None]
    tl.store(hidden + o_r[:, None] * F + o_f[None, :], b_hidden.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dhidden,
    gate_value,
    weight,
    end,
    dgate_value,
    dweight,
    R,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Also the gradient of every row's weight, which is 0 for rows of no expert."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < tl.load(end)
    b_weight = tl.load(weight + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((ROWS,), tl.float32)
    for start in range(0, F, COLUMNS):
        o_f = start + tl.arange(0, COLUMNS)
        mask = m_r[:, None] & (o_f < F)[None, :]
        # [ROWS, COLUMNS]
        o_gate = o_r[:, None] * (2 * F) + o_f[None, :]
        b_gate = tl.load(gate_value + o_gate, mask=mask, other=0.0).to(tl.float32)
        b_value = tl.load(gate_value + o_gate + F, mask=mask, other=0.0).to(tl.float32)
        b_dhidden = tl.load(dhidden + o_r[:, None] * F + o_f[None, :], mask=mask, other=0.0).to(tl.float32)
        b_sigmoid = tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        b_dweight += tl.sum(b_dhidden * b_silu * b_value, axis=1)
        b_dhidden *= b_weight[:, None]
        b_dgate = b_dhidden * b_value * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
        tl.store(dgate_value + o_gate, b_dgate.to(dgate_value.dtype.element_ty), mask=mask)
        tl.store(dgate_value + o_gate + F, (b_dhidden * b_silu).to(dgate_value.dtype.element_ty), mask=mask)
    tl.store(dweight + o_r, b_dweight.to(dweight.dtype.element_ty), mask=o_r < R)


def _tile_sizes(F: int) -> dict[str, int]:
    columns = min(COLUMNS, triton.next_power_of_2(F))
    return {"F": F, "ROWS": TILE // columns, "COLUMNS": columns, "num_warps": 4}


@torch.library.custom_op("workbench::expert_swiglu", mutates_args=())
def swiglu_grouped(gate_value_R2F: Tensor, weight_R: Tensor, end: Tensor) -> Tensor:
    """(R, F): w silu(g) v of rows [g | v] before ``end``, in fp32, rounded once."""
    gate_value_R2F, weight_R = gate_value_R2F.contiguous(), weight_R.contiguous()
    R, F = len(gate_value_R2F), gate_value_R2F.shape[1] // 2
    hidden_RF, tile = gate_value_R2F.new_empty(R, F), _tile_sizes(F)
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
    dgate_value_R2F, dweight_R, tile = torch.empty_like(gate_value_R2F), torch.empty_like(weight_R), _tile_sizes(F)
    _swiglu_backward_kernel[(triton.cdiv(R, tile["ROWS"]),)](
        dhidden_RF, gate_value_R2F, weight_R, end, dgate_value_R2F, dweight_R, R, **tile
    )
    return dgate_value_R2F, dweight_R


@_swiglu_backward.register_fake
def _(dhidden_RF, gate_value_R2F, weight_R, end):
    return gate_value_R2F.new_empty(gate_value_R2F.shape), weight_R.new_empty(weight_R.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


swiglu_grouped.register_autograd(
    lambda ctx, dhidden_RF: (*_swiglu_backward(dhidden_RF, *ctx.saved_tensors), None), setup_context=_save
)


# -- gradient of the weights -----------------------------------------------------------------------------------------


@triton.jit
def _expert_of_rank(ends, rank, E: tl.constexpr, WIDE: tl.constexpr):
    """The expert of this rank by its number of rows, in descending order; of equal ones the first."""
    o_e = tl.arange(0, WIDE)
    b_rows = tl.load(ends + o_e, mask=o_e < E, other=0) - tl.load(ends + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
    b_rows = tl.where(o_e < E, b_rows, -1)
    is_tie = (b_rows[None, :] == b_rows[:, None]) & (o_e[None, :] < o_e[:, None])
    is_before = (b_rows[None, :] > b_rows[:, None]) | is_tie
    return tl.sum(tl.where(tl.sum(is_before.to(tl.int32), axis=1) == rank, o_e, 0), axis=0)


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
    """dw = xᵀ dy over the rows of one expert: a tile of (D, F). Tiles of one expert are consecutive and share what they
    load."""
    tiles_f: tl.constexpr = (F + RIGHT - 1) // RIGHT
    tiles: tl.constexpr = (D + LEFT - 1) // LEFT * tiles_f
    i_e = tl.program_id(0) // tiles
    if WIDE > 0:
        i_e = _expert_of_rank(ends, i_e, E, WIDE)
    i_tile = tl.program_id(0) % tiles
    o_d = i_tile // tiles_f * LEFT + tl.arange(0, LEFT)
    o_f = i_tile % tiles_f * RIGHT + tl.arange(0, RIGHT)
    end = tl.load(ends + i_e)
    start = tl.load(ends + i_e - 1, mask=i_e > 0, other=0)
    b_dw = tl.zeros((LEFT, RIGHT), tl.float32)
    o_r = start.to(tl.int64) + tl.arange(0, ROWS)
    p_x, p_dy = x + o_r[:, None] * D + o_d[None, :], dy + o_r[:, None] * F + o_f[None, :]
    # 1. whole tiles of rows, without a mask over rows
    num_whole = (end - start) // ROWS
    for _ in range(num_whole):
        # [ROWS, LEFT], [ROWS, RIGHT]
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
        b_dy = tl.load(p_dy, mask=(o_f < F)[None, :], other=0.0)
        b_dw = tl.dot(tl.trans(b_x), b_dy, b_dw, input_precision=PRECISION)
        p_x += ROWS * D
        p_dy += ROWS * F
    # 2. the remaining rows
    m_r = (o_r + num_whole * ROWS < end)[:, None]
    b_x = tl.load(p_x, mask=m_r & (o_d < D)[None, :], other=0.0)
    b_dy = tl.load(p_dy, mask=m_r & (o_f < F)[None, :], other=0.0)
    b_dw = tl.dot(tl.trans(b_x), b_dy, b_dw, input_precision=PRECISION)
    p_dw = dw + i_e.to(tl.int64) * D * F + o_d[:, None] * F + o_f[None, :]
    tl.store(p_dw, b_dw.to(dw.dtype.element_ty), mask=(o_d < D)[:, None] & (o_f < F)[None, :])


def weight_gradient(x_RD: Tensor, dy_RF: Tensor, ends_E: Tensor) -> Tensor:
    """(E, D, F): xᵀ dy over the rows of every expert, summed in fp32 and rounded once; zero where an expert has
    none."""
    x_RD, dy_RF = x_RD.contiguous(), dy_RF.contiguous()
    E, D, F = len(ends_E), x_RD.shape[1], dy_RF.shape[1]
    dw_EDF, launch = x_RD.new_empty(E, D, F), LAUNCH[x_RD.element_size()]
    grid = (E * triton.cdiv(D, launch["LEFT"]) * triton.cdiv(F, launch["RIGHT"]),)
    wide = triton.next_power_of_2(E) if E <= MAX_RANKED else 0
    _weight_gradient_kernel[grid](x_RD, dy_RF, ends_E, dw_EDF, E=E, D=D, F=F, WIDE=wide, PRECISION="tf32x3", **launch)
    return dw_EDF
