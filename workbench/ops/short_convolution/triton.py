# mypy: allow-untyped-defs
"""Short convolution on GPUs: one pass forward, one back, in which the convolution is made again.

Legend: B batch, T time, C channels, W width. A program holds ``ROWS`` tokens of ``COLUMNS`` channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64


@triton.jit
def _convolved(x, weight, segments, rows, c, T, C, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """Σ_j w_j x_{t-j} of some tokens, fp32; a row outside 0 ≤ t < T gives something of no meaning."""
    total = tl.zeros((rows.shape[0], c.shape[0]), tl.float32)
    if SEGMENTS:
        own = tl.load(segments + rows, mask=(rows >= 0) & (rows < T), other=0)
    for back in tl.static_range(W):
        at = rows - back
        there = (at >= 0) & (at < T)
        if SEGMENTS and back:
            there &= tl.load(segments + at, mask=there, other=0) == own
        tile = tl.load(x + at.to(tl.int64)[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        w = tl.load(weight + c * W + back, mask=c < C, other=0.0).to(tl.float32)
        total += tile.to(tl.float32) * w[None, :]
    return total


@triton.jit
def _forward_kernel(
    x, weight, segments, y, T, C, W: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = _convolved(x + b * T * C, weight, segments + b * T, rows, c, T, C, W, SEGMENTS)
    at = (b * T + rows)[:, None] * C + c[None, :]
    out = total * tl.sigmoid(total)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(rows < T)[:, None] & (c < C)[None, :])


@triton.jit
def _backward_kernel(
    x, weight, segments, dy, dx, dweight, T, C, W: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx_t = Σ_j w_j ds_{t+j}, ds = dy silu'(s) with s the convolution; dw_j = Σ_t ds_t x_{t-j}, a part for every program."""
    b, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_c = (c < C)[None, :]
    x += b * T * C
    dy += b * T * C
    segments += b * T
    own_x = tl.load(x + rows.to(tl.int64)[:, None] * C + c[None, :], mask=(rows < T)[:, None] & in_c, other=0.0)
    own_x = own_x.to(tl.float32)
    if SEGMENTS:
        own = tl.load(segments + rows, mask=rows < T, other=0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for ahead in tl.static_range(W):
        at = rows + ahead
        there = at < T
        if SEGMENTS and ahead:
            there &= tl.load(segments + at, mask=there, other=0) == own
        s = _convolved(x, weight, segments, at, c, T, C, W, SEGMENTS)
        d = tl.load(dy + at.to(tl.int64)[:, None] * C + c[None, :], mask=there[:, None] & in_c, other=0.0).to(
            tl.float32
        )
        p = tl.sigmoid(s)
        ds = tl.where(there[:, None], d * p * (1.0 + s * (1.0 - p)), 0.0)
        w = tl.load(weight + c * W + ahead, mask=c < C, other=0.0).to(tl.float32)
        total += ds * w[None, :]
        part = (b * tl.num_programs(1) + block) * C * W + c * W + ahead
        tl.store(dweight + part, tl.sum(ds * own_x, axis=0), mask=c < C)
    out = (b * T + rows)[:, None] * C + c[None, :]
    tl.store(dx + out, total.to(dx.dtype.element_ty), mask=(rows < T)[:, None] & in_c)


def _grid(B: int, T: int, C: int) -> tuple[int, int, int]:
    return triton.cdiv(C, COLUMNS), triton.cdiv(T, ROWS), B


@torch.library.custom_op("workbench::short_convolution", mutates_args=())
def _forward(x: Tensor, weight: Tensor, segments: Tensor | None) -> Tensor:
    B, T, C = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _forward_kernel[_grid(B, T, C)](
        x, weight, x if segments is None else segments.contiguous(), y, T, C, W=weight.shape[1],
        SEGMENTS=segments is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return y


@_forward.register_fake
def _(x, weight, segments):
    return x.new_empty(x.shape)


@torch.library.custom_op("workbench::short_convolution_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, C = x.shape
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    grid = _grid(B, T, C)
    dweight = x.new_empty(grid[1] * B, *weight.shape, dtype=torch.float32)
    _backward_kernel[grid](
        x, weight, x if segments is None else segments.contiguous(), dy, dx, dweight, T, C, W=weight.shape[1],
        SEGMENTS=segments is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
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
