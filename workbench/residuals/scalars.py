"""Learned scalars of the residual stream and of the embedding, per block.

    x ← λ x + λ₀ x₀, then the block's branches as usual, with x₀ the embedding

Second-hand, from the logs of modded-nanogpt and nanochat (2026-01-11), where λ starts at 1, λ₀ at 0, and x₀ is
normalised. Ours: x₀ is the embedding as the first block reads it; one learning rate for both (there that of λ is a
hundredth of that of λ₀).

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from workbench.contract import Cost, Residual, ResidualConfig, Role, State, residuals


@residuals.register
class Scalars(Residual):
    """Two scalars per block: of the stream and of the embedding. The state is (stream, embedding)."""

    roles = {"scalars": Role.VECTOR}

    class Config(ResidualConfig):
        """Learned scalars of the stream and of the embedding."""

        kind: Literal["scalars"] = "scalars"

    def __init__(self, config: Any, width: int, number: int):
        super().__init__()
        self.scalars = nn.Parameter(torch.empty(2)) if number % 2 == 0 else None  # once per block, before its mixer

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter[0], parameter[1] = 1.0, 0.0

    @classmethod
    def enter(cls, config: Any, x_BTD: Tensor) -> State:
        return x_BTD, x_BTD

    def forward(self, state: tuple[Tensor, Tensor], branch: Callable[[Tensor], Tensor]) -> State:
        x_BTD, embedded_BTD = state
        if self.scalars is not None:
            of_stream, of_embedding = self.scalars.to(x_BTD.dtype)
            x_BTD = of_stream * x_BTD + of_embedding * embedded_BTD
        return x_BTD + branch(x_BTD), embedded_BTD

    @classmethod
    def exit(cls, config: Any, width: int) -> nn.Module:
        return _Stream()

    @staticmethod
    def stream(state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0]

    def silent_obstacle(self) -> str | None:
        return "the scalars of a copied block act on the stream also where its branches write nothing"

    @classmethod
    def cost(cls, config: Any, width: int, depth: int) -> Cost:
        return Cost(parameters=2 * depth, active_parameters=2 * depth, flops=0.0)


class _Stream(nn.Module):
    def forward(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[0]
