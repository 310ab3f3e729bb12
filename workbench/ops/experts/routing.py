"""Rows of tokens to the experts they have chosen and back.

Every choice is a row. Rows stand sorted by expert (stable, so in token order within one); choices of what is no expert stand
behind all others. Going there copies every token to its rows, going back sums a token's rows; each is the gradient of the
other, so nothing is ever added up by scattering: sums always run in the same order, and the same bits come out twice.

Legend: N tokens, K choices of a token, R = N·K rows, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.ops.autocast import product_type
from workbench.ops.experts.torch import path, swiglu_experts

MOST_COUNTED = 1024
"""Categories up to which choices are sorted by counting on CUDA; every block of choices is held against each of them."""


@dataclass(frozen=True)
class Routes:
    """Where rows stand."""

    row_NK: Tensor
    """Place of the row of this choice."""
    order_R: Tensor
    """Choice, n·K + k, of the row at this place."""
    counts: Tensor
    """(C,) rows of each of the categories that can be chosen."""


def sort_choices(chosen_NK: Tensor, categories: int) -> Routes:
    """Routes of choices 0 to ``categories`` - 1; what is beyond stands at the end and is not counted."""
    if categories <= MOST_COUNTED and path(chosen_NK.device.type, chosen_NK.dtype) == "triton":
        from workbench.ops.experts.triton import sort_choices_triton

        return Routes(*sort_choices_triton(chosen_NK, categories))
    N, K = chosen_NK.shape
    # few bits: a radix sort takes a pass a byte
    sorted_R, order_R = chosen_NK.flatten().to(torch.int16).sort(stable=True)
    places_R = torch.arange(N * K, device=chosen_NK.device)
    row_NK = torch.empty_like(order_R).scatter_(0, order_R, places_R).view(N, K)  # a permutation: every place once
    bounds = torch.arange(categories + 1, device=chosen_NK.device, dtype=torch.int16)
    return Routes(row_NK, order_R, torch.searchsorted(sorted_R, bounds).diff())


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, token_R, row_NK, real_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R, row_NK, real_NK)
        return x_ND[token_R]

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        token_R, row_NK, real_NK = ctx.saved_tensors
        return _Collect.apply(dy_RD, token_R, row_NK, real_NK), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, token_R, row_NK, real_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R, row_NK, real_NK)
        y_NK = y_RD[row_NK]
        if real_NK is not None:  # multiplying by zero would keep NaN
            y_NK = torch.where(real_NK[..., None], y_NK, 0.0)
        return y_NK.sum(1)

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[no-untyped-def]
        token_R, row_NK, real_NK = ctx.saved_tensors
        return _Spread.apply(dy_ND, token_R, row_NK, real_NK), None, None, None


def _places(routes: Routes, experts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token of a row, row of a choice, and which choices are experts where not all are."""
    real_NK = routes.row_NK < routes.counts[:experts].sum() if len(routes.counts) > experts else None
    return routes.order_R // routes.row_NK.shape[1], routes.row_NK, real_NK


def spread(x_ND: Tensor, routes: Routes, experts: int, backend: str = "grouped_mm") -> Tensor:
    """(R, D) rows of tokens at their places; what stands behind the rows of these first ``experts`` is undefined."""
    if path(x_ND.device.type, x_ND.dtype, backend) == "triton":
        from workbench.ops.experts import triton as kernels

        return kernels.spread(x_ND, routes.row_NK, routes.counts[:experts].sum())
    return _Spread.apply(x_ND, *_places(routes, experts))


def collect(y_RD: Tensor, routes: Routes, experts: int, backend: str = "grouped_mm") -> Tensor:
    """(N, D) sums of the rows that a token has among the first ``experts``, whatever stands behind these."""
    if path(y_RD.device.type, y_RD.dtype, backend) == "triton":
        from workbench.ops.experts import triton as kernels

        return kernels.collect(y_RD, routes.row_NK, routes.counts[:experts].sum())
    return _Collect.apply(y_RD, *_places(routes, experts))


def routed_experts(
    x_ND: Tensor,
    chosen_NK: Tensor,
    weight_NK: Tensor,
    routes: Routes,
    up_EDF: Tensor,
    down_EFD: Tensor,
    backend: str = "grouped_mm",
) -> Tensor:
    """Σ_k w_k E_{c_k}(x) over the choices c_k that are experts; dropless, without a host synchronisation.

    Args:
        chosen_NK: integers; those from E on are no experts: they take no part, and their rows enter no product.
        weight_NK: w.
        routes: of these choices, among at least E categories.
        up_EDF, down_EFD, backend: see :func:`workbench.ops.experts.swiglu_experts`.

    Returns:
        (N, D) in the type of the products.
    """
    E = up_EDF.shape[0]
    whole = len(routes.counts) == E
    if not whole:
        weight_NK = torch.where(chosen_NK < E, weight_NK, 0.0)
    # every choice as a token with one row
    weight_R = _Spread.apply(weight_NK.flatten(), routes.order_R, routes.row_NK.view(-1, 1), None)
    x_RD = spread(x_ND.to(product_type(x_ND)), routes, E, backend)  # of its type before it is copied K times
    y_RD = swiglu_experts(x_RD, up_EDF, down_EFD, routes.counts[:E], weight_R, whole=whole, backend=backend)
    return collect(y_RD, routes, E, backend)
