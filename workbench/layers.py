"""Layers that variants are made of: projections, norms, rotary positions, short convolution, key–value cache.

Every module that owns parameters says how they start: ``init_parameter(name, parameter, generator)``. The model calls
it with a generator keyed by the parameter's full name, so a tensor starts the same whatever else the model contains.

Legend: B batch, T time, D model width, H heads, G key–value heads, K head channels, C channels, W convolution width.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from workbench.contract import Cache
from workbench.ops.short_convolution import short_convolution

__all__ = ["Embedding", "KeyValueCache", "Linear", "RMSNorm", "Rotary", "ShortConvolution", "linear_flops"]

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


class Embedding(nn.Embedding):
    """Token embedding (…) int64 -> (…, D). Excluded from weight decay."""

    no_decay = frozenset({"weight"})

    def reset_parameters(self) -> None:
        """Left empty: the model initialises by name."""

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        # As fan-in D: a tied head then starts with logits of standard deviation INIT_SCALE.
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(self.embedding_dim), generator=generator)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis with a learned gain (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) on pairs (c, c + K/2) of head channels.

    Attention depends on differences of positions only, so packed documents need no restart.
    """

    def __init__(self, channels: int, theta: float = 10_000.0):
        super().__init__()
        self.channels, self.theta = channels, theta

    def forward(self, x_BTHK: Tensor, offset: int = 0) -> Tensor:
        """Rotate (B, T, H, K); the first token stands at position ``offset``."""
        # fp32 at least: bf16 positions are wrong beyond 256.
        dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
        T = x_BTHK.shape[1]
        cos, sin = rotary_table(x_BTHK.detach(), T, offset, self.channels, self.theta).to(dtype)[:, :, None]
        a, b = x_BTHK.to(dtype).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x_BTHK.dtype)


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

    def forward(self, x_BTC: Tensor, *, segments: Tensor | None = None, tail_BWC: Tensor | None = None) -> Tensor:
        """Convolve (B, T, C), in the type of the input.

        Args:
            segments: (B, T) document numbers.
            tail_BWC: the W-1 inputs before this row (zeros where there were none), as kept by a decode cache.
        """
        return short_convolution(x_BTC, self.weight, segments=segments, tail_BPC=tail_BWC)

    def next_tail(self, x_BTC: Tensor, tail_BWC: Tensor) -> Tensor:
        """The W-1 most recent inputs after this row."""
        return torch.cat((tail_BWC, x_BTC), dim=1)[:, x_BTC.shape[1] :]


class KeyValueCache(Cache):
    """Keys and values of the last ``keep`` tokens (all of them when ``keep`` is None).

    ``keys_BTGK`` and ``values_BTGK`` hold what has been seen; room for ``length`` tokens is taken at once.
    """

    def __init__(
        self, batch: int, length: int, heads: int, channels: int, device: torch.device | str, dtype: torch.dtype,
        keep: int | None = None,
    ):  # fmt: skip
        room = length if keep is None else min(keep, length)
        self.keep, self.length, self.held = keep, 0, 0
        self.keys_BTGK = torch.empty(batch, room, heads, channels, device=device, dtype=dtype)
        self.values_BTGK = torch.empty_like(self.keys_BTGK)

    def tensors(self) -> list[Tensor]:
        return [self.keys_BTGK, self.values_BTGK]

    def extend(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append T tokens. Returns all keys and values that these tokens may see: those held before, then their own.

        Raises:
            ValueError: when an unwindowed cache is full.
        """
        T, room = k_BTGK.shape[1], self.keys_BTGK.shape[1]
        if self.keep is None:
            if self.held + T > room:
                raise ValueError(f"cache: got {self.held + T} tokens; expected at most {room}. Make it longer.")
            self.keys_BTGK[:, self.held : self.held + T] = k_BTGK
            self.values_BTGK[:, self.held : self.held + T] = v_BTGK
            self.held += T
            seen = self.keys_BTGK[:, : self.held], self.values_BTGK[:, : self.held]
        else:
            keys = torch.cat((self.keys_BTGK[:, : self.held], k_BTGK), dim=1)
            values = torch.cat((self.values_BTGK[:, : self.held], v_BTGK), dim=1)
            self.held = min(room, keys.shape[1])
            self.keys_BTGK[:, : self.held] = keys[:, keys.shape[1] - self.held :]
            self.values_BTGK[:, : self.held] = values[:, values.shape[1] - self.held :]
            seen = keys, values
        self.length += T
        return seen


def linear_flops(*shapes: tuple[int, int]) -> int:
    """FLOPs per token of projections (d_in, d_out)."""
    return sum(2 * d_in * d_out for d_in, d_out in shapes)
