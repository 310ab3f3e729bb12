# mypy: allow-untyped-defs
"""Short convolution on GPUs: one pass forward, two back, in which the convolution is made again.

Legend: B batch, T time, C channels, W width, D channels of a part, G those of a program. A program holds ``ROWS`` tokens of a
head that is scaled to a length, else of ``COLUMNS`` channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.short_convolution.reference import Heads

ROWS, COLUMNS = 64, 64
EPSILON = tl.constexpr(1e-6)


@triton.jit
def _same(segments, own, at, there, SEGMENTS: tl.constexpr):
    """Which rows ``at`` are there and hold the document ``own``."""
    if SEGMENTS:
        there &= tl.load(segments + at, mask=there, other=0) == own
    return there


@triton.jit
def _place(x, b, T, row, rows, c):
    """Where tokens ``rows`` of channels ``c`` of sequence ``b`` stand; ``row`` from token to token."""
    return x + b * T * row + rows.to(tl.int64)[:, None] * row + c[None, :]


@triton.jit
def _tile(segments, T, D, G, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sequence, tokens, channels of this program, which channels are there, and the documents of its sequence and tokens."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    c = tl.program_id(0) * G + lane
    segments += b * T
    own = tl.load(segments + rows, mask=rows < T, other=0) if SEGMENTS else rows
    return b, rows, c, (lane < G) & (c < D), segments, own


@triton.jit
def _convolved(x, weight, segments, own, b, rows, c, in_c, T, C: tl.constexpr, W: tl.constexpr, SEGMENTS: tl.constexpr):
    """Σ_j w_j x_{t-j}, fp32."""
    total = tl.zeros((rows.shape[0], c.shape[0]), tl.float32)
    for back in tl.static_range(W):
        there = _same(segments, own, rows - back, (rows >= back) & (rows < T), SEGMENTS)
        tile = tl.load(_place(x, b, T, C, rows, c) - back * C, mask=there[:, None] & in_c[None, :], other=0.0)
        total += tile.to(tl.float32) * tl.load(weight + c * W + back, mask=in_c, other=0.0).to(tl.float32)[None, :]
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
    D: tl.constexpr,
    G: tl.constexpr,
    LENGTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b, rows, c, in_c, segments, own = _tile(segments, T, D, G, SEGMENTS, ROWS, COLUMNS)
    total = _convolved(x, weight, segments, own, b, rows, c, in_c, T, C, W, SEGMENTS)
    out = total * tl.sigmoid(total)
    if LENGTH > 0:
        out *= (LENGTH * tl.rsqrt(tl.sum(out * out, axis=1) + EPSILON))[:, None]
    tl.store(_place(y, b, T, D, rows, c), out.to(y.dtype.element_ty), mask=(rows < T)[:, None] & in_c[None, :])


@triton.jit
def _slope_kernel(
    x,
    weight,
    segments,
    dy,
    ds,
    dweight,
    T,
    C: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    LENGTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ds, the gradient of the convolution, which is made again, and what every program adds to dw_j = Σ_t ds_t x_{t-j}."""
    b, rows, c, in_c, segments, own = _tile(segments, T, D, G, SEGMENTS, ROWS, COLUMNS)
    s = _convolved(x, weight, segments, own, b, rows, c, in_c, T, C, W, SEGMENTS)
    inside = (rows < T)[:, None] & in_c[None, :]
    slope = tl.load(_place(dy, b, T, D, rows, c), mask=inside, other=0.0).to(tl.float32)
    p = tl.sigmoid(s)
    if LENGTH > 0:  # y = L a / n, n² = |a|² + ε: da = L / n (dy - a (a·dy) / n²)
        a = s * p
        inverse = tl.rsqrt(tl.sum(a * a, axis=1) + EPSILON)
        along = tl.sum(a * slope, axis=1) * inverse * inverse
        slope = (LENGTH * inverse)[:, None] * (slope - a * along[:, None])
    slope *= p * (1.0 + s * (1.0 - p))
    tl.store(_place(ds, b, T, C, rows, c), slope.to(ds.dtype.element_ty), mask=inside)
    part = dweight + (b * tl.num_programs(1) + tl.program_id(1)) * C * W
    for back in tl.static_range(W):  # read again, from the nearest cache: four tiles at once would not fit
        there = _same(segments, own, rows - back, (rows >= back) & (rows < T), SEGMENTS)
        tile = tl.load(_place(x, b, T, C, rows, c) - back * C, mask=there[:, None] & in_c[None, :], other=0.0)
        tl.store(part + c * W + back, tl.sum(slope * tile.to(tl.float32), axis=0), mask=in_c)


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
    b, rows, c, in_c, segments, own = _tile(segments, T, C, COLUMNS, SEGMENTS, ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for ahead in tl.static_range(W):
        there = _same(segments, own, rows + ahead, rows < T - ahead, SEGMENTS)
        tile = tl.load(_place(ds, b, T, C, rows, c) + ahead * C, mask=there[:, None] & in_c[None, :], other=0.0)
        total += tile.to(tl.float32) * tl.load(weight + c * W + ahead, mask=in_c, other=0.0).to(tl.float32)[None, :]
    tl.store(_place(dx, b, T, C, rows, c), total.to(dx.dtype.element_ty), mask=(rows < T)[:, None] & in_c[None, :])


class _Launch:
    """Sizes and options of one call; its parts one after the other."""

    def __init__(self, x: Tensor, weight: Tensor, segments: Tensor | None):
        self.B, self.T, self.C = x.shape
        self.blocks = triton.cdiv(self.T, ROWS)
        self.segments = x if segments is None else segments.contiguous()  # anything where there are none
        self.options = {"C": self.C, "W": weight.shape[1], "SEGMENTS": segments is not None, "ROWS": ROWS}

    def whole(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Grid and options over all channels."""
        grid = (triton.cdiv(self.C, COLUMNS), self.blocks, self.B)
        return grid, {**self.options, "COLUMNS": COLUMNS, "num_warps": 4}

    def parts(
        self, heads: list[int], channels: list[int], lengths: list[float]
    ) -> Iterator[tuple[int, tuple[int, int, int], dict[str, Any]]]:
        """First channel, grid and options of each part: a head a program where it has a length."""
        first = 0
        for count, size, length in zip(heads, channels, lengths):
            D, G = count * size, size if length else COLUMNS
            columns = triton.next_power_of_2(G)
            more = {
                "D": D,
                "G": G,
                "LENGTH": length,
                "COLUMNS": columns,
                "num_warps": max(1, min(16, ROWS * columns // 1024)),
            }
            yield first, (triton.cdiv(D, G), self.blocks, self.B), {**self.options, **more}
            first += D


@torch.library.custom_op("workbench::short_convolution", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, segments: Tensor | None, heads: list[int], channels: list[int], lengths: list[float]
) -> list[Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    launch = _Launch(x, weight, segments)
    outputs = [x.new_empty(launch.B, launch.T, count, size) for count, size in zip(heads, channels)]
    for y, (first, grid, options) in zip(outputs, launch.parts(heads, channels, lengths)):
        _forward_kernel[grid](x[..., first:], weight[first:], launch.segments, y, launch.T, **options)
    return outputs


@_forward.register_fake
def _(x, weight, segments, heads, channels, lengths):
    return [x.new_empty(*x.shape[:2], count, size) for count, size in zip(heads, channels)]


@torch.library.custom_op("workbench::short_convolution_backward", mutates_args=())
def _backward(
    dys: list[Tensor],
    x: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    heads: list[int],
    channels: list[int],
    lengths: list[float],
) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    launch = _Launch(x, weight, segments)
    ds, dx = torch.empty_like(x), torch.empty_like(x)
    dweight = x.new_empty(launch.blocks * launch.B, *weight.shape, dtype=torch.float32)
    for dy, (first, grid, options) in zip(dys, launch.parts(heads, channels, lengths)):
        _slope_kernel[grid](
            x[..., first:],
            weight[first:],
            launch.segments,
            dy.contiguous(),
            ds[..., first:],
            dweight[:, first:],
            launch.T,
            **options,
        )
    grid, options = launch.whole()
    _input_kernel[grid](ds, weight, launch.segments, dx, launch.T, **options)
    return dx, dweight.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dys, x, weight, segments, heads, channels, lengths):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.parts = inputs[3:]


def _autograd(ctx, dys):
    return *_backward(dys, *ctx.saved_tensors, *ctx.parts), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_keep)


def short_convolution_triton(
    x_BTC: Tensor, weight_CW: Tensor, parts: Sequence[Heads], segments: Tensor | None = None
) -> list[Tensor]:
    """As :func:`workbench.ops.short_convolution.short_convolution`, without a tail."""
    heads, channels = [part.heads for part in parts], [part.channels for part in parts]
    return _forward(x_BTC, weight_CW, segments, heads, channels, [part.length or 0.0 for part in parts])
