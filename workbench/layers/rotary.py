"""Rotary positions, as trained or scaled to a longer context.

Legend: B batch, T time, H heads, K rotated head channels, w_i = theta^(-2i/K) the frequency of pair i, L the context
before scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from workbench.config import Config, nearest, require


class FrequencyScaling(Config):
    """Base of the scalings: each multiplies the frequencies by ratios of its own."""

    conformance_values: ClassVar[tuple[dict[str, Any], ...]] = ({"kind": "linear", "factor": 4.0},)
    """Values with which the conformance suite builds what has a field of this type."""

    kind: str
    factor: Annotated[float, Field(ge=1)]
    """How many times as long the context becomes."""

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0

    def ratios(self, channels: int, theta: float) -> list[float]:
        """Scaled over unscaled frequency of each of the K/2 pairs."""
        raise NotImplementedError


class LinearScaling(FrequencyScaling):
    """Position interpolation (arXiv 2306.15595): every position is divided by the factor."""

    kind: Literal["linear"] = "linear"

    def ratios(self, channels: int, theta: float) -> list[float]:
        return [1 / self.factor] * (channels // 2)


class Llama3Scaling(FrequencyScaling):
    """The scaling of Llama 3.1 (arXiv 2407.21783; formula: its released code). A pair that turns more than
    ``high_frequency`` times within L keeps its frequency, one that turns less than ``low_frequency`` times is
    interpolated, and between them the ratio is linear in the number of turns."""

    kind: Literal["llama3"] = "llama3"
    original_context: Annotated[int, Field(ge=1)]
    """L, in tokens."""
    low_frequency: Annotated[float, Field(gt=0)] = 1.0
    """Turns within L up to which a pair is interpolated."""
    high_frequency: Annotated[float, Field(gt=0)] = 4.0
    """Turns within L from which a pair keeps its frequency."""

    def model_post_init(self, _context: object) -> None:
        require(
            self.low_frequency < self.high_frequency,
            "low_frequency",
            got=self.low_frequency,
            expected=f"less than high_frequency={self.high_frequency}",
        )

    def ratios(self, channels: int, theta: float) -> list[float]:
        ratios = []
        for i in range(channels // 2):
            turns = self.original_context * theta ** (-2 * i / channels) / (2 * math.pi)
            kept = (turns - self.low_frequency) / (self.high_frequency - self.low_frequency)
            ratios.append(_mixed(kept, self.factor))
        return ratios


class YarnScaling(FrequencyScaling):
    """YaRN (arXiv 2309.00071, §3.2–3.4): between two pairs, found from their turns within L, frequencies pass linearly
    from kept to interpolated, and scores are multiplied by the square of a magnitude."""

    kind: Literal["yarn"] = "yarn"
    original_context: Annotated[int, Field(ge=1)]
    """L, in tokens."""
    fast_turns: Annotated[float, Field(gt=0)] = 32.0
    """Turns within L from which a pair keeps its frequency (β)."""
    slow_turns: Annotated[float, Field(gt=0)] = 1.0
    """Turns within L up to which a pair is interpolated (α)."""
    truncate: bool = True
    """Whether the two pairs are rounded outwards to whole numbers, as in the published code."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """Magnitude of queries and keys. Default: 0.1 ln(factor) + 1."""

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def ratios(self, channels: int, theta: float) -> list[float]:
        first, last = (
            channels * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast_turns, self.slow_turns)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, channels - 1)
        width = last - first or 0.001  # as in the published code
        return [_mixed(1 - (i - first) / width, self.factor) for i in range(channels // 2)]


SCALINGS: dict[str, type[FrequencyScaling]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def _parsed(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    require(kind in SCALINGS, "kind", got=kind, expected="a scaling of rotary positions", do=nearest(kind, SCALINGS))
    return SCALINGS[str(kind)].parse(value)


RotaryScaling = Annotated[SerializeAsAny[FrequencyScaling], BeforeValidator(_parsed)]
"""A scaling, also as data with its ``kind``."""


def yarn_magnitude(factor: float, slope: float = 1.0) -> float:
    """0.1 · slope · ln(factor) + 1 (arXiv 2309.00071, eq. 22); ``slope`` is DeepSeek's ``mscale``."""
    return 0.1 * slope * math.log(factor) + 1.0


def _mixed(kept: float, factor: float) -> float:
    """Ratio of a frequency of which the share ``kept``, limited to 0 … 1, is unscaled."""
    kept = min(max(kept, 0.0), 1.0)
    return kept + (1 - kept) / factor


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) on pairs (c, c + K/2) of the first K channels; the others pass unchanged.

    Attention depends on differences of positions only, so positions need not restart in packed documents, unless keys
    are mixed with each other after the rotation.

    Args:
        channels: K, even.
        theta: base of the frequencies.
        scaling: to a longer context. Default: none.
    """

    def __init__(self, channels: int, theta: float = 10_000.0, scaling: FrequencyScaling | None = None):
        super().__init__()
        self.channels, self.theta = channels, theta
        self.ratios = None if scaling is None else scaling.ratios(channels, theta)
        self.magnitude = 1.0 if scaling is None else scaling.magnitude
        self._frequencies: Tensor | None = None

    def forward(
        self, x_BTHK: Tensor, offset: int = 0, *, positions_BT: Tensor | None = None, length: int | None = None
    ) -> Tensor:
        """Rotate (B, T, H, K or more channels).

        Args:
            offset: position of the first token.
            positions_BT: position of every token, instead of ``offset``.
            length: what all of ``positions_BT`` lie below, if that is known; cosines and sines are then computed once
                for every position and looked up.
        """
        if positions_BT is not None and length is None:
            return self._rotated(x_BTHK, positions_BT)
        # at least fp32: bf16 positions are wrong beyond 256
        dtype = torch.promote_types(x_BTHK.dtype, torch.float32)
        if positions_BT is None:
            table = self._table(x_BTHK, x_BTHK.shape[1], offset)
        else:
            assert length is not None
            table = self._table(x_BTHK, length, 0)[:, positions_BT]
        cos, sin = table.to(dtype)[..., None, :]
        return turned(x_BTHK, cos, sin)

    def pair(self, q_BTHK: Tensor, k_BTGK: Tensor, **positions: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated; at positions on the device both at once. Arguments as of :meth:`forward`."""
        if positions.get("positions_BT") is None or positions.get("length") is not None:
            return self(q_BTHK, **positions), self(k_BTGK, **positions)
        heads = q_BTHK.shape[2], k_BTGK.shape[2]
        both = torch.cat((q_BTHK, k_BTGK.to(q_BTHK.dtype)), dim=2)
        q_BTHK, rotated_BTGK = self._rotated(both, positions["positions_BT"]).split(heads, dim=2)
        return q_BTHK, rotated_BTGK.to(k_BTGK.dtype)

    def _rotated(self, x_BTHK: Tensor, positions_BT: Tensor) -> Tensor:
        """Rotation in few operations, for decoding steps, which are bound by their number.

        With signed frequencies (-w, w), cos is that of both channels of a pair, and sin has the sign that the other
        channel gets: y = x cos + swapped(x) sin.
        """
        x_rot, x_pass = x_BTHK.split((self.channels, x_BTHK.shape[-1] - self.channels), dim=-1)
        angle_BT1K = (positions_BT[..., None] * self._frequencies_of(x_BTHK))[:, :, None]
        cos, sin = angle_BT1K.cos(), angle_BT1K.sin()
        if self.magnitude != 1:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        rotated = (x_rot * cos + x_rot.roll(self.channels // 2, -1) * sin).to(x_BTHK.dtype)
        return torch.cat((rotated, x_pass), dim=-1) if x_pass.shape[-1] else rotated

    def _frequencies_of(self, reference: Tensor) -> Tensor:
        """(K,) frequencies of the channels, those of the first half with a minus, on the device of ``reference``;
        computed once."""
        dtype = torch.promote_types(reference.dtype, torch.float32)
        cached = self._frequencies
        if cached is None or cached.device != reference.device or cached.dtype != dtype:
            half = frequencies(self.channels, self.theta, self.ratios, device=reference.device, dtype=dtype)
            cached = self._frequencies = torch.cat((-half, half))
        return cached

    def _table(self, x_BTHK: Tensor, length: int, offset: int) -> Tensor:
        return rotary_table(x_BTHK.detach(), length, offset, self.channels, self.theta, self.ratios, self.magnitude)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (c, c + A) of the first 2A channels of (…, K), turned by A angles in the type of ``cos``; the others pass
    unchanged.

    Args:
        cos, sin: (…, A) of the angles.
    """
    A = cos.shape[-1]
    a, b, x_pass = x.split((A, A, x.shape[-1] - 2 * A), dim=-1)
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    return torch.cat((rotated, x_pass), dim=-1) if x_pass.shape[-1] else rotated


def frequencies(
    channels: int, theta: float, ratios: Sequence[float] | None, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(K/2,) frequency of every pair."""
    frequency = theta ** (-torch.arange(0, channels, 2, device=device, dtype=dtype) / channels)
    return frequency if ratios is None else frequency * torch.tensor(ratios, device=device, dtype=dtype)


@torch.library.custom_op("workbench::rotary_table", mutates_args=())
def rotary_table(
    reference: Tensor,
    length: int,
    offset: int,
    channels: int,
    theta: float,
    ratios: Sequence[float] | None = None,
    magnitude: float = 1.0,
) -> Tensor:
    """(2, T, K/2) cosines and sines of positions ``offset`` to ``offset + length - 1``, on the device of ``reference``.

    An operator of its own, so that compiled code reads a table instead of computing sine and cosine once for every
    element of queries and keys (measured on an H200 at 340M: 80 of 415 ms of a step).

    Args:
        ratios: factor of each frequency. Default: 1.
        magnitude: factor of the table.
    """
    dtype = torch.promote_types(reference.dtype, torch.float32)
    frequency = frequencies(channels, theta, ratios, device=reference.device, dtype=dtype)
    angle = torch.outer(torch.arange(offset, offset + length, device=reference.device, dtype=dtype), frequency)
    table = torch.stack((angle.cos(), angle.sin()))
    return table if magnitude == 1 else table * magnitude


@rotary_table.register_fake
def _(
    reference: Tensor,
    length: int,
    offset: int,
    channels: int,
    theta: float,
    ratios: Sequence[float] | None = None,
    magnitude: float = 1.0,
) -> Tensor:
    return reference.new_empty(2, length, channels // 2, dtype=torch.promote_types(reference.dtype, torch.float32))
