"""SwiGLU experts through torch's grouped matrix product, dropless and without a host synchronisation.

``grouped_mm`` is wrapped as an operator of our own for four reasons, all seen with torch 2.11 or 2.13: its shape rule
refuses float32 (meta tensors, torch.compile), the FLOP counter does not know it, its gradient refuses expanded tensors,
and on GPUs it reads the counts on the host for all types but bfloat16, so that a CUDA graph cannot be captured (here
the forward pass can, through :func:`masked_products`).

Legend: R rows sorted by expert, D width, E experts, F hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from workbench.ops.dispatch import choose_backend, record
from workbench.ops.experts.reference import swiglu_experts_reference, weighted


@torch.library.custom_op("workbench::grouped_mm", mutates_args=())
def grouped_mm(x_RD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert i times its matrix: (R, D), (E, D, F) -> (R, F); ``ends_E`` are cumulative row counts, int32.

    Rows from ``ends_E[-1]`` on are uninitialised memory.
    """
    if x_RD.is_cuda and x_RD.dtype != torch.bfloat16 and torch.cuda.is_current_stream_capturing():
        return masked_products(x_RD, w_EDF, ends_E)
    return F.grouped_mm(x_RD, w_EDF, offs=ends_E)


def masked_products(x_RD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """:func:`grouped_mm` without the counts on the host: all rows times the matrix of every expert, E times the work.
    For the few rows of a step of decoding. Rows from ``ends_E[-1]`` on are zero."""
    row_R = torch.arange(x_RD.shape[0], dtype=ends_E.dtype, device=x_RD.device)
    expert_R = torch.searchsorted(ends_E, row_R, right=True)
    y_RF = x_RD.new_zeros(x_RD.shape[0], w_EDF.shape[2])
    for expert, w_DF in enumerate(w_EDF):
        y_RF = torch.where((expert_R == expert)[:, None], x_RD @ w_DF, y_RF)
    return y_RF


@torch.library.custom_op("workbench::grouped_mm_input", mutates_args=())
def _input_gradient(dy_RF: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    # transposed inside the operator: compiled code would materialise the transposed weights, a view that is saved
    return F.grouped_mm(dy_RF, w_EDF.mT, offs=ends_E)


@torch.library.custom_op("workbench::grouped_mm_weight", mutates_args=())
def _weight_gradient(x_RD: Tensor, dy_RF: Tensor, ends_E: Tensor) -> Tensor:
    if choose_backend(x_RD) == "triton":
        from workbench.ops.experts import triton as kernels

        return kernels.weight_gradient(x_RD, dy_RF, ends_E)
    return F.grouped_mm(x_RD.t(), dy_RF, offs=ends_E)


@grouped_mm.register_fake
def _(x_RD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EDF.shape[2])


@_input_gradient.register_fake
def _(dy_RF: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return dy_RF.new_empty(dy_RF.shape[0], w_EDF.shape[1])


@_weight_gradient.register_fake
def _(x_RD: Tensor, dy_RF: Tensor, ends_E: Tensor) -> Tensor:
    return x_RD.new_empty(ends_E.shape[0], x_RD.shape[1], dy_RF.shape[1])


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_RF: Tensor):  # type: ignore[no-untyped-def]
    x_RD, w_EDF, ends_E = ctx.saved_tensors
    dy_RF = dy_RF.contiguous()
    return _input_gradient(dy_RF, w_EDF, ends_E), _weight_gradient(x_RD, dy_RF, ends_E), None


grouped_mm.register_autograd(_backward, setup_context=_keep)


def _rows(x: Tensor, ends_E: Tensor) -> int:
    return x.shape[0] if ends_E.is_meta else int(ends_E[-1])


@register_flop_formula([torch.ops.workbench.grouped_mm, torch.ops.workbench.grouped_mm_input], get_raw=True)
def _grouped_mm_flops(x_RD, w_EDF, ends_E, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _rows(x_RD, ends_E) * w_EDF.shape[1] * w_EDF.shape[2]


@register_flop_formula(torch.ops.workbench.grouped_mm_weight, get_raw=True)
def _weight_gradient_flops(x_RD, dy_RF, ends_E, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _rows(x_RD, ends_E) * x_RD.shape[1] * dy_RF.shape[1]


def swiglu_grouped(
    gate_value_R2F: Tensor, counts_E: Tensor, weight_R: Tensor | None = None, *, all_rows: bool = True
) -> Tensor:
    """w silu(g) v of rows [g | v], (R, F).

    Args:
        gate_value_R2F: (R, 2F) gates and values side by side.
        counts_E: (E,) rows of each expert.
        weight_R: w, a factor per row; default 1.
        all_rows: whether the counts sum to R. Otherwise the rows of no expert may hold anything, and their output is
            undefined on CUDA, zero elsewhere; they do not affect any gradient, that of ``weight_R`` included.
    """
    if choose_backend(gate_value_R2F) == "triton":  # skips the rows of no expert
        from workbench.ops.experts import triton as kernels

        if weight_R is None:
            weight_R = torch.ones(len(gate_value_R2F), device=gate_value_R2F.device)
        # a sum, not the last element of the ends: the compiler treats results of an unaligned view as unaligned
        return kernels.swiglu_grouped(gate_value_R2F, weight_R, counts_E.sum())
    if not all_rows:  # masked before the activation, not after: the gradient of 0 · NaN would be NaN
        mask_R = torch.arange(gate_value_R2F.shape[0], device=gate_value_R2F.device) < counts_E.sum()
        gate_value_R2F = torch.where(mask_R[:, None], gate_value_R2F, 0.0)
    gate, value = gate_value_R2F.chunk(2, dim=-1)
    return weighted(F.silu(gate) * value, weight_R)


def local_experts(
    x_RD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    weight_R: Tensor | None = None,
    *,
    all_rows: bool = True,
    backend: str = "grouped_mm",
) -> Tensor:
    """The experts stored on this rank, on rows sorted by expert. Arguments as of
    :func:`workbench.ops.experts.swiglu_experts`, which casts the rows."""
    up_EDF, down_EFD = up_EDF.to(x_RD.dtype), down_EFD.to(x_RD.dtype)
    loop = backend == "loop" or x_RD.dtype == torch.float64
    if record("experts", "loop" if loop else choose_backend(x_RD)) == "loop":
        return swiglu_experts_reference(x_RD, up_EDF, down_EFD, counts_E, weight_R)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    gate_value_R2F = grouped_mm(x_RD, up_EDF, ends_E)
    return grouped_mm(swiglu_grouped(gate_value_R2F, counts_E, weight_R, all_rows=all_rows), down_EFD, ends_E)
