"""One block of a model. Legend: B batch, T time, D model width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.contract import (
    AuxOutputs,
    Budget,
    Cache,
    ResidualConfig,
    Shared,
    State,
    feedforwards,
    mixers,
    residuals,
)
from workbench.layers import RMSNorm
from workbench.model.config import Layer

SHORTCUT = "shortcut"
"""Name of the normalised input of the feed-forward among what a block gives."""


def times(multiplier: float, x: Tensor) -> Tensor:
    """``multiplier * x``, without an operation where it is 1."""
    return x if multiplier == 1 else multiplier * x


class Block(nn.Module):
    """x + c · mixer(norm(x)), then x + c · feedforward(norm(x)), with c = 1 unless a parametrisation sets it. What
    takes the place of x + y is the residual's matter.

    Args:
        gives: names of what later layers take from the mixer; :data:`SHORTCUT` for a shortcut.
        residual: how the branches read and write the stream. Default: plain.
        index: of the block in the model.
    """

    branch_multiplier: float = 1.0
    """c."""

    def __init__(
        self,
        layer: Layer,
        width: int,
        *,
        gives: frozenset[str] = frozenset(),
        residual: ResidualConfig | None = None,
        index: int = 0,
    ):
        super().__init__()
        self.gives = gives
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixers[layer.mixer.kind](layer.mixer, width)
        self.mixer.given_to_later = gives - {SHORTCUT}
        self.feedforward_norm = RMSNorm(width)
        self.feedforward = feedforwards[layer.feedforward.kind](layer.feedforward, width)
        residual = residual or residuals["plain"].Config()
        self.mixer_residual = residuals[residual.kind](residual, width, 2 * index)
        self.feedforward_residual = residuals[residual.kind](residual, width, 2 * index + 1)

    def forward(
        self,
        state: State,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
        taken: Mapping[str, Any] | None = None,
    ) -> Any:
        """The state behind the block, (B, T, D) with the plain residual; where the block gives something, the pair
        (state, what it gives by name).

        Args:
            budget: for mixers with blocks per query.
            taken: what the mixer takes from earlier layers, by name.
        """
        c = self.branch_multiplier
        inputs: dict[str, Any] = {"segments": segments, "cache": cache, "aux": aux}
        if budget is not None:
            inputs["budget"] = budget
        shared = Shared(taken or {})
        if taken or self.mixer.given_to_later:
            inputs["shared"] = shared

        def mix(x_BTD: Tensor) -> Tensor:
            return times(c, self.mixer(self.mixer_norm(x_BTD), **inputs))

        def feed(x_BTD: Tensor) -> Tensor:
            u_BTD = self.feedforward_norm(x_BTD)
            if SHORTCUT in self.gives:
                shared.given[SHORTCUT] = u_BTD
            return times(c, self.feedforward(u_BTD, segments=segments, aux=aux))

        state = self.feedforward_residual(self.mixer_residual(state, mix), feed)
        return (state, shared.given) if self.gives else state

    def mixer_input(self, state: State) -> Tensor:
        """What the mixer reads of the block's input, normalised, (B, T, D)."""
        return self.mixer_norm(self.mixer_residual.branch_input(state))

    def stream(self, output: Any) -> Tensor:
        """The residual stream (B, T, D) of what :meth:`forward` returns."""
        return self.mixer_residual.stream(output[0] if self.gives else output)
