"""Short convolution. Legend: B batch, T time, C channels, W convolution width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from workbench.contract import Role
from workbench.ops.short_convolution import Heads, short_convolution


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last W inputs, followed by SiLU. Never crosses a document boundary.

    Args:
        channels: C.
        width: W.
        residual: x + convolution(x) instead, without SiLU, whose taps start at zero.
    """

    roles = {"weight": Role.CONVOLUTION}

    def __init__(self, channels: int, width: int = 4, *, residual: bool = False):
        super().__init__()
        self.width, self.residual = width, residual
        self.weight = nn.Parameter(torch.empty(channels, width))  # weight[:, 0] acts on the current token

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if self.residual:
            parameter.zero_()
            return
        bound = 1.0 / math.sqrt(self.width)
        parameter.uniform_(-bound, bound, generator=generator)

    def forward(
        self, x_BTC: Tensor, parts: Sequence[Heads], *, segments: Tensor | None = None, tail_BWC: Tensor | None = None
    ) -> list[Tensor]:
        """Convolve (B, T, C) and split it into heads, in the dtype of the input.

        Args:
            parts: how the channels are split; each becomes (B, T, heads, channels), normalised to its ``length`` where
                it has one.
            segments: (B, T) document numbers.
            tail_BWC: the W-1 inputs before this row, from a decode cache; zeros before the start.
        """
        options: dict[str, Any] = {"segments": segments, "tail_BPC": tail_BWC}
        if not self.residual:
            return short_convolution(x_BTC, self.weight, parts, **options)
        convolved = short_convolution(x_BTC, self.weight, parts, silu=False, **options)
        pieces = x_BTC.split([part.heads * part.channels for part in parts], dim=-1)
        return [y + piece.view_as(y) for y, piece in zip(convolved, pieces)]

    def next_tail(self, x_BTC: Tensor, tail_BWC: Tensor) -> Tensor:
        """The W-1 most recent inputs after this row."""
        return torch.cat((tail_BWC, x_BTC), dim=1)[:, x_BTC.shape[1] :]
