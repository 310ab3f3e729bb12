"""Scores of experts and which are largest: products in fp32, whatever autocast says, also in compiled gradients.

Legend: N tokens, D width, C categories, K choices of a token.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops import paths

__all__ = ["chosen_scores", "largest", "path", "router_logits"]

TRITON = find_spec("triton") is not None
MOST = 1024
"""Categories up to which there are kernels; they hold a token's scores at once."""


def path(device: str, dtype: torch.dtype, categories: int) -> str:
    """Which implementation computes a call: "triton" (our kernels) on CUDA, "torch" elsewhere, for fp64, and for very many
    categories."""
    fits = TRITON and device == "cuda" and dtype != torch.float64 and categories <= MOST
    return "triton" if fits else "torch"


def router_logits(x_ND: Tensor, weight_CD: Tensor) -> Tensor:
    """(N, C) W x, fp32 (fp64 for fp64).

    The kernels split every fp32 number into three tf32 products, which is as exact as fp32 to its last bits. They are one
    operator with its gradient for another reason too: torch.compile traces gradients under the autocast of the forward
    pass around it, and would make them in bf16.
    """
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    if paths.note("router", path(x_ND.device.type, wide, len(weight_CD))) == "triton":
        from workbench.ops.router import triton as kernels

        return kernels.logits(x_ND, weight_CD)
    kind = "cpu" if x_ND.device.type == "meta" else x_ND.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        return F.linear(x_ND.to(wide), weight_CD.to(wide))


def largest(score_NC: Tensor, K: int) -> Tensor:
    """(N, K) categories of the largest scores, the largest first; without gradient."""
    if path(score_NC.device.type, score_NC.dtype, score_NC.shape[1]) == "triton":
        from workbench.ops.router import triton as kernels

        return kernels.largest(score_NC, K)
    return score_NC.topk(K, dim=-1).indices


class _ChosenScores(torch.autograd.Function):
    """A gather whose gradient is a sum over the choices: nothing is scattered, so nothing is sorted to be deterministic."""

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


def chosen_scores(score_NC: Tensor, chosen_NK: Tensor) -> Tensor:
    """(N, K) scores of the choices."""
    if path(score_NC.device.type, score_NC.dtype, score_NC.shape[1]) == "triton":
        return _ChosenScores.apply(score_NC, chosen_NK)
    return score_NC.gather(1, chosen_NK)
