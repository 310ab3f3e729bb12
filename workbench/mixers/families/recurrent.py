"""What mixers with a state of constant size share: settings of the operation, the cache, the shift by one token.

Legend: B batch, T time, H heads, K key channels, V value channels, C channels of what is cached of the last W tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Mixer, VariantConfig
from workbench.pooled import is_token, mean_of, quantiles_of

CONV_WIDTH = 4
"""Taps of the short convolutions."""


class RecurrentConfig(VariantConfig):
    """How the operation on the state, the delta rule, is computed."""

    chunk: Annotated[int, Field(ge=1)] = 32
    """Edits per chunk of the training form, a power of two; changes speed and rounding, not the function."""
    backend: Literal[
        "auto", "recurrent", "torch", "triton", "fla", "flash_qla", "flash_qla_truncated", "cudnn_truncated"
    ] = "auto"
    """Implementation of the operation. It changes speed and rounding, not the function, except for the two that are
    called truncated: they leave out what the state has forgotten."""

    implementation = frozenset({"chunk", "backend"})

    def resolved(self, width: int) -> Self:
        require(self.chunk & (self.chunk - 1) == 0, "chunk", got=self.chunk, expected="a power of two")
        return self


class AdditiveConfig(RecurrentConfig):
    """The same for operations that only add to the state."""

    chunk: Annotated[int, Field(ge=1)] = 64
    """Tokens per chunk of the training form, a power of two; changes speed and rounding, not the function."""
    backend: Literal["auto", "recurrent", "torch"] = "auto"
    """Implementation of the operation; changes speed and rounding, not the function."""


class StateCache(Cache):
    """``state_BHKV`` (at least fp32), ``tail_BWC``, what is cached of the last W tokens, and ``further`` states."""

    ragged = True

    def __init__(self, state_BHKV: Tensor, tail_BWC: Tensor, *further: Tensor):
        self.state_BHKV, self.tail_BWC, self.further = state_BHKV, tail_BWC, list(further)

    def tensors(self) -> list[Tensor]:
        return [self.state_BHKV, self.tail_BWC, *self.further]

    def store_in(self, dtype: torch.dtype) -> str | None:
        return None  # a state that every token changes stays wide

    def step_bytes(self, lengths: Sequence[int]) -> float:
        return 2 * super().step_bytes(lengths)  # every number is read and written

    @property
    def is_empty(self) -> bool:
        """Whether no token has been seen: states and tails are zero, which needs no reading."""
        return self.positions_B is None and self.length == 0

    def update(self, tokens: int, *tensors: Tensor) -> None:
        """Store :meth:`tensors`, or the first of them, as they are after ``tokens`` more tokens."""
        for mine, new in zip(self.tensors(), tensors):
            mine.copy_(new)
        self.length += tokens if self.positions_B is None else 0


class RecurrentMixer(Mixer):
    """A layer whose decoding keeps a state of constant size."""

    config: Any
    cached_shapes: Sequence[tuple[int, ...]]
    """(H, K, V) of the state, (W, C) of the tail, and those of further states."""

    def score_obstacle(self) -> str:
        return "a recurrent state has no softmax over keys"

    def operation_options(self, segments: Tensor | None, cache: StateCache | None) -> dict[str, Any]:
        """Keyword arguments of the operation on the state: documents, the state before the first token, how it is
        computed."""
        return {
            "segments": segments,
            "state_BHKV": None if cache is None else cache.state_BHKV,
            "chunk": self.config.chunk,
            "backend": self.config.backend if cache is None or cache.positions_B is None else "recurrent",
        }

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        wide = torch.promote_types(dtype, torch.float32)
        types = [wide, dtype] + [wide] * (len(self.cached_shapes) - 2)
        return StateCache(
            *(torch.zeros(batch, *shape, device=device, dtype=of) for shape, of in zip(self.cached_shapes, types))
        )


def token_before(x_BTC: Tensor, segments: Tensor | None, last_B1C: Tensor | None = None) -> Tensor:
    """The inputs of the tokens before, (B, T, C); zero at the first token of a document.

    Args:
        segments: (B, T) document numbers.
        last_B1C: the input before the first token. Default: zero.
    """
    last_B1C = torch.zeros_like(x_BTC[:, :1]) if last_B1C is None else last_B1C
    before_BTC = torch.cat((last_B1C, x_BTC[:, :-1]), dim=1)
    if segments is None:
        return before_BTC
    return torch.where(starts(segments)[..., None], 0.0, before_BTC)


def starts(segments_BT: Tensor) -> Tensor:
    """(B, T) whether a token is the first of a document that begins inside the row."""
    return F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0))


def fill_time_steps(parameter: Tensor, generator: Generator) -> None:
    """Biases whose softplus is log-uniform in (0.001, 0.1), as of Mamba."""
    step = parameter.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp().clamp_min(1e-4)
    parameter.copy_(step + torch.log(-torch.expm1(-step)))


def record_state(aux: AuxOutputs | None, state_BHKV: Tensor | None, g: Tensor | None, segments: Tensor | None) -> None:
    """Norm of the state at the end of rows, where it is known, and half-life in tokens, where metrics are collected.
    Padding does not count, nor do rows that end with it."""
    if aux is None or not aux.collect_metrics:
        return
    ends_with_token = None if segments is None else is_token(segments[:, -1:])
    if state_BHKV is not None:
        aux.metrics["state_norm"] = mean_of(state_BHKV.detach().norm(dim=(-2, -1)), ends_with_token)
    if g is not None:
        half_life = math.log(0.5) / g.detach().clamp_max(-1e-6)
        aux.metrics.update(quantiles_of("half_life", half_life, is_token(segments, g.dim() - 2)))
