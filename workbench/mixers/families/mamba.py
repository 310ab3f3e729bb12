"""The Mamba-2 layer and settings of its relatives. ``mamba2`` says what is published.

Legend: B batch, T time, D width, H heads, P channels of a head, N of the state, G groups, C convolved channels.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import AuxOutputs, Cache, Cost, Range, Role
from workbench.layers import Linear, RMSNorm, ShortConvolution, linear_flops, softplus
from workbench.mixers.families.recurrent import (
    CONV_WIDTH,
    AdditiveConfig,
    RecurrentMixer,
    StateCache,
    fill_time_steps,
    record_state,
)
from workbench.ops.linear_attention import linear_attention, linear_attention_flops
from workbench.ops.short_convolution import Heads


class MambaConfig(AdditiveConfig):
    """Sizes of a Mamba layer."""

    expand: Annotated[float, Field(gt=0)] = 2.0
    """Inner channels HP divided by the width."""
    head_dim: Annotated[int, Field(ge=1)] = 64
    """Channels P of a head."""
    state_dim: Annotated[int, Field(ge=1)] = 128
    """Channels N of keys and queries (B and C)."""
    groups: Annotated[int, Field(ge=1)] = 1
    """Groups G of heads that share B and C."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"head_dim": 32, "state_dim": 32}}

    def heads(self, width: int) -> int:
        """Heads H at a model width."""
        return round(self.expand * width) // self.head_dim

    def resolved(self, width: int) -> Self:
        inner, H = self.expand * width, self.heads(width)
        do = "Change expand or head_dim."
        whole = H >= 1 and inner == H * self.head_dim
        require(whole, "expand", got=self.expand, expected=f"heads of {self.head_dim} channels", do=do)
        require(H % self.groups == 0, "groups", got=self.groups, expected=f"a divisor of the {H} heads")
        return super().resolved(width)


class MambaMixer(RecurrentMixer):
    """The Mamba-2 layer. A relative may change the operation on the state (:meth:`operate`)."""

    roles = {"A_log": Role.VECTOR, "dt_bias": Role.VECTOR, "skip": Role.VECTOR}

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config, self.H = config, config.heads(width)
        self.inner = self.H * config.head_dim
        shared = config.groups, config.state_dim
        parts = ((self.H, config.head_dim),) * 2 + (shared, shared, (self.H, 1))
        self.project = Linear(width, sum(heads * channels for heads, channels in parts), parts=parts)
        self.conv = ShortConvolution(self.inner + 2 * config.groups * config.state_dim, CONV_WIDTH)
        self.cached_shapes = (self.H, config.state_dim, config.head_dim), (CONV_WIDTH - 1, len(self.conv.weight))
        self.A_log, self.dt_bias, self.skip = (nn.Parameter(torch.empty(self.H)) for _ in range(3))
        self.norm = RMSNorm(self.inner)
        self.out = Linear(self.inner, width, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "A_log":
            parameter.uniform_(1.0, 16.0, generator=generator).log_()
        elif name == "skip":
            parameter.fill_(1.0)
        else:
            fill_time_steps(parameter, generator)

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": "B and C pass a SiLU", "vo": "an RMS norm before `out` undoes any scale of the values"}

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, StateCache)
        config, H, G = self.config, self.H, self.config.groups
        z, raw_BTC, step_BTH = self.project(x_BTD).split([self.inner, len(self.conv.weight), H], dim=-1)
        tail_BWC = None if cache is None or cache.is_empty else cache.tail_BWC
        parts = (Heads(H, config.head_dim), Heads(G, config.state_dim), Heads(G, config.state_dim))
        x_BTHP, k_BTGN, q_BTGN = self.conv(raw_BTC, parts, segments=segments, tail_BWC=tail_BWC)
        k_BTHN, q_BTHN = (x.repeat_interleave(H // G, dim=2) for x in (k_BTGN, q_BTGN))
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        step_BTH = softplus(step_BTH.to(wide) + self.dt_bias.to(wide))
        g_BTH = -self.A_log.to(wide).exp() * step_BTH
        v_BTHP = x_BTHP.to(wide) * step_BTH[..., None]
        y_BTHP, state = self.operate(x_BTD, q_BTHN, k_BTHN, v_BTHP, g_BTH, segments, cache)
        if cache is not None:
            assert state is not None
            cache.update(x_BTD.shape[1], state, self.conv.next_tail(raw_BTC, cache.tail_BWC))
        record_state(aux, state, g_BTH, segments)
        y_BTHP = (y_BTHP + self.skip.to(wide)[:, None] * x_BTHP).to(x_BTD.dtype)
        gated_BTGC = (y_BTHP.flatten(-2) * F.silu(z)).unflatten(-1, (G, -1))
        normed_BTC = F.rms_norm(gated_BTGC, gated_BTGC.shape[-1:], eps=self.norm.eps).flatten(-2)
        return self.out(normed_BTC * self.norm.weight.to(normed_BTC.dtype))

    def operate(
        self,
        x_BTD: Tensor,
        q_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHP: Tensor,
        g_BTH: Tensor,
        segments: Tensor | None,
        cache: StateCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H, P), and the state after the last token (B, H, N, P), which may be None without a cache.

        Args:
            x_BTD: the layer's input, for relatives with further gates.
            q_BTHN, k_BTHN, v_BTHP, g_BTH: as of :func:`workbench.ops.linear_attention.linear_attention`.
            segments: (B, T) document numbers.
            cache: with the state before the first token.
        """
        return linear_attention(q_BTHN, k_BTHN, v_BTHP, g_BTH, **self.operation_options(segments, cache))

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, P, N = config.heads(width), config.head_dim, config.state_dim
        C = H * P + 2 * config.groups * N
        matrices = (width, H * P + C + H), (H * P, width)
        parameters = sum(a * b for a, b in matrices) + CONV_WIDTH * C + 3 * H + H * P
        flops = linear_flops(*matrices) + linear_attention_flops(H, N, P, length, config.chunk)
        cache_bytes = 4 * H * N * P + element_bytes * (CONV_WIDTH - 1) * C
        return Cost(parameters, parameters, flops, cache_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"state_dim": Range(values=(16, 32, 64, 128))}
