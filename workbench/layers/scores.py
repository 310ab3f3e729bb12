"""Scale of attention scores."""

from __future__ import annotations

from torch import Tensor


class ScaledScores:
    """What a module with attention scores q·k / sqrt(channels) declares, so that a parametrisation can multiply them.

    A module whose keys and queries have unit length is none: its scores do not grow with the channels.
    """

    score_channels: int
    """Channels over which a score is a sum."""
    score_multiplier: float = 1.0
    """Factor of the scores; set by the model's parametrisation."""

    def scaled(self, q: Tensor) -> Tensor:
        """Queries with the multiplier."""
        return q if self.score_multiplier == 1 else q * self.score_multiplier
