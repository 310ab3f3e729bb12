"""Rows of tokens to the experts they have chosen (dispatch) and back (combine).

Every choice of a token is a row. Rows are sorted by expert, stably, so in token order within one expert; choices of
non-experts come last. Dispatch copies a token to its rows, combine sums a token's rows; each is the gradient of the
other. No scatter-add is involved: sums always run in the same order, so results are bitwise reproducible.

Legend: N tokens, K choices of a token, R = N·K rows, D width, C categories, E ≤ C experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.ops.dispatch import choose_backend

MAX_COUNTED_CATEGORIES = 1024
"""Most categories that are sorted by counting on CUDA, where every block of choices is compared with each of them."""


@dataclass(frozen=True)
class Routes:
    """The permutation that sorts choices by category."""

    row_NK: Tensor
    """(N, K) int64: the row of each choice."""
    order_R: Tensor
    """(R,) int64: the choice n·K + k of each row."""
    counts: Tensor
    """(C,) integers: rows of each category."""


def sort_choices(chosen_NK: Tensor, categories: int) -> Routes:
    """Sorts the choices 0 to ``categories`` - 1; larger ones come last and are not counted."""
    if choose_backend(chosen_NK, supported=categories <= MAX_COUNTED_CATEGORIES) == "triton":
        from workbench.ops.experts.triton import sort_choices_triton

        return Routes(*sort_choices_triton(chosen_NK, categories))
    N, K = chosen_NK.shape
    # 16 bits: a radix sort takes one pass per byte
    sorted_R, order_R = chosen_NK.flatten().to(torch.int16).sort(stable=True)
    rows_R = torch.arange(N * K, device=chosen_NK.device)
    row_NK = torch.empty_like(order_R).scatter_(0, order_R, rows_R).view(N, K)  # a permutation: no index twice
    bounds = torch.arange(categories + 1, device=chosen_NK.device, dtype=torch.int16)
    return Routes(row_NK, order_R, torch.searchsorted(sorted_R, bounds).diff())


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, token_R, row_NK, is_expert_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R, row_NK, is_expert_NK)
        return x_ND[token_R]

    @staticmethod
    def backward(ctx, dy_RD):  # type: ignore[no-untyped-def]
        token_R, row_NK, is_expert_NK = ctx.saved_tensors
        return _Combine.apply(dy_RD, token_R, row_NK, is_expert_NK), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, token_R, row_NK, is_expert_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(token_R, row_NK, is_expert_NK)
        y_NK = y_RD[row_NK]
        if is_expert_NK is not None:  # multiplying by zero would keep NaN
            y_NK = torch.where(is_expert_NK[..., None], y_NK, 0.0)
        return y_NK.sum(1)

    @staticmethod
    def backward(ctx, dy_ND):  # type: ignore[no-untyped-def]
        token_R, row_NK, is_expert_NK = ctx.saved_tensors
        return _Dispatch.apply(dy_ND, token_R, row_NK, is_expert_NK), None, None, None


def _indices(routes: Routes, experts: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token of each row, row of each choice, and which choices are experts (None if all are)."""
    is_expert_NK = routes.row_NK < routes.counts[:experts].sum() if len(routes.counts) > experts else None
    return routes.order_R // routes.row_NK.shape[1], routes.row_NK, is_expert_NK


def dispatch(x_ND: Tensor, routes: Routes, experts: int, backend: str = "grouped_mm") -> Tensor:
    """(R, D) the token of each row. Rows of further categories are undefined."""
    if backend != "loop" and choose_backend(x_ND) == "triton":
        from workbench.ops.experts import triton as kernels

        return kernels.dispatch(x_ND, routes.row_NK, routes.counts[:experts].sum())
    return _Dispatch.apply(x_ND, *_indices(routes, experts))


def combine(y_RD: Tensor, routes: Routes, experts: int, backend: str = "grouped_mm") -> Tensor:
    """(N, D) sums of each token's rows of the first ``experts`` categories. Further rows are never read."""
    if backend != "loop" and choose_backend(y_RD) == "triton":
        from workbench.ops.experts import triton as kernels

        return kernels.combine(y_RD, routes.row_NK, routes.counts[:experts].sum())
    return _Combine.apply(y_RD, *_indices(routes, experts))


def dispatch_weights(weight_NK: Tensor, routes: Routes) -> Tensor:
    """(R,) the weight of each row's choice."""
    # every choice as a token with one row
    return _Dispatch.apply(weight_NK.flatten(), routes.order_R, routes.row_NK.view(-1, 1), None)
