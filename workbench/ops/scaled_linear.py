"""y = x Wᵀ with operands in eight bits, and both products of its backward pass: float8 training (arXiv 2209.05433).

    x8 = round(x / s_x),  W8 = round(W / s_W),  y = (x8 W8ᵀ) · s_x s_W,  summed in fp32, result in bf16
    dx = g W,  dW = gᵀ x: in the same way, each operand scaled for its product

Scales come from the operands of the same step (dynamic scaling): with "row" one per row of the first operand and one
per column of the second, all e4m3; with "tensor" one per operand, gradients e5m2. The kernels need CUDA devices of
compute capability 9.0 ("row") or 8.9 ("tensor"); elsewhere the same quantised operands are multiplied in fp32, slowly,
for tests.

Legend: N rows (tokens), I input channels, O output channels.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.config import ConfigError, require

Scaling: TypeAlias = Literal["row", "tensor"]

CAPABILITY = {"row": (9, 0), "tensor": (8, 9)}
"""Smallest compute capability of the kernels."""
MULTIPLE = 16
"""The kernels need sizes that are multiples of this."""


def check_device(device: torch.device, scaling: Scaling) -> None:
    """Check that ``device`` multiplies eight-bit floats.

    Raises:
        ConfigError: naming the device and what it lacks.
    """
    expected = f"a CUDA device of compute capability {'.'.join(map(str, CAPABILITY[scaling]))} or more (Hopper: 9.0)"
    do = "Leave training.fp8 out, or train on an H100 or H200."
    require(device.type == "cuda", "training.fp8", got=f"{scaling} on a {device.type} device", expected=expected, do=do)
    capability = torch.cuda.get_device_capability(device)
    got = f"{scaling} on {torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    require(capability >= CAPABILITY[scaling], "training.fp8", got=got, expected=expected, do=do)


def scaled_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scaling: Scaling) -> Tensor:
    """(…, I) -> (…, O) in bf16. All but the last axis of ``x`` together are a multiple of 16, as are I and O.

    Raises:
        ConfigError: when they are not.
    """
    rows = x.shape[:-1].numel()
    if rows % MULTIPLE or weight_OI.shape[0] % MULTIPLE or weight_OI.shape[1] % MULTIPLE:
        raise ConfigError.at(
            "training.fp8",
            got=f"a product of {rows} rows with a weight {tuple(weight_OI.shape)}",
            expected=f"multiples of {MULTIPLE}",
            do="Set `sensitive` of the projection, which keeps it in bf16.",
        )
    y_NO: Tensor = _ScaledProduct.apply(x.flatten(0, -2).bfloat16(), weight_OI.bfloat16(), scaling)
    y = y_NO.unflatten(0, x.shape[:-1])
    return y if bias_O is None else y + bias_O.to(y.dtype)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        ctx.scaling = scaling
        return _product(x_NI, weight_OI.t(), scaling, torch.float8_e4m3fn, torch.float8_e4m3fn, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, weight_OI = ctx.saved_tensors
        gradient_NO = gradients[0]
        kind = torch.float8_e4m3fn if ctx.scaling == "row" else torch.float8_e5m2
        dx_NI = _product(gradient_NO, weight_OI, ctx.scaling, kind, torch.float8_e4m3fn)
        dweight_OI = _product(gradient_NO.t(), x_NI, ctx.scaling, kind, torch.float8_e4m3fn)
        return dx_NI, dweight_OI, None


def _product(a: Tensor, b: Tensor, scaling: Scaling, a_kind: Any, b_kind: Any, *, fast: bool = False) -> Tensor:
    """a (R, K) times b (K, C), each quantised; bf16. ``fast`` sums partial products with fewer bits, as is usual in the
    forward pass."""
    a8, a_scale = quantised(a, scaling, a_kind, axis=1)
    b8, b_scale = quantised(b, scaling, b_kind, axis=0)
    # the kernels read rows of the first and columns of the second operand; here the compiler quantises into that layout
    return scaled_mm(a8.contiguous(), b8.t().contiguous().t(), a_scale, b_scale, fast)


@torch.library.custom_op("workbench::scaled_mm", mutates_args=())
def scaled_mm(a8: Tensor, b8: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool) -> Tensor:
    """(a8 b8) · a_scale · b_scale in bf16. A custom operator, since torch 2.11 does not trace `scaled_mm`.

    Args:
        a8: (R, K), contiguous rows.
        b8: (K, C), contiguous columns.
        a_scale: (R, 1), or a scalar.
        b_scale: (1, C), or a scalar.
        fast: sum partial products with fewer bits.
    """
    if not a8.is_cuda:
        return ((a8.float() @ b8.float()) * a_scale * b_scale).bfloat16()
    recipe = F.ScalingType.RowWise if a_scale.dim() else F.ScalingType.TensorWise
    return F.scaled_mm(
        a8.contiguous(),
        b8.t().contiguous().t(),
        a_scale.contiguous(),
        recipe,
        b_scale.contiguous(),
        recipe,
        output_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


@scaled_mm.register_fake
def _(a8: Tensor, b8: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool) -> Tensor:
    return a8.new_empty((a8.shape[0], b8.shape[1]), dtype=torch.bfloat16)


def quantised(values: Tensor, scaling: Scaling, kind: torch.dtype, axis: int) -> tuple[Tensor, Tensor]:
    """``values`` (two axes) divided by their scales, in eight bits, and the scales, fp32.

    Args:
        axis: that the product sums over; with "row" numbers along it share a scale.
    """
    magnitude = values.abs().float()
    largest = magnitude.amax(axis, keepdim=True) if scaling == "row" else magnitude.amax()
    limit = torch.finfo(kind).max
    scale = largest.clamp_min(1e-12) / limit
    return (values.float() / scale).clamp(-limit, limit).to(kind), scale
