"""A guard against gradient norms many times their running mean."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.guards.base import Guard, GuardConfig, guards

DECAY = 0.98
"""Decay of the running mean of the gradient norm, which starts as a plain mean."""


@guards.register
class Ratio(Guard):
    """Rejects a gradient norm that is many times its running mean, from the second step on."""

    class Config(GuardConfig):
        """Many times the running mean."""

        kind: Literal["ratio"] = "ratio"
        factor: Annotated[float, Field(gt=1)] = 20.0
        """Largest gradient norm, as a factor of its running mean."""

    def initial_state(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def rejects(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        mean, steps = state.unbind()
        return (steps > 0) & (norm > self.config.factor * mean)

    def advanced(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        mean, steps = state.unbind()
        decay = (1 - 1 / (steps + 1)).clamp_max(DECAY)
        return torch.stack((decay * mean + (1 - decay) * norm, steps + 1))
