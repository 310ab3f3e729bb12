"""Dense mathematics that the mixture of experts is compared with.

Legend: N tokens, D width, E experts, C candidates (experts, then zero-computation experts), K choices, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.testing import FeedForwardConformance

WIDTH = 32
WITH_ZERO = {"experts": 4, "zero_experts": 2, "top_k": 3, "renormalise": False, "hidden": 16}
"""Four experts and two zero-computation experts; a token is expected to use two experts."""


def build(name: str = "moe", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A variant of width ``WIDTH`` with random parameters."""
    suite = type("Suite", (FeedForwardConformance,), {"name": name, "width": WIDTH})()
    return suite.build(settings, dtype, seed=int(torch.randint(1000, ())))


def dense_mixture(module: Any, x_ND: Tensor, gates_NC: Tensor) -> Tensor:
    """Σ_c gate_c E_c(x) with every expert computed for every token."""
    gate_ENF, value_ENF = torch.einsum("nd,edf->enf", x_ND, module.up).chunk(2, dim=-1)
    y_END = torch.einsum("enf,efd->end", F.silu(gate_ENF) * value_ENF, module.down)
    E = len(y_END)
    return torch.einsum("end,ne->nd", y_END, gates_NC[:, :E]) + gates_NC[:, E:].sum(-1, keepdim=True) * x_ND


def scattered(ids_NK: Tensor, gates_NK: Tensor, num_candidates: int) -> Tensor:
    """(N, C) gate of every candidate, 0 where a token has not chosen it."""
    return torch.zeros(len(ids_NK), num_candidates, dtype=gates_NK.dtype).scatter_(1, ids_NK, gates_NK)
