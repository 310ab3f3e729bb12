"""Norms."""

from __future__ import annotations

from torch import Generator, Tensor, nn

from workbench.contract import Role


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis with a learned gain (arXiv 1910.07467)."""

    roles = {"weight": Role.NORM}

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis with a learned gain and bias (arXiv 1607.06450)."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0 if name == "weight" else 0.0)
