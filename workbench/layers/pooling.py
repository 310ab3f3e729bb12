"""Pooling of keys or values over blocks of tokens.

Legend: B batch, N blocks, G heads, C channels, l tokens of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import ParameterRole, Role
from workbench.layers.projections import Linear


class Pooling(nn.Module):
    """One key or value for a block of l tokens: φ of arXiv 2502.11089, eq. 7, whose form the paper leaves open.

    Ours: ``mean`` is the mean; ``linear`` is W vec(x + e); ``mlp`` is mean(x) + W₂ GELU(W₁ vec(x + e) + b₁) + b₂, with
    an encoding e of the position inside the block and 4·C hidden channels. Both start as the mean. Shared by the heads.

    Args:
        kind: mean, linear or mlp.
        length: tokens l of a block.
        channels: C.
    """

    roles = {
        "position": ParameterRole(Role.VECTOR, decays=False, fan_out=-2, fan_in=None),
        "mix": ParameterRole(Role.HIDDEN, decays=False),  # decay would pull the mean towards zero
        "out": Role.HIDDEN,
        "out_bias": Role.BIAS,
    }

    def __init__(self, kind: str, length: int, channels: int):
        super().__init__()
        self.kind, self.length, self.channels = kind, length, channels
        if kind != "mean":
            self.position = nn.Parameter(torch.empty(channels, length))
        if kind == "linear":
            self.mix = nn.Parameter(torch.empty(channels, channels * length))
        elif kind == "mlp":
            self.into = Linear(channels * length, 4 * channels, bias=True)
            self.into.sensitive = True  # its blocks choose tokens, and their number need not be a multiple of 16
            self.out = nn.Parameter(torch.empty(channels, 4 * channels))
            self.out_bias = nn.Parameter(torch.empty(channels))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.zero_()
        if name == "position":
            parameter.normal_(0.0, 0.02, generator=generator)
        elif name == "mix":
            parameter.view(self.channels, self.channels, self.length).diagonal().fill_(1 / self.length)

    def forward(self, x_BNGCL: Tensor) -> Tensor:
        """(B, N, G, C, l) -> (B, N, G, C)."""
        if self.kind == "mean":
            return x_BNGCL.mean(-1)
        inputs_BNGE = (x_BNGCL + self.position.to(x_BNGCL.dtype)).flatten(-2)
        if self.kind == "linear":
            return F.linear(inputs_BNGE, self.mix)
        return x_BNGCL.mean(-1) + F.linear(F.gelu(self.into(inputs_BNGE)), self.out, self.out_bias)

    @staticmethod
    def parameters_of(kind: str, length: int, channels: int) -> int:
        """Stored parameters."""
        C, LC = channels, length * channels
        return {"mean": 0, "linear": LC + LC * C, "mlp": LC + 4 * LC * C + 4 * C + 4 * C * C + C}[kind]

    @staticmethod
    def flops_of(kind: str, length: int, channels: int) -> int:
        """FLOPs of one block of one head."""
        C, LC = channels, length * channels
        return {"mean": 0, "linear": 2 * LC * C, "mlp": 2 * (4 * LC * C + 4 * C * C)}[kind]
