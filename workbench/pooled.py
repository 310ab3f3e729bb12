"""Numbers of an optimiser step, pooled over its micro-batches and ranks.

Each keeps what can be added, compared or joined; its value is computed at the end. So no number of a step depends on
how its rows are split: a mean is a sum of values over a sum of counts, never a mean of means.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Deviation",
    "Maximum",
    "Mean",
    "Pooled",
    "Quantile",
    "deviation_of",
    "is_token",
    "maximum_of",
    "mean_of",
    "quantiles_of",
]

SAMPLE = 2**16
"""Values of one tensor, evenly spaced, from which quantiles are estimated."""


class Mean(NamedTuple):
    """Σ values / Σ weights, the weights being numbers of values; NaN of nothing."""

    total: Tensor
    weight: Tensor

    @property
    def value(self) -> Tensor:
        return self.total / self.weight

    def joined(self, other: Mean) -> Mean:
        """The mean of the values of both."""
        return Mean(self.total + other.total, self.weight + other.weight)


class Deviation(NamedTuple):
    """Population standard deviation, from sums in fp64; NaN of nothing."""

    total: Tensor
    squares: Tensor
    weight: Tensor

    @property
    def value(self) -> Tensor:
        mean = self.total / self.weight
        return (self.squares / self.weight - mean.square()).clamp_min(0).sqrt()

    def joined(self, other: Deviation) -> Deviation:
        """The deviation of the values of both."""
        return Deviation(self.total + other.total, self.squares + other.squares, self.weight + other.weight)


class Maximum(NamedTuple):
    """The largest value; -inf of nothing."""

    largest: Tensor

    @property
    def value(self) -> Tensor:
        return self.largest

    def joined(self, other: Maximum) -> Maximum:
        """The largest of the values of both."""
        return Maximum(torch.maximum(self.largest, other.largest))


class Quantile(NamedTuple):
    """A quantile of a sample (values,), in which NaN stands for no value; NaN of nothing."""

    sample: Tensor
    fraction: Tensor
    """Scalar between 0 and 1."""

    @property
    def value(self) -> Tensor:
        return self.sample.nanquantile(self.fraction.to(self.sample.dtype))

    def joined(self, other: Quantile) -> Quantile:
        """The quantile of both samples as one."""
        return Quantile(torch.cat((self.sample, other.sample)), self.fraction)


Pooled: TypeAlias = Mean | Deviation | Maximum | Quantile


def mean_of(values: Tensor, valid: Tensor | None = None) -> Mean:
    """Mean of the elements of ``values``.

    Args:
        valid: booleans that broadcast against ``values``: the elements that count. Default: all.
    """
    values = _wide(values)
    if valid is None:
        return Mean(values.sum(), torch.full((), values.numel(), device=values.device))
    valid = valid.expand(values.shape)
    return Mean(torch.where(valid, values, 0.0).sum(), valid.sum())


def deviation_of(values: Tensor, valid: Tensor | None = None) -> Deviation:
    """Standard deviation of the elements of ``values``. Arguments as of :func:`mean_of`."""
    values = values.double()
    mean, squares = mean_of(values, valid), mean_of(values.square(), valid)
    return Deviation(mean.total, squares.total, mean.weight)


def maximum_of(values: Tensor, valid: Tensor | None = None) -> Maximum:
    """Largest element of ``values``. Arguments as of :func:`mean_of`."""
    values = _wide(values)
    return Maximum((values if valid is None else torch.where(valid, values, -torch.inf)).max())


def quantiles_of(name: str, values: Tensor, valid: Tensor | None = None) -> dict[str, Pooled]:
    """Median of the elements of ``values`` as ``name``, 10th and 90th percentile as ``name_low`` and ``name_high``.

    Estimated from :data:`SAMPLE` of the elements. Arguments as of :func:`mean_of`.
    """
    values = values.detach().float()
    if valid is not None:
        values = torch.where(valid, values, torch.nan)
    sample = values.flatten()[:: max(1, values.numel() // SAMPLE)]
    fractions = {f"{name}_low": 0.1, name: 0.5, f"{name}_high": 0.9}
    return {
        key: Quantile(sample, torch.full((), fraction, device=sample.device)) for key, fraction in fractions.items()
    }


def is_token(segments: Tensor | None, further_axes: int = 0) -> Tensor | None:
    """(B, T, 1, …) where there is a token and no padding; None without segments.

    Args:
        segments: (B, T) document numbers, negative where padded.
        further_axes: axes of size 1 at the end.
    """
    return None if segments is None else (segments >= 0).view(*segments.shape, *[1] * further_axes)


def _wide(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
