# mypy: allow-untyped-defs
"""Short convolution on GPUs: one pass forward, two back, in which the convolution is made again.

Legend: B batch, T time, C channels, W width. A program holds ``ROWS`` tokens of ``COLUMNS`` channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64


@triton.jit
def _same(segments, own, at, there, SEGMENTS: tl.constexpr):
    """Which rows ``at`` are there and hold the document ``own``."""
    if SEGMENTS:
        there &= tl.load(segments + at, mask=there, other=0) == own
    return there


@triton.jit
def _place(x, b, T, C, rows, c):
    """Where tokens ``rows`` of channels ``c`` of sequence ``b`` stand."""
    return x + b * T * C + rows.to(tl.int64)[:, None] * C + c[None, :]


@triton.jit
def _convolved(x, weight, segments, own, b, rows, c, T, C: tl.constexpr, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """Σ_j w_j x_{t-j}, fp32."""
    total = tl.zeros((rows.shape[0], c.shape[0]), tl.float32)
    for back in tl.static_range(W):
        there = _same(segments, own, rows - back, (rows >= back) & (rows < T), SEGMENTS)
        tile = tl.load(_place(x, b, T, C, rows, c) - back * C, mask=there[:, None] & (c < C)[None, :], other=0.0)
        total += tile.to(tl.float32) * tl.load(weight + c * W + back, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _forward_kernel(
    x,
    weight,
    segments,
    y,
    T,
    C: tl.constexpr,
    W: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_c = (c < C)[None, :]
    segments += b * T
    own = tl.load(segments + rows, mask=rows < T, other=0) if SEGMENTS else rows
    total = _convolved(x, weight, segments, own, b, rows, c, T, C, W, SEGMENTS)
    out = total * tl.sigmoid(total)
    tl.store(_place(y, b, T, C, rows, c), out.to(y.dtype.element_ty), mask=(rows < T)[:, None] & in_c)


@triton.jit
def _slope_kernel(
    x, weight, segments, dy, ds, dweight, T, C: tl.constexpr, W: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ds = dy silu'(s), s the convolution made again, and what every program adds to dw_j = Σ_t ds_t x_{t-j}."""
    b, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_c = (c < C)[None, :]
    segments += b * T
    own = tl.load(segments + rows, mask=rows < T, other=0) if SEGMENTS else rows
    s = _convolved(x, weight, segments, own, b, rows, c, T, C, W, SEGMENTS)
    inside = (rows < T)[:, None] & in_c
    slope = tl.load(_place(dy, b, T, C, rows, c), mask=inside, other=0.0).to(tl.float32)
    p = tl.sigmoid(s)
    slope *= p * (1.0 + s * (1.0 - p))
    tl.store(_place(ds, b, T, C, rows, c), slope.to(ds.dtype.element_ty), mask=inside)
    part = dweight + (b * tl.num_programs(1) + block) * C * W
    for back in tl.static_range(W):  # read again, from the nearest cache: four tiles at once would not fit
        there = _same(segments, own, rows - back, (rows >= back) & (rows < T), SEGMENTS)
        tile = tl.load(_place(x, b, T, C, rows, c) - back * C, mask=there[:, None] & in_c, other=0.0)
        tl.store(part + c * W + back, tl.sum(slope * tile.to(tl.float32), axis=0), mask=c < C)


@triton.jit
def _input_kernel(
    ds,
    weight,
    segments,
    dx,
    T,
    C: tl.constexpr,
    W: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx_t = Σ_j w_j ds_{t+j}."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_c = (c < C)[None, :]
    segments += b * T
    own = tl.load(segments + rows, mask=rows < T, other=0) if SEGMENTS else rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for ahead in tl.static_range(W):
        there = _same(segments, own, rows + ahead, rows < T - ahead, SEGMENTS)
        tile = tl.load(_place(ds, b, T, C, rows, c) + ahead * C, mask=there[:, None] & in_c, other=0.0)
        total += tile.to(tl.float32) * tl.load(weight + c * W + ahead, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(_place(dx, b, T, C, rows, c), total.to(dx.dtype.element_ty), mask=(rows < T)[:, None] & in_c)


def _grid(B: int, T: int, C: int) -> tuple[int, int, int]:
    return triton.cdiv(C, COLUMNS), triton.cdiv(T, ROWS), B


def _options(x: Tensor, weight: Tensor, segments: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """Document numbers, or anything where there are none, and what the kernels are compiled for."""
    options = {"W": weight.shape[1], "SEGMENTS": segments is not None, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
    return x if segments is None else segments.contiguous(), options


@torch.library.custom_op("workbench::short_convolution", mutates_args=())
def _forward(x: Tensor, weight: Tensor, segments: Tensor | None) -> Tensor:
    B, T, C = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    numbers, options = _options(x, weight, segments)
    _forward_kernel[_grid(B, T, C)](x, weight, numbers, y, T, C, **options)
    return y


@_forward.register_fake
def _(x, weight, segments):
    return x.new_empty(x.shape)


@torch.library.custom_op("workbench::short_convolution_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, C = x.shape
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    ds, dx = torch.empty_like(x), torch.empty_like(x)
    grid = _grid(B, T, C)
    dweight = x.new_empty(grid[1] * B, *weight.shape, dtype=torch.float32)
    numbers, options = _options(x, weight, segments)
    _slope_kernel[grid](x, weight, numbers, dy, ds, dweight, T, C, **options)
    _input_kernel[grid](ds, weight, numbers, dx, T, C, **options)
    return dx, dweight.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy, x, weight, segments):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return *_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_keep)


def short_convolution_triton(x_BTC: Tensor, weight_CW: Tensor, segments: Tensor | None = None) -> Tensor:
    """As :func:`workbench.ops.short_convolution.short_convolution`, without a tail."""
    return _forward(x_BTC, weight_CW, segments)
