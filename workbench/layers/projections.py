"""Projections and their FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Generator, Tensor, nn

from workbench.contract import ParameterRole, Role
from workbench.layers.initial_values import INIT_SCALE
from workbench.ops.scaled_linear import Scaling, scaled_linear


class Linear(nn.Linear):
    """A projection (…, d_in) -> (…, d_out), without bias by default.

    Args:
        writes_residual: whether its output is added to the residual stream; the model then scales its initial values by
            1/sqrt(2 · depth).
        parts: (heads, channels of one) of every projection that is stored in this one, in order; default: one.
        input_square: mean square of an input channel at the start, by whose root the initial values are divided.
    """

    sensitive = False
    """Whether its products stay in the precision of the model where others are computed in eight bits."""
    fp8: Scaling | None = None
    """Scaling of products in eight bits in training (:mod:`workbench.ops.scaled_linear`); None for none."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        writes_residual: bool = False,
        input_square: float = 1.0,
        parts: tuple[tuple[int, int], ...] = (),
    ):
        super().__init__(d_in, d_out, bias=bias)
        self.input_square = input_square
        weight = ParameterRole(Role.HIDDEN, writes_residual=writes_residual, parts=parts)
        self.roles = {"weight": weight, "bias": ParameterRole.of(Role.BIAS)}

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is None or not self.training:
            return super().forward(x)
        return scaled_linear(x, self.weight, self.bias, self.fp8)

    def role(self, role: Role) -> ParameterRole:
        """The weight's declaration with another role."""
        return replace(self.roles["weight"], role=role)

    def reset_parameters(self) -> None:
        """Does nothing: the model initialises parameters by name."""

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            fan_in = self.in_features * self.input_square
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(fan_in), generator=generator)


def linear_flops(*shapes: tuple[int, int]) -> int:
    """FLOPs per token of projections (d_in, d_out)."""
    return sum(2 * d_in * d_out for d_in, d_out in shapes)
