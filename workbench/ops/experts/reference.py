"""Experts one by one, the definition. Legend: R rows sorted by expert, D width, E experts, F hidden."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_experts_reference(x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """E_i(x) = (silu(x W_g) * x W_u) W_d for the ``counts_E[i]`` consecutive rows of expert i; up_EDF is [W_g | W_u]."""
    outputs = []
    for rows, up, down in zip(x_RD.split(counts_E.tolist()), up_EDF, down_EFD, strict=True):
        gate, value = (rows @ up).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * value) @ down)
    return torch.cat(outputs)
