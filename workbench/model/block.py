"""One block of a model. Legend: B batch, T time, D model width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.contract import AuxOutputs, Budget, Cache, feedforwards, mixers
from workbench.layers import RMSNorm
from workbench.model.config import Layer


def times(multiplier: float, x: Tensor) -> Tensor:
    """``multiplier * x``, without an operation where it is 1."""
    return x if multiplier == 1 else multiplier * x


class Block(nn.Module):
    """x + c · mixer(norm(x)), then x + c · feedforward(norm(x)), with c = 1 unless a parametrisation sets it.

    Args:
        feeds_shortcut: whether to return the normalised input of the feed-forward too, for a shortcut.
    """

    branch_multiplier: float = 1.0
    """c."""

    def __init__(self, layer: Layer, width: int, *, feeds_shortcut: bool = False):
        super().__init__()
        self.feeds_shortcut = feeds_shortcut
        self.mixer_norm = RMSNorm(width)
        self.mixer = mixers[layer.mixer.kind](layer.mixer, width)
        self.feedforward_norm = RMSNorm(width)
        self.feedforward = feedforwards[layer.feedforward.kind](layer.feedforward, width)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
    ) -> Any:
        """(B, T, D) -> (B, T, D); with ``feeds_shortcut`` the pair (output, normalised feed-forward input). A
        ``budget`` is for mixers with blocks per query."""
        c = self.branch_multiplier
        inputs: dict[str, Any] = {"segments": segments, "cache": cache, "aux": aux}
        if budget is not None:
            inputs["budget"] = budget
        x_BTD = x_BTD + times(c, self.mixer(self.mixer_norm(x_BTD), **inputs))
        u_BTD = self.feedforward_norm(x_BTD)
        x_BTD = x_BTD + times(c, self.feedforward(u_BTD, segments=segments, aux=aux))
        return (x_BTD, u_BTD) if self.feeds_shortcut else x_BTD
