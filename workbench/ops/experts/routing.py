"""Rows of tokens to the experts they have chosen and back, by gathers alone.

Every choice is a row. Rows stand sorted by expert (stable, so in token order within one); choices of what is no expert stand
behind all others. Going there copies every token to its rows, going back sums a token's rows; each is the gradient of the
other, so nothing is ever scattered: sums always run in the same order, and the same bits come out twice.

Legend: N tokens, K choices of a token, R = N·K rows, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.ops.autocast import product_type
from workbench.ops.experts.torch import swiglu_experts


@dataclass(frozen=True)
class Routes:
    """Where rows stand."""

    token_R: Tensor
    """Token of the row at this place."""
    row_NK: Tensor
    """Place of the row of this choice."""
    order_R: Tensor
    """Choice, n·K + k, of the row at this place."""
    counts: Tensor
    """(C,) rows of each of the categories that can be chosen."""


def sort_choices(chosen_NK: Tensor, categories: int) -> Routes:
    """Routes of choices 0 to ``categories`` - 1; what is beyond stands at the end and is not counted."""
    N, K = chosen_NK.shape
    # few bits: a radix sort takes a pass a byte
    sorted_R, order_R = chosen_NK.flatten().to(torch.int16).sort(stable=True)
    places_R = torch.arange(N * K, device=chosen_NK.device)
    row_NK = torch.empty_like(order_R).scatter_(0, order_R, places_R).view(N, K)  # a permutation: every place once
    bounds = torch.arange(categories + 1, device=chosen_NK.device, dtype=torch.int16)
    return Routes(order_R // K, row_NK, order_R, torch.searchsorted(sorted_R, bounds).diff())


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


def routed_experts(
    x_ND: Tensor, chosen_NK: Tensor, weight_NK: Tensor, routes: Routes, up_EDF: Tensor, down_EFD: Tensor,
    backend: str = "grouped_mm",
) -> Tensor:  # fmt: skip
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
    real_NK = chosen_NK < E if len(routes.counts) > E else None
    x_ND = x_ND.to(product_type(x_ND))  # before it is copied K times
    x_RD = _Spread.apply(x_ND, routes.token_R, routes.row_NK, real_NK)
    if real_NK is not None:
        weight_NK = torch.where(real_NK, weight_NK, 0.0)
    # every choice as a token with one row
    weight_R = _Spread.apply(weight_NK.flatten(), routes.order_R, routes.row_NK.view(-1, 1), None)
    y_RD = swiglu_experts(x_RD, up_EDF, down_EFD, routes.counts[:E], weight_R, whole=real_NK is None, backend=backend)
    return _Collect.apply(y_RD, routes.token_R, routes.row_NK, real_NK)
