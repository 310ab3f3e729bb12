"""A guard against spikes of the loss or the gradient norm, by a median and its absolute deviation.

    x_t > m + k · max(d, FLOOR · |m|),   m = median x_s,   d = 1.4826 · median |x_s - m|

over the last steps s that were made. 1.4826 times the median absolute deviation is the standard deviation of normal
values. A loss falls, which widens d by no noise: of a loss, d is at most 1.4826 / √2 · median |x_s - x_{s-1}|, the
same standard deviation from differences of neighbours. Of a gradient norm, which may rise for good, it is not.

Public runs count steps beyond seven standard deviations of a running mean (the spike score of OLMo 2, arXiv
2501.00656); medians, unlike these, do not follow the spikes. The rule is ours.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.guards.base import Guard, GuardConfig, guards

TO_DEVIATION = 1.4826
FLOOR = 0.01
"""Smallest deviation as a fraction of the median: steps that hardly vary do not make a spike of a small change."""


@guards.register
class Spike(Guard):
    """Rejects a loss or gradient norm far above its recent median."""

    class Config(GuardConfig):
        """Far above the recent median."""

        kind: Literal["spike"] = "spike"
        of: Literal["loss", "gradient_norm"] = "loss"
        """What is watched: the loss of a step, or the norm of its gradient before clipping, whose ordinary values have
        far outliers too."""
        memory: Annotated[int, Field(ge=8)] = 100
        """Steps of which the median is taken; steps that were skipped are not among them."""
        after: Annotated[int, Field(ge=3)] = 20
        """Steps in memory before anything is rejected."""
        deviations: Annotated[float, Field(gt=0)] = 10.0
        """Standard deviations k above the median from which on a step is rejected."""

        @property
        def name(self) -> str:
            return f"{self.of}_spike"

    def initial_state(self) -> Tensor:
        return torch.full((self.config.memory,), torch.nan, dtype=torch.float64)

    def rejects(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        median = state.nanmedian()
        deviation = TO_DEVIATION * (state - median).abs().nanmedian()
        if self.config.of == "loss":
            from_neighbours = TO_DEVIATION / math.sqrt(2) * (state[1:] - state[:-1]).abs().nanmedian()
            deviation = torch.minimum(deviation, from_neighbours)
        is_known = state.isfinite().sum() >= min(self.config.after, self.config.memory)
        limit = median + self.config.deviations * torch.maximum(deviation, FLOOR * median.abs())
        return is_known & (self._watched(loss, norm) > limit)

    def advanced(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        return torch.cat((state[1:], self._watched(loss, norm)[None]))

    def _watched(self, loss: Tensor, norm: Tensor) -> Tensor:
        return loss if self.config.of == "loss" else norm
