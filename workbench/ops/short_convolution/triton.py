# mypy: allow-untyped-defs
"""Short convolution on GPUs: one pass forward, and two backward, which recompute the convolution.

Legend: B batch, T time, C channels, W width, D channels of a part, G those of a program. A program computes ``ROWS``
tokens of one head if that is scaled to a length, else of ``COLUMNS`` channels. Naming as in flash-linear-attention:
``i_`` program indices, ``o_`` offsets, ``m_`` masks, ``b_`` tiles in registers.
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
def _same_document(segments, b_segment, o_t, m_t, SEGMENTS: tl.constexpr):
    """``m_t`` without the tokens that are not of the documents ``b_segment``."""
    if SEGMENTS:
        m_t &= tl.load(segments + o_t, mask=m_t, other=0) == b_segment
    return m_t


@triton.jit
def _pointers(x, i_b, T, stride, o_t, o_c):
    """Pointers to tokens and channels of sequence ``i_b``; ``stride`` from token to token."""
    return x + i_b * T * stride + o_t.to(tl.int64)[:, None] * stride + o_c[None, :]


@triton.jit
def _tile(segments, T, D, G, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sequence, tokens and channels of this program, the mask of channels, and the documents of its sequence and
    tokens."""
    i_b = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    o_c = tl.program_id(0) * G + lane
    segments += i_b * T
    b_segment = tl.load(segments + o_t, mask=o_t < T, other=0) if SEGMENTS else o_t
    return i_b, o_t, o_c, (lane < G) & (o_c < D), segments, b_segment


@triton.jit
def _convolution(
    x, weight, segments, b_segment, i_b, o_t, o_c, m_c, T, C: tl.constexpr, W: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Σ_j w_j x_{t-j}, fp32, [ROWS, COLUMNS]."""
    b_sum = tl.zeros((o_t.shape[0], o_c.shape[0]), tl.float32)
    for j in tl.static_range(W):
        m_t = _same_document(segments, b_segment, o_t - j, (o_t >= j) & (o_t < T), SEGMENTS)
        b_x = tl.load(_pointers(x, i_b, T, C, o_t, o_c) - j * C, mask=m_t[:, None] & m_c[None, :], other=0.0)
        b_sum += b_x.to(tl.float32) * tl.load(weight + o_c * W + j, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_sum


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
    i_b, o_t, o_c, m_c, segments, b_segment = _tile(segments, T, D, G, SEGMENTS, ROWS, COLUMNS)
    b_s = _convolution(x, weight, segments, b_segment, i_b, o_t, o_c, m_c, T, C, W, SEGMENTS)
    b_y = b_s * tl.sigmoid(b_s)
    if LENGTH > 0:
        b_y *= (LENGTH * tl.rsqrt(tl.sum(b_y * b_y, axis=1) + EPSILON))[:, None]
    mask = (o_t < T)[:, None] & m_c[None, :]
    tl.store(_pointers(y, i_b, T, D, o_t, o_c), b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _convolution_gradient_kernel(
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
    """ds, the gradient of the convolution (recomputed), and the contribution of each program to dw_j = Σ_t ds_t
    x_{t-j}."""
    # 1. the convolution again
    i_b, o_t, o_c, m_c, segments, b_segment = _tile(segments, T, D, G, SEGMENTS, ROWS, COLUMNS)
    b_s = _convolution(x, weight, segments, b_segment, i_b, o_t, o_c, m_c, T, C, W, SEGMENTS)
    mask = (o_t < T)[:, None] & m_c[None, :]
    # 2. its gradient, [ROWS, COLUMNS]
    b_ds = tl.load(_pointers(dy, i_b, T, D, o_t, o_c), mask=mask, other=0.0).to(tl.float32)
    b_p = tl.sigmoid(b_s)
    if LENGTH > 0:  # y = L a / n, n² = |a|² + ε: da = L / n (dy - a (a·dy) / n²)
        b_a = b_s * b_p
        b_inverse = tl.rsqrt(tl.sum(b_a * b_a, axis=1) + EPSILON)
        b_along = tl.sum(b_a * b_ds, axis=1) * b_inverse * b_inverse
        b_ds = (LENGTH * b_inverse)[:, None] * (b_ds - b_a * b_along[:, None])
    b_ds *= b_p * (1.0 + b_s * (1.0 - b_p))
    tl.store(_pointers(ds, i_b, T, C, o_t, o_c), b_ds.to(ds.dtype.element_ty), mask=mask)
    # 3. gradient of the weights; x is read again, from L1: W tiles at once would not fit into registers
    p_dweight = dweight + (i_b * tl.num_programs(1) + tl.program_id(1)) * C * W
    for j in tl.static_range(W):
        m_t = _same_document(segments, b_segment, o_t - j, (o_t >= j) & (o_t < T), SEGMENTS)
        b_x = tl.load(_pointers(x, i_b, T, C, o_t, o_c) - j * C, mask=m_t[:, None] & m_c[None, :], other=0.0)
        tl.store(p_dweight + o_c * W + j, tl.sum(b_ds * b_x.to(tl.float32), axis=0), mask=m_c)


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
    i_b, o_t, o_c, m_c, segments, b_segment = _tile(segments, T, C, COLUMNS, SEGMENTS, ROWS, COLUMNS)
    b_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    for j in tl.static_range(W):
        m_t = _same_document(segments, b_segment, o_t + j, o_t < T - j, SEGMENTS)
        b_ds = tl.load(_pointers(ds, i_b, T, C, o_t, o_c) + j * C, mask=m_t[:, None] & m_c[None, :], other=0.0)
        b_dx += b_ds.to(tl.float32) * tl.load(weight + o_c * W + j, mask=m_c, other=0.0).to(tl.float32)[None, :]
    mask = (o_t < T)[:, None] & m_c[None, :]
    tl.store(_pointers(dx, i_b, T, C, o_t, o_c), b_dx.to(dx.dtype.element_ty), mask=mask)


class _Launch:
    """Sizes and options of one call, for all channels and for each part."""

    def __init__(self, x: Tensor, weight: Tensor, segments: Tensor | None):
        self.B, self.T, self.C = x.shape
        self.blocks = triton.cdiv(self.T, ROWS)
        self.segments = x if segments is None else segments.contiguous()  # unused if None
        self.options = {"C": self.C, "W": weight.shape[1], "SEGMENTS": segments is not None, "ROWS": ROWS}

    def all_channels(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Grid and options for all channels."""
        grid = (triton.cdiv(self.C, COLUMNS), self.blocks, self.B)
        return grid, {**self.options, "COLUMNS": COLUMNS, "num_warps": 4}

    def parts(
        self, heads: list[int], channels: list[int], lengths: list[float]
    ) -> Iterator[tuple[int, tuple[int, int, int], dict[str, Any]]]:
        """First channel, grid and options of each part; a part with a length has one head per program."""
        first = 0
        for count, size, length in zip(heads, channels, lengths):
            D, G = count * size, size if length else COLUMNS
            columns = triton.next_power_of_2(G)
            part = {
                "D": D,
                "G": G,
                "LENGTH": length,
                "COLUMNS": columns,
                "num_warps": max(1, min(16, ROWS * columns // 1024)),
            }
            yield first, (triton.cdiv(D, G), self.blocks, self.B), {**self.options, **part}
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
        _convolution_gradient_kernel[grid](
            x[..., first:],
            weight[first:],
            launch.segments,
            dy.contiguous(),
            ds[..., first:],
            dweight[:, first:],
            launch.T,
            **options,
        )
    grid, options = launch.all_channels()
    _input_kernel[grid](ds, weight, launch.segments, dx, launch.T, **options)
    return dx, dweight.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dys, x, weight, segments, heads, channels, lengths):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.parts = inputs[3:]


def _differentiate(ctx, dys):
    return *_backward(dys, *ctx.saved_tensors, *ctx.parts), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def short_convolution_triton(
    x_BTC: Tensor, weight_CW: Tensor, parts: Sequence[Heads], segments: Tensor | None = None
) -> list[Tensor]:
    """As :func:`workbench.ops.short_convolution.short_convolution`, without a tail."""
    heads, channels = [part.heads for part in parts], [part.channels for part in parts]
    return _forward(x_BTC, weight_CW, segments, heads, channels, [part.length or 0.0 for part in parts])
