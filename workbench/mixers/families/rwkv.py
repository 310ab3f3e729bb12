"""What time mixing of RWKV consists of: mixtures with the token before, projections of low rank, norms of heads.

Legend: B batch, T time, D model width, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import Role
from workbench.layers import Linear
from workbench.mixers.families.recurrent import RecurrentMixer, token_before


class TokenMixtures(nn.Module):
    """Learned mixtures of a token with the one before, per channel: x + m (x_before - x).

    Args:
        width: D.
        exponents: name of a mixture -> e of its initial values m = 1 - (channel / D)^e.
    """

    roles = {"mix": Role.VECTOR}

    def __init__(self, width: int, exponents: Mapping[str, float]):
        super().__init__()
        self.exponents = dict(exponents)
        self.mix = nn.Parameter(torch.empty(len(exponents) * width))  # one mixture after another

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        width = len(parameter) // len(self.exponents)
        place_D = torch.arange(width, device=parameter.device, dtype=parameter.dtype) / width
        parameter.copy_(torch.cat([1 - place_D**exponent for exponent in self.exponents.values()]))

    def forward(self, x_BTD: Tensor, segments: Tensor | None, last_B1D: Tensor | None) -> dict[str, Tensor]:
        """Name -> (B, T, D). Arguments as of :func:`workbench.mixers.families.recurrent.token_before`."""
        change_BTD = token_before(x_BTD, segments, last_B1D) - x_BTD
        mixtures = self.mix.to(x_BTD.dtype).chunk(len(self.exponents))
        return {name: x_BTD + change_BTD * mix_D for name, mix_D in zip(self.exponents, mixtures)}


class LowRank(nn.Module):
    """W↑ f(W↓ x).

    Args:
        d_in, rank, d_out: channels.
        activation: f. Default: none.
        sensitive: as of :class:`workbench.layers.Linear`.
    """

    def __init__(
        self,
        d_in: int,
        rank: int,
        d_out: int,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        sensitive: bool = False,
    ):
        super().__init__()
        self.down, self.up, self.activation = Linear(d_in, rank), Linear(rank, d_out), activation
        self.down.sensitive = self.up.sensitive = sensitive

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        return self.up(low if self.activation is None else self.activation(low))


class HeadNorm(nn.Module):
    """LayerNorm of every head over its K channels, with a gain and a bias per channel; ε is 1e-5 K."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(heads, channels)) for _ in range(2))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(float(name == "weight"))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        K = x_BTHK.shape[-1]
        return F.layer_norm(x_BTHK, (K,), eps=1e-5 * K) * self.weight.to(x_BTHK.dtype) + self.bias.to(x_BTHK.dtype)


class TimeMixing(RecurrentMixer):
    """Receptance, keys, values and the output of a layer, and what its initial values stand in the way of."""

    vectors: ClassVar[tuple[str, ...]]
    """Names of parameters (D,)."""

    def __init__(self, config: Any, width: int, exponents: Mapping[str, float]):
        super().__init__()
        self.config, self.K, self.H = config, config.head_dim, width // config.head_dim
        self.cached_shapes = (self.H, self.K, self.K), (1, width)
        self.mixtures = TokenMixtures(width, exponents)
        self.r, self.k, self.v = (Linear(width, width, parts=((self.H, self.K),)) for _ in range(3))
        for name in self.vectors:
            setattr(self, name, nn.Parameter(torch.empty(width)))
        self.norm = HeadNorm(self.H, self.K)
        self.out = Linear(width, width, writes_residual=True)

    def transfer_constants(self) -> dict[str, float]:
        return {"initialisation": self.out.in_features}  # channels differ by their place

    def width_obstacle(self) -> str:
        return "mixtures and biases start with values that depend on a channel's place"

    def heads(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, H, K), in at least fp32."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.H, self.K))


def places(width: int, K: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) from 0 to 1 along the channels, and from -1 to 1 along those of every head, squared with its sign, on which
    initial values depend."""
    place_D = torch.arange(width, device=like.device, dtype=like.dtype)
    zigzag_D = 2 * (place_D % K) / (K - 1) - 1
    return place_D / max(1, width - 1), zigzag_D * zigzag_D.abs()
