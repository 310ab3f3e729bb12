"""The plain residual stream. Legend: B batch, T time, D model width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from workbench.contract import Residual, ResidualConfig, residuals


@residuals.register
class Plain(Residual):
    """x ← x + branch(x) (arXiv 1512.03385; the norm inside the branch: arXiv 2002.04745)."""

    class Config(ResidualConfig):
        """A sum of all branches."""

        kind: Literal["plain"] = "plain"

    def __init__(self, config: Any, width: int, number: int):
        super().__init__()

    def forward(self, state: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return state + branch(state)
