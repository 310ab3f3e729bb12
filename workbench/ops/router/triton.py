# mypy: allow-untyped-defs
"""The router on GPUs: three small fp32 products on tensor cores, and the top K of a few scores.

Every fp32 number is split into two tf32 numbers, of which three products are computed. The sum over the steps of a
program's loop is kept outside the tensor cores, which truncate where fp32 rounds (seen in the code that Triton 3.6
generates for sm_90).

Legend: N tokens, D width, C categories, K choices of a token. A program computes ``TOKENS`` tokens (twice as many for
the gradient of x), up to ``CATEGORIES`` categories and ``COLUMNS`` columns of the width. Naming as in
flash-linear-attention: ``o_`` offsets, ``b_`` tiles in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

TOKENS, CATEGORIES, COLUMNS = 64, 128, 32
SPAN = 1024
"""Tokens that one program sums for the gradient of the weights; these partial sums are added in a fixed order."""
SCORES = 2048
"""Scores of one program of the top-K kernel."""


@triton.jit
def _load_tile(x, o_row, o_column, R, S: tl.constexpr):
    """x[rows, columns] of (R, S), fp32, zero out of bounds."""
    in_bounds = (o_row < R)[:, None] & (o_column < S)[None, :]
    return tl.load(x + o_row.to(tl.int64)[:, None] * S + o_column[None, :], mask=in_bounds, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(x, b_x, o_row, o_column, R, S: tl.constexpr):
    in_bounds = (o_row < R)[:, None] & (o_column < S)[None, :]
    p = x + o_row.to(tl.int64)[:, None] * S + o_column[None, :]
    tl.store(p, b_x.to(x.dtype.element_ty), mask=in_bounds)


@triton.jit
def _logits_kernel(
    x,
    weight,
    y,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CATEGORIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = x Wᵀ."""
    o_n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o_c = tl.program_id(1) * CATEGORIES + tl.arange(0, CATEGORIES)
    b_sum = tl.zeros((TOKENS, CATEGORIES), tl.float32)
    for start in range(0, D, COLUMNS):
        o_d = start + tl.arange(0, COLUMNS)
        b_x = _load_tile(x, o_n, o_d, N, D)  # [TOKENS, COLUMNS]
        b_wT = tl.trans(_load_tile(weight, o_c, o_d, C, D))  # [COLUMNS, CATEGORIES]
        b_sum = tl.dot(b_x, b_wT, b_sum, input_precision="tf32x3")
    _store_tile(y, b_sum, o_n, o_c, N, C)


@triton.jit
def _input_kernel(
    dy,
    weight,
    dx,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CATEGORIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = dy W."""
    o_n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, C, CATEGORIES):
        o_c = start + tl.arange(0, CATEGORIES)
        b_dy = _load_tile(dy, o_n, o_c, N, C)  # [TOKENS, CATEGORIES]
        b_w = _load_tile(weight, o_c, o_d, C, D)  # [CATEGORIES, COLUMNS]
        b_sum = tl.dot(b_dy, b_w, b_sum, input_precision="tf32x3")
    _store_tile(dx, b_sum, o_n, o_d, N, D)


@triton.jit
def _weight_kernel(
    dy,
    x,
    part,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    CATEGORIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The contribution of one span of tokens to dW = dyᵀ x."""
    i_span = tl.program_id(0)
    o_c = tl.program_id(1) * CATEGORIES + tl.arange(0, CATEGORIES)
    o_d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros((CATEGORIES, COLUMNS), tl.float32)
    for start in range(0, SPAN, TOKENS):
        o_n = i_span * SPAN + start + tl.arange(0, TOKENS)
        b_dyT = tl.trans(_load_tile(dy, o_n, o_c, N, C))  # [CATEGORIES, TOKENS]
        b_x = _load_tile(x, o_n, o_d, N, D)  # [TOKENS, COLUMNS]
        b_sum = tl.dot(b_dyT, b_x, b_sum, input_precision="tf32x3")
    _store_tile(part + i_span.to(tl.int64) * C * D, b_sum, o_c, o_d, C, D)


def _blocks(C: int) -> dict[str, int]:
    categories = max(16, min(CATEGORIES, triton.next_power_of_2(C)))
    return {"TOKENS": TOKENS, "CATEGORIES": categories, "num_warps": 8 if categories > 64 else 4}


@torch.library.custom_op("workbench::router_logits", mutates_args=())
def logits(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """(N, C) W x in fp32."""
    x_ND, weight_CD = x_ND.contiguous(), weight_CD.contiguous()
    (N, D), C, blocks = x_ND.shape, len(weight_CD), _blocks(len(weight_CD))
    y_NC = x_ND.new_empty(N, C, dtype=torch.float32)
    grid = triton.cdiv(N, TOKENS), triton.cdiv(C, blocks["CATEGORIES"])
    _logits_kernel[grid](x_ND, weight_CD, y_NC, N, C, D, **blocks, COLUMNS=COLUMNS)
    return y_NC


@logits.register_fake
def _(x_ND, weight_CD):
    return x_ND.new_empty(x_ND.shape[0], weight_CD.shape[0], dtype=torch.float32)


@torch.library.custom_op("workbench::router_logits_backward", mutates_args=())
def _logits_backward(dy_NC: Tensor, x_ND: Tensor, weight_CD: Tensor) -> tuple[Tensor, Tensor]:
    dy_NC, x_ND, weight_CD = dy_NC.contiguous(), x_ND.contiguous(), weight_CD.contiguous()
    (N, D), C, blocks, columns = x_ND.shape, len(weight_CD), _blocks(len(weight_CD)), 2 * COLUMNS
    dx_ND = torch.empty_like(x_ND)
    spans, tiles = triton.cdiv(N, SPAN), triton.cdiv(D, columns)
    part = x_ND.new_empty(spans, C, D, dtype=torch.float32)
    options = {**blocks, "COLUMNS": columns}
    _input_kernel[(triton.cdiv(N, 2 * TOKENS), tiles)](
        dy_NC,
        weight_CD,
        dx_ND,
        N,
        C,
        D,
        # with half the programs, the weights are read half as often
        **{**options, "TOKENS": 2 * TOKENS, "CATEGORIES": min(32, blocks["CATEGORIES"]), "num_warps": 4},
    )
    grid = spans, triton.cdiv(C, blocks["CATEGORIES"]), tiles
    _weight_kernel[grid](dy_NC, x_ND, part, N, C, D, SPAN=SPAN, **{**options, "TOKENS": min(32, TOKENS)})
    return dx_ND, part.sum(0).to(weight_CD.dtype)


@_logits_backward.register_fake
def _(dy_NC, x_ND, weight_CD):
    return x_ND.new_empty(x_ND.shape), weight_CD.new_empty(weight_CD.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


logits.register_autograd(lambda ctx, dy_NC: _logits_backward(dy_NC, *ctx.saved_tensors), setup_context=_save)


@register_flop_formula(torch.ops.workbench.router_logits, get_raw=True)
def _logits_flops(x_ND, weight_CD, *args, **kwargs) -> int:
    return 2 * x_ND.shape[0] * weight_CD.numel()


@register_flop_formula(torch.ops.workbench.router_logits_backward, get_raw=True)
def _logits_backward_flops(dy_NC, x_ND, weight_CD, *args, **kwargs) -> int:
    return 4 * x_ND.shape[0] * weight_CD.numel()


# -- top K ------------------------------------------------------------------------------------------------------------


@triton.jit
def _topk_kernel(score, chosen, N, K, C: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Compares integers of the order of the scores, with the category in the low bits: no two are equal."""
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, WIDE)
    in_bounds = (o_n < N)[:, None] & (o_c < C)[None, :]
    # [ROWS, WIDE]
    b_score = tl.load(score + o_n[:, None] * C + o_c[None, :], mask=in_bounds, other=0.0).to(tl.float32)
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    lowest = -9223372036854775808
    b_key = tl.where((o_c < C)[None, :], b_bits.to(tl.int64) * 4294967296 + (WIDE - 1 - o_c)[None, :], lowest)
    for k in range(K):
        b_max = tl.max(b_key, axis=1)
        tl.store(chosen + o_n * K + k, WIDE - 1 - (b_max & 0xFFFFFFFF), mask=o_n < N)
        b_key = tl.where(b_key == b_max[:, None], lowest, b_key)


@torch.library.custom_op("workbench::router_topk", mutates_args=())
def topk_indices(score_NC: Tensor, K: int) -> Tensor:
    """(N, K) categories in descending order of their scores; of equal scores the first, NaN above all."""
    score_NC = score_NC.contiguous()
    (N, C), wide = score_NC.shape, max(16, triton.next_power_of_2(score_NC.shape[1]))
    chosen_NK = score_NC.new_empty(N, K, dtype=torch.int64)
    rows = max(1, SCORES // wide)
    _topk_kernel[(triton.cdiv(N, rows),)](score_NC, chosen_NK, N, K, C, ROWS=rows, WIDE=wide, num_warps=4)
    return chosen_NK


@topk_indices.register_fake
def _(score_NC, K):
    return score_NC.new_empty(score_NC.shape[0], K, dtype=torch.int64)
