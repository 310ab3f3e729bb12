"""Layers that variants are made of: projections, norms, rotary positions, short convolution, caches.

Every module that owns parameters says how they start: ``init_parameter(name, parameter, generator)``. The model calls
it with a generator keyed by the parameter's full name, so a tensor starts the same whatever else the model contains.

Legend: B batch, T time, D model width, H heads, G key–value heads, K head channels, C channels, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import Cache
from workbench.ops.short_convolution import Heads, short_convolution

__all__ = [
    "Linear",
    "Pooling",
    "RMSNorm",
    "Rotary",
    "RowCache",
    "ShortConvolution",
    "linear_flops",
]

INIT_SCALE = 0.5
"""Matrices start as N(0, (INIT_SCALE / sqrt(fan_in))²): 0.0156 at width 1024. Our choice, shared by all variants."""


class Linear(nn.Linear):
    """A bias-free projection (…, d_in) -> (…, d_out).

    Args:
        writes_residual: its output is added to the residual stream, so the model starts it smaller by
            1/sqrt(2 · depth).
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, writes_residual: bool = False):
        super().__init__(d_in, d_out, bias=bias)
        self.writes_residual = ("weight",) if writes_residual else ()

    def reset_parameters(self) -> None:
        """Left empty: the model initialises by name."""

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(self.in_features), generator=generator)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis with a learned gain (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) on pairs (c, c + K/2) of the first K head channels; further ones stay as they are.

    Attention depends on differences of positions only, so packed documents need no restart, unless keys are mixed with
    each other after the rotation.
    """

    def __init__(self, channels: int, theta: float = 10_000.0):
        super().__init__()
        self.channels, self.theta = channels, theta

    def forward(
        self, x_BTHK: Tensor, offset: int = 0, *, positions_BT: Tensor | None = None, length: int | None = None
    ) -> Tensor:
        """Rotate (B, T, H, K); the first token stands at position ``offset``, or each at its own of ``positions_BT``,
        which are below ``length``."""
        # fp32 at least: bf16 positions are wrong beyond 256.
        dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
        if positions_BT is None:
            table = rotary_table(x_BTHK.detach(), x_BTHK.shape[1], offset, self.channels, self.theta)
        else:
            assert length is not None
            table = rotary_table(x_BTHK.detach(), length, 0, self.channels, self.theta)[:, positions_BT]
        cos, sin = table.to(dtype)[..., None, :]
        turning, rest = x_BTHK.split((self.channels, x_BTHK.shape[-1] - self.channels), dim=-1)
        a, b = turning.to(dtype).chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BTHK.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@torch.library.custom_op("workbench::rotary_table", mutates_args=())
def rotary_table(like: Tensor, length: int, offset: int, channels: int, theta: float) -> Tensor:
    """(2, T, K/2) cosines and sines of positions ``offset`` to ``offset + length - 1``, on the device of ``like``.

    An operator of its own, so that compiled code reads a table instead of computing sine and cosine once for every
    element of queries and keys (measured on an H200 at 340M: 80 of 415 ms of a step).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, channels, 2, device=like.device, dtype=dtype) / channels)
    angle = torch.outer(torch.arange(offset, offset + length, device=like.device, dtype=dtype), frequency)
    return torch.stack((angle.cos(), angle.sin()))


@rotary_table.register_fake
def _(like: Tensor, length: int, offset: int, channels: int, theta: float) -> Tensor:
    return like.new_empty(2, length, channels // 2, dtype=torch.promote_types(like.dtype, torch.float32))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last W inputs, followed by SiLU. Never crosses a document boundary."""

    def __init__(self, channels: int, width: int = 4):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width))  # weight[:, 0] acts on the current token

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        bound = 1.0 / math.sqrt(self.width)
        parameter.uniform_(-bound, bound, generator=generator)

    def forward(
        self, x_BTC: Tensor, parts: Sequence[Heads], *, segments: Tensor | None = None, tail_BWC: Tensor | None = None
    ) -> list[Tensor]:
        """Convolve (B, T, C) and divide it into heads, in the type of the input.

        Args:
            parts: how the channels are divided; each becomes (B, T, heads, channels), of a length where it has one.
            segments: (B, T) document numbers.
            tail_BWC: the W-1 inputs before this row (zeros where there were none), as kept by a decode cache.
        """
        return short_convolution(x_BTC, self.weight, parts, segments=segments, tail_BPC=tail_BWC)

    def next_tail(self, x_BTC: Tensor, tail_BWC: Tensor) -> Tensor:
        """The W-1 most recent inputs after this row."""
        return torch.cat((tail_BWC, x_BTC), dim=1)[:, x_BTC.shape[1] :]


class Pooling(nn.Module):
    """One key or value for a block of l tokens: φ of arXiv 2502.11089, eq. 7, whose form the paper leaves open.

    Ours: ``mean`` is the mean; ``linear`` W vec(x + e); ``mlp`` mean(x) + W₂ GELU(W₁ vec(x + e) + b₁) + b₂, with a position
    encoding e inside the block and 4·C hidden channels. Both start as the mean. Shared by the heads.

    Args:
        kind: mean, linear or mlp.
        length: tokens l of a block.
        channels: C.
    """

    def __init__(self, kind: str, length: int, channels: int):
        super().__init__()
        self.kind, self.length, self.channels = kind, length, channels
        if kind != "mean":
            self.position = nn.Parameter(torch.empty(channels, length))
        if kind == "linear":
            self.mix = nn.Parameter(torch.empty(channels, channels * length))
        elif kind == "mlp":
            self.into = Linear(channels * length, 4 * channels, bias=True)
            self.out = nn.Parameter(torch.empty(channels, 4 * channels))
            self.out_bias = nn.Parameter(torch.empty(channels))

    no_decay = frozenset({"position", "mix"})  # decay would pull the mean towards nothing

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
        inside = (x_BNGCL + self.position.to(x_BNGCL.dtype)).flatten(-2)
        if self.kind == "linear":
            return F.linear(inside, self.mix)
        return x_BNGCL.mean(-1) + F.linear(F.gelu(self.into(inside)), self.out, self.out_bias)

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


class RowCache(Cache):
    """Several tensors (B, T, …) of the last ``keep`` tokens (all of them when ``keep`` is None).

    ``rows`` hold what has been seen; room for ``length`` tokens is taken at once.

    Args:
        shapes: of one token in each tensor.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device | str,
        dtype: torch.dtype,
        keep: int | None = None,
    ):
        room = length if keep is None else min(keep, length)
        self.keep, self.length, self.held = keep, 0, 0
        self.rows = [torch.empty(batch, room, *shape, device=device, dtype=dtype) for shape in shapes]

    def tensors(self) -> list[Tensor]:
        return self.rows

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append T tokens. Returns all that these tokens may see: those held before, then their own.

        Raises:
            ValueError: when an unwindowed cache is full.
        """
        T, room = new[0].shape[1], self.rows[0].shape[1]
        if self.keep is None:
            if self.held + T > room:
                raise ValueError(f"cache: got {self.held + T} tokens; expected at most {room}. Make it longer.")
            for row, x in zip(self.rows, new, strict=True):
                row[:, self.held : self.held + T] = x
            self.held += T
            seen = tuple(row[:, : self.held] for row in self.rows)
        else:
            seen = tuple(
                torch.cat((row[:, : self.held], x.to(row.dtype)), dim=1) for row, x in zip(self.rows, new, strict=True)
            )
            self.held = min(room, self.held + T)
            for row, x in zip(self.rows, seen):
                row[:, : self.held] = x[:, x.shape[1] - self.held :]
        self.length += T
        return seen


def linear_flops(*shapes: tuple[int, int]) -> int:
    """FLOPs per token of projections (d_in, d_out)."""
    return sum(2 * d_in * d_out for d_in, d_out in shapes)
