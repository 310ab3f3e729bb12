"""Manifold-constrained hyper-connections: n residual streams, mixed by doubly stochastic matrices (DeepSeek, mHC, arXiv
2512.24880; hyper-connections: arXiv 2409.19606).

    x ← R x + q ⊗ branch(p · x),   x (n, D),   p = σ(·),   q = 2 σ(·),   R = Sinkhorn(exp(·))

Published (§4): the three arguments are α φ RMSNorm(vec x) + b, each with a scalar α that starts at 0.01; Sinkhorn is
20 times a division by the sums of columns, then of rows; n = 4. Ours, where the paper leaves it open: the norm has no
gain, which would be a factor of φ; φ starts as N(0, (½/√(nD))²); b starts so that p = 1/n, q = 1 and R is close to the
identity (logarithms -4 beside the diagonal); all streams start as the embedding, the output is their mean, and so the
model starts close to the plain residual.

Legend: B batch, T time, n streams, D model width, M = n² + 2n numbers of a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import Cost, ParameterRole, Range, Residual, ResidualConfig, Role, State, residuals
from workbench.layers import INIT_SCALE

EPSILON = 1e-6
"""Of the norm over all streams."""
OFF_DIAGONAL = -4.0
"""Initial logarithm of what one stream takes from another."""
LARGEST_RANGE = 40.0
"""Between the logarithms of a matrix: smaller ones are raised, so that no sum of a row or column is zero."""


@residuals.register
class HyperConnections(Residual):
    """Streams (B, T, n, D), read and written by learned, input-dependent mappings."""

    roles = {
        "weight": ParameterRole(Role.ROUTER, fan_out=-3),
        "factors": Role.VECTOR,
        "bias": Role.BIAS,
    }
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"streams": 2, "iterations": 3})

    class Config(ResidualConfig):
        """Several residual streams, mixed by doubly stochastic matrices."""

        kind: Literal["hyper_connections"] = "hyper_connections"
        streams: Annotated[int, Field(ge=2)] = 4
        """Streams n. A state has n times the numbers of the plain stream."""
        iterations: Annotated[int, Field(ge=1)] = 20
        """Sinkhorn iterations."""

    def __init__(self, config: Any, width: int, number: int):
        super().__init__()
        self.n, self.iterations = config.streams, config.iterations
        self.weight = nn.Parameter(torch.empty(self.n * (self.n + 2), self.n, width))  # φ
        self.factors = nn.Parameter(torch.empty(3))  # α of p, q, R
        self.bias = nn.Parameter(torch.empty(self.n * (self.n + 2)))  # b of p, q, R

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "weight":
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter[0].numel()), generator=generator)
        elif name == "factors":
            parameter.fill_(0.01)
        else:
            read, write, mix = parameter.split((self.n, self.n, self.n**2))
            read.fill_(-math.log(self.n - 1))
            write.zero_()
            mix.fill_(OFF_DIAGONAL).view(self.n, self.n).fill_diagonal_(0.0)

    @classmethod
    def enter(cls, config: Any, x_BTD: Tensor) -> State:
        return x_BTD[..., None, :].expand(*x_BTD.shape[:2], config.streams, x_BTD.shape[2])

    def forward(self, state: Tensor, branch: Callable[[Tensor], Tensor]) -> State:
        read_BTn, write_BTn, mix_BTnn = self.mappings(state)
        x_BTD = (read_BTn[..., None, :] @ state)[..., 0, :]
        return mix_BTnn @ state + write_BTn[..., None] * branch(x_BTD)[..., None, :]

    def mappings(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p (B, T, n), q (B, T, n) and R (B, T, n, n), from at least fp32."""
        n, wide = self.n, torch.promote_types(state.dtype, torch.float32)
        scores_BTM = nn.functional.linear(state.flatten(-2), self.weight.flatten(1).to(state.dtype)).to(wide)
        scores_BTM = scores_BTM * torch.rsqrt(state.to(wide).square().mean((-2, -1)) + EPSILON)[..., None]
        sizes = n, n, n * n
        read, write, mix = (
            factor * scores + bias
            for factor, scores, bias in zip(self.factors, scores_BTM.split(sizes, dim=-1), self.bias.split(sizes))
        )
        mix_BTnn = sinkhorn(mix.unflatten(-1, (n, n)), self.iterations)
        return read.sigmoid().to(state.dtype), (2 * write.sigmoid()).to(state.dtype), mix_BTnn.to(state.dtype)

    @classmethod
    def exit(cls, config: Any, width: int) -> nn.Module:
        return _Mean()

    @staticmethod
    def stream(state: Tensor) -> Tensor:
        return state.mean(-2)

    def silent_obstacle(self) -> str | None:
        return "the streams are mixed also where a branch writes nothing"

    @classmethod
    def cost(cls, config: Any, width: int, depth: int) -> Cost:
        n, branches = config.streams, 2 * depth
        M = n * (n + 2)
        parameters = branches * (M * n * width + 3 + M)
        # the numbers of a branch, its input, and the mixed streams
        flops = branches * 2.0 * width * (M * n + n + n * n)
        return Cost(parameters=parameters, active_parameters=parameters, flops=flops)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"streams": Range(values=(2, 4))}


class _Mean(nn.Module):
    def forward(self, state_BTnD: Tensor) -> Tensor:
        return state_BTnD.mean(-2)


def sinkhorn(logarithms: Tensor, iterations: int) -> Tensor:
    """(…, n, n) close to doubly stochastic: exp(·), divided in turns by the sums of its columns and of its rows."""
    shifted = logarithms - logarithms.amax((-2, -1), keepdim=True)
    matrix = shifted.clamp_min(-LARGEST_RANGE).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix
