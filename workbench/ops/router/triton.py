# mypy: allow-untyped-defs
"""The router on GPUs: three small products in fp32 on tensor cores, and the largest of few scores.

Every fp32 number is split into two of tf32 and three products of them are made; the sum over the steps of a program's loop is left
outside the tensor cores, which cut off where fp32 rounds (seen in the code that Triton 3.6 makes for sm_90).

Legend: N tokens, D width, C categories, K choices of a token. A program holds ``TOKENS`` tokens (twice as many for the gradient by
x), up to ``CATEGORIES`` categories and ``COLUMNS`` columns of the width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

TOKENS, CATEGORIES, COLUMNS = 64, 128, 32
SPAN = 1024
"""Tokens that one program sums up for the gradient of the weights; what the programs have is added up in order."""
SCORES = 2048
"""Scores among which one program looks for the largest."""


@triton.jit
def _tile(x, rows, columns, R, S: tl.constexpr):
    """x[rows, columns] of (R, S), fp32, zero beyond."""
    inside = (rows < R)[:, None] & (columns < S)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * S + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, rows, columns, R, S: tl.constexpr):
    inside = (rows < R)[:, None] & (columns < S)[None, :]
    at = x + rows.to(tl.int64)[:, None] * S + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


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
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CATEGORIES + tl.arange(0, CATEGORIES)
    total = tl.zeros((TOKENS, CATEGORIES), tl.float32)
    for start in range(0, D, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        total = tl.dot(_tile(x, n, d, N, D), tl.trans(_tile(weight, c, d, C, D)), total, input_precision="tf32x3")
    _store(y, total, n, c, N, C)


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
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, C, CATEGORIES):
        c = start + tl.arange(0, CATEGORIES)
        total = tl.dot(_tile(dy, n, c, N, C), _tile(weight, c, d, C, D), total, input_precision="tf32x3")
    _store(dx, total, n, d, N, D)


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
    """What one span of tokens adds to dW = dyᵀ x."""
    span = tl.program_id(0)
    c = tl.program_id(1) * CATEGORIES + tl.arange(0, CATEGORIES)
    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((CATEGORIES, COLUMNS), tl.float32)
    for start in range(0, SPAN, TOKENS):
        n = span * SPAN + start + tl.arange(0, TOKENS)
        total = tl.dot(tl.trans(_tile(dy, n, c, N, C)), _tile(x, n, d, N, D), total, input_precision="tf32x3")
    _store(part + span.to(tl.int64) * C * D, total, c, d, C, D)


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
    spans, places = triton.cdiv(N, SPAN), triton.cdiv(D, columns)
    part = x_ND.new_empty(spans, C, D, dtype=torch.float32)
    options = {**blocks, "COLUMNS": columns}
    _input_kernel[(triton.cdiv(N, 2 * TOKENS), places)](
        dy_NC,
        weight_CD,
        dx_ND,
        N,
        C,
        D,
        # half the programs read the weights half as often
        **{**options, "TOKENS": 2 * TOKENS, "CATEGORIES": min(32, blocks["CATEGORIES"]), "num_warps": 4},
    )
    grid = spans, triton.cdiv(C, blocks["CATEGORIES"]), places
    _weight_kernel[grid](dy_NC, x_ND, part, N, C, D, SPAN=SPAN, **{**options, "TOKENS": min(32, TOKENS)})
    return dx_ND, part.sum(0).to(weight_CD.dtype)


@_logits_backward.register_fake
def _(dy_NC, x_ND, weight_CD):
    return x_ND.new_empty(x_ND.shape), weight_CD.new_empty(weight_CD.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


logits.register_autograd(lambda ctx, dy_NC: _logits_backward(dy_NC, *ctx.saved_tensors), setup_context=_keep)


@register_flop_formula(torch.ops.workbench.router_logits, get_raw=True)
def _logits_flops(x_ND, weight_CD, *args, **kwargs) -> int:
    return 2 * x_ND.shape[0] * weight_CD.numel()


@register_flop_formula(torch.ops.workbench.router_logits_backward, get_raw=True)
def _logits_backward_flops(dy_NC, x_ND, weight_CD, *args, **kwargs) -> int:
    return 4 * x_ND.shape[0] * weight_CD.numel()


# -- the largest ---------------------------------------------------------------------------------------------------------


@triton.jit
def _topk_kernel(score, chosen, N, K, C: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Scores as integers of the same order with their category below them: all are different, so the largest is one."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)
    inside = (n < N)[:, None] & (c < C)[None, :]
    value = tl.load(score + n[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    least = -9223372036854775808
    key = tl.where((c < C)[None, :], bits.to(tl.int64) * 4294967296 + (WIDE - 1 - c)[None, :], least)
    for k in range(K):
        top = tl.max(key, axis=1)
        tl.store(chosen + n * K + k, WIDE - 1 - (top & 0xFFFFFFFF), mask=n < N)
        key = tl.where(key == top[:, None], least, key)


@torch.library.custom_op("workbench::router_topk", mutates_args=())
def topk_indices(score_NC: Tensor, K: int) -> Tensor:
    """(N, K) categories in the order of their scores; of equal ones the first, and NaN above all."""
    score_NC = score_NC.contiguous()
    (N, C), wide = score_NC.shape, max(16, triton.next_power_of_2(score_NC.shape[1]))
    chosen_NK = score_NC.new_empty(N, K, dtype=torch.int64)
    rows = max(1, SCORES // wide)
    _topk_kernel[(triton.cdiv(N, rows),)](score_NC, chosen_NK, N, K, C, ROWS=rows, WIDE=wide, num_warps=4)
    return chosen_NK


@topk_indices.register_fake
def _(score_NC, K):
    return score_NC.new_empty(score_NC.shape[0], K, dtype=torch.int64)
