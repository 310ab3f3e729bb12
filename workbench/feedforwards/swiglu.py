"""SwiGLU feed-forward (arXiv 2002.05202): W_d (silu(W_g x) * W_u x). Legend: D model width, F hidden width."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workbench.contract import AuxOutputs, Cost, FeedForward, RescalingPair, VariantConfig, feedforwards
from workbench.layers import Linear, linear_flops


def default_hidden(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of width/4 (at least 8): 352 at 128, 2816 at 1024, 5632 at 2048."""
    step = max(8, width // 4 // 8 * 8)
    return -(-8 * width // (3 * step)) * step


@feedforwards.register
class SwiGLU(FeedForward):
    """Dense gated feed-forward."""

    class Config(VariantConfig):
        """SwiGLU feed-forward."""

        kind: Literal["swiglu"] = "swiglu"
        hidden: Annotated[int | None, Field(ge=1)] = None
        """Hidden width F. Default: 8/3 of the model width, rounded up."""

        def resolved(self, width: int) -> Self:
            return self.changed(hidden=self.hidden or default_hidden(width))

    widens = ("hidden",)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.up = Linear(width, 2 * config.hidden, parts=((1, config.hidden),) * 2)  # gate and value in one product
        self.down = Linear(config.hidden, width, writes_residual=True)

    def forward(self, x_BTD: Tensor, *, segments: Tensor | None = None, aux: AuxOutputs | None = None) -> Tensor:
        gate_BTF, value_BTF = self.up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * value_BTF)

    def rescaling_pairs(self) -> list[RescalingPair]:
        # the gate passes a SiLU, the value does not
        F = self.down.in_features
        up = torch.cat((torch.full((F,), -1), torch.arange(F)))[:, None]
        down = torch.arange(F)[None]
        return [RescalingPair("up_down", {"up.weight": up}, {"down.weight": down}, torch.zeros(F, dtype=torch.int64))]

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        parameters = 3 * width * config.hidden
        return Cost(parameters, parameters, linear_flops((width, 2 * config.hidden), (config.hidden, width)))
