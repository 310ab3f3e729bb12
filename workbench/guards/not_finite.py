"""A guard against losses and gradients that are not finite."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.guards.base import Guard, GuardConfig, guards


@guards.register
class NotFinite(Guard):
    """Rejects nothing but what every guard rejects: a loss or gradient that is not finite."""

    class Config(GuardConfig):
        """Loss or gradient not finite."""

        kind: Literal["not_finite"] = "not_finite"

    def initial_state(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64)

    def rejects(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        return torch.zeros_like(loss, dtype=torch.bool)

    def advanced(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        return state
