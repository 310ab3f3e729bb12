"""Scores of experts, the best of them per token, and their gradients.

Logits are float32 products regardless of autocast, in compiled gradients too.

Legend: N tokens, D width, C categories (experts and zero-computation experts), K choices of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.dispatch import choose_backend, disable_autocast, record

__all__ = ["gather_scores", "router_logits", "topk_indices"]

MAX_CATEGORIES = 1024
"""Most categories of the kernels, which hold all scores of a token at once."""


def _backend(x: Tensor, categories: int) -> str:
    return choose_backend(x, supported=categories <= MAX_CATEGORIES)


def router_logits(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """(N, C) W x, float32 (float64 for float64).

    The kernels split every float32 number into three tf32 products, which is as exact as float32 to its last bits. They
    form one operator together with their gradient for another reason too: torch.compile traces gradients under the
    autocast of the surrounding forward pass, and would compute them in bf16.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    if record("router", _backend(x_ND, len(weight_CD))) == "triton":
        from workbench.ops.router import triton as kernels

        return kernels.logits(x_ND, weight_CD)
    with disable_autocast(x_ND):
        return F.linear(x_ND.to(wide), weight_CD.to(wide))


def topk_indices(score_NC: Tensor, K: int) -> Tensor:
    """(N, K) categories with the largest scores, in descending order; without gradient."""
    if _backend(score_NC, score_NC.shape[1]) == "triton":
        from workbench.ops.router import triton as kernels

        return kernels.topk_indices(score_NC, K)
    return score_NC.topk(K, dim=-1).indices


class _GatherScores(torch.autograd.Function):
    """A gather whose gradient is a sum over the choices: no scatter, so nothing has to be sorted to be
    deterministic."""

    @staticmethod
    def forward(ctx, score_NC, chosen_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(chosen_NK)
        ctx.categories = score_NC.shape[1]
        return score_NC.gather(1, chosen_NK)

    @staticmethod
    def backward(ctx, d_NK):  # type: ignore[no-untyped-def]
        (chosen_NK,) = ctx.saved_tensors
        c_C = torch.arange(ctx.categories, device=d_NK.device)
        return torch.where(chosen_NK[..., None] == c_C, d_NK[..., None], 0.0).sum(1), None


def gather_scores(score_NC: Tensor, chosen_NK: Tensor) -> Tensor:
    """(N, K) scores of the choices."""
    if _backend(score_NC, score_NC.shape[1]) == "triton":
        return _GatherScores.apply(score_NC, chosen_NK)
    return score_NC.gather(1, chosen_NK)
