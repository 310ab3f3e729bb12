"""The hidden z-loss (LongCat-Flash, arXiv 2509.01322, eq. 10): keeps the last hidden states from growing.

Legend: N tokens, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["hidden_z_floor", "hidden_z_loss"]


def hidden_z_loss(z_ND: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Σ_n w_n (log Σ_i exp |z_ni|)², a scalar in fp32 (fp64 for fp64).

    The backward pass recomputes exp |z|: only ``z_ND`` and two numbers per token are saved.

    Args:
        weights_N: w, (N,) constants; default 1/N, the mean, which is at least :func:`hidden_z_floor`.
    """
    if weights_N is None:
        weights_N = torch.full((len(z_ND),), 1 / len(z_ND), device=z_ND.device, dtype=torch.float64)
    return _HiddenZ.apply(z_ND, weights_N)


def hidden_z_floor(width: int) -> float:
    """The value at z = 0, (log D)²: 48.0 at width 1024."""
    return math.log(width) ** 2


class _HiddenZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_ND, weights_N):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(z_ND.dtype, torch.float32)
        lse_N, weights_N = z_ND.to(wide).abs().logsumexp(-1), weights_N.to(wide)
        ctx.save_for_backward(z_ND, lse_N, weights_N)
        return (lse_N.square() * weights_N).sum()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        z_ND, lse_N, weights_N = ctx.saved_tensors
        z = z_ND.to(lse_N.dtype)
        p_ND = (z.abs() - lse_N[:, None]).exp_()
        per_token_N = upstream * 2 * weights_N * lse_N
        return (p_ND * z.sign() * per_token_N[:, None]).to(z_ND.dtype), None
