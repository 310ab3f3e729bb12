"""The hidden z-loss (LongCat-Flash, arXiv 2509.01322, eq. 10): keeps the last hidden states from growing.

Legend: N tokens, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["hidden_z_floor", "hidden_z_loss"]


def hidden_z_loss(z_ND: Tensor) -> Tensor:
    """Mean over tokens of (log Σ_i exp |z_i|)², a scalar in fp32 (fp64 for fp64). At least :func:`hidden_z_floor`.

    The backward pass recomputes exp |z|: only ``z_ND`` and one number per token are saved.
    """
    return _HiddenZ.apply(z_ND)


def hidden_z_floor(width: int) -> float:
    """The value at z = 0, (log D)²: 48.0 at width 1024."""
    return math.log(width) ** 2


class _HiddenZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_ND):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(z_ND.dtype, torch.float32)
        lse_N = z_ND.to(wide).abs().logsumexp(-1)
        ctx.save_for_backward(z_ND, lse_N)
        return lse_N.square().mean()

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        z_ND, lse_N = ctx.saved_tensors
        z = z_ND.to(lse_N.dtype)
        p_ND = (z.abs() - lse_N[:, None]).exp_()
        per_token_N = upstream * (2 / len(lse_N)) * lse_N
        return (p_ND * z.sign() * per_token_N[:, None]).to(z_ND.dtype)
