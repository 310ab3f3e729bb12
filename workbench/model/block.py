"""One block of a model. Legend: B batch, T time, D model width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.contract import AuxOutputs, Cache, feedforwards, mixers
from workbench.layers import RMSNorm
from workbench.model.config import Layer


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)).

    Args:
        feeds_shortcut: whether to return the normalised input of the feed-forward too, for a shortcut.
    """

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
    ) -> Any:
        """(B, T, D) -> (B, T, D); with ``feeds_shortcut`` the pair (output, normalised feed-forward input)."""
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), segments=segments, cache=cache, aux=aux)
        u_BTD = self.feedforward_norm(x_BTD)
        x_BTD = x_BTD + self.feedforward(u_BTD, segments=segments, aux=aux)
        return (x_BTD, u_BTD) if self.feeds_shortcut else x_BTD
