"""SwiGLU experts one by one: the definition. Legend: R rows sorted by expert, D width, E experts, F hidden."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_experts_reference(
    x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """w E_i(x) = (w * silu(x W_g) * x W_u) W_d for the ``counts_E[i]`` consecutive rows of expert i; up_EDF is [W_g |
    W_u].

    Rows after those of the last expert belong to none and give zeros.
    """
    counts = counts_E.tolist()
    rest = x_RD.shape[0] - sum(counts)
    outputs = []
    weights = [None] * len(counts) if weight_R is None else weight_R.split([*counts, rest])
    for rows, up, down, weight in zip(x_RD.split([*counts, rest]), up_EDF, down_EFD, weights):
        gate, value = (rows @ up).chunk(2, dim=-1)
        outputs.append(weighted(F.silu(gate) * value, weight) @ down)
    return torch.cat((*outputs, x_RD.new_zeros(rest, down_EFD.shape[2])))


def weighted(hidden_RF: Tensor, weight_R: Tensor | None) -> Tensor:
    """Rows times their weights, rounded once."""
    return hidden_RF if weight_R is None else (hidden_RF * weight_R[:, None]).to(hidden_RF.dtype)
