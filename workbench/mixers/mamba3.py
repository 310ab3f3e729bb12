"""Mamba-3 (arXiv 2603.15569): a state-space layer with the trapezoidal rule, a rotating state and several inputs.

    h_t = α_t h_{t-1} + β_t k_{t-1} v_{t-1}ᵀ + γ_t k_t v_tᵀ        α = exp(-A Δ),  β = (1 - λ) Δ α,  γ = λ Δ
    k_t, q_t = R(θ_t) (RMSNorm(B_t, C_t) + bias),  θ_t = θ_{t-1} + π tanh(W_θ x) Δ_t per pair of channels and head
    y_t = h_tᵀ q_t + d v_t        out = W_o [ y * silu(z) ]

With R inputs and outputs (MIMO) a token has R keys and queries, and v, z and y have R copies with a learned factor per
channel each: h gets Σ_r k_r v_rᵀ, y_r = hᵀ q_r + d v_r, and W_o reads Σ_r o_r * y_r * silu(z_r).

Published: the trapezoidal rule in place of the short convolution, the complex state as rotations that depend on the
data, MIMO, the norms and biases of B and C. Read in public code (state-spaces/mamba, Apache-2.0): A = 1 + a where a >=
0, else 1 / (1 - a), at least 1e-4, with a from a projection; tanh, π and Δ in the angle; half of the channels rotate;
biases per head that start at 1, factors of MIMO at 1/R, 1, 1/R. Not built: that code's norm before W_o, off by default.
Ours: which channels form a pair, which is a permutation; without the trapezoidal rule λ = 1; chunks hold as many rows
for any R.

The rule is one linear attention over the token before: with u_t = h_t - γ_t k_t v_tᵀ,
u_t = α_t [ u_{t-1} + (γ_{t-1} + (1 - λ_t) Δ_t) k_{t-1} v_{t-1}ᵀ ], and the token itself is read beside it.

Legend: B batch, T time, S = T + 1 from the token before, D width, H heads, P channels of a head, N of the state, G
groups, R inputs, A angles.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import AuxOutputs, Cache, Cost, Range, RescalingPair, Role, mixers
from workbench.layers import Linear, RMSNorm, linear_flops, softplus, turned
from workbench.mixers.families.mamba import MambaConfig
from workbench.mixers.families.recurrent import RecurrentMixer, StateCache, fill_time_steps, record_state, starts
from workbench.ops.linear_attention import linear_attention, linear_attention_flops
from workbench.ops.running_sum import running_sum

SLOWEST = 1e-4
"""Smallest A."""


@mixers.register
class Mamba3(RecurrentMixer):
    """Mamba-3 layer."""

    roles = dict.fromkeys(("dt_bias", "skip", "k_bias", "q_bias", "v_share", "z_share", "y_share"), Role.VECTOR)
    conformance_cases = (
        {},
        {"rank": 2, "expand": 1.5, "head_dim": 24, "state_dim": 16, "groups": 2, "rotated": 1.0, "chunk": 32},
        {"trapezoidal": False, "rotated": 0.0},
    )

    class Config(MambaConfig):
        """Mamba-3."""

        kind: Literal["mamba3"] = "mamba3"
        rank: Annotated[int, Field(ge=1)] = 1
        """Inputs and outputs R of a head at every token (MIMO); 1 is SISO."""
        trapezoidal: bool = True
        """Whether a token is written in two shares, at its time and at the next; else at its time (Euler's rule)."""
        rotated: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of the state's channels that rotate, in pairs; 0 is a real state."""
        chunk: Annotated[int, Field(ge=1)] = 64
        """Rows per chunk of the training form, R of every token, a power of two; changes speed and rounding, not the
        function."""

        @property
        def angles(self) -> int:
            """Rotating pairs A."""
            return int(self.rotated * self.state_dim) // 2

        @property
        def tokens_per_chunk(self) -> int:
            """Tokens per chunk, a power of two."""
            return 1 << (max(1, self.chunk // self.rank).bit_length() - 1)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config, self.H = config, config.heads(width)
        H, P, N, R = self.H, config.head_dim, config.state_dim, config.rank
        keys, gates = (R * config.groups, N), (H, 1)
        parts = [(H, P), keys, gates, (1, config.angles), (H, P), keys, gates] + [gates] * config.trapezoidal
        self.sizes = [heads * channels for heads, channels in parts]  # z, C, A, θ; and with the token before x, B, Δ, λ
        self.project = Linear(width, sum(self.sizes), parts=tuple(part for part in parts if part[1]))
        self.cached_shapes = (H, N, P), (1, sum(self.sizes[4:])), (H, config.angles)  # u; x, B, Δ, λ; θ
        self.k_norm, self.q_norm = RMSNorm(N, eps=1e-5), RMSNorm(N, eps=1e-5)
        self.k_bias, self.q_bias = (nn.Parameter(torch.empty(R, H, N)) for _ in range(2))
        self.dt_bias, self.skip = (nn.Parameter(torch.empty(H)) for _ in range(2))
        if R > 1:
            self.v_share, self.z_share, self.y_share = (nn.Parameter(torch.empty(R, H, P)) for _ in range(3))
        self.out = Linear(H * P, width, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "dt_bias":
            fill_time_steps(parameter, generator)
        else:
            parameter.fill_(1 / self.config.rank if name in ("v_share", "y_share") else 1.0)

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": "B and C pass an RMS norm"}

    def rescaling_pairs(self) -> list[RescalingPair]:
        channels_C = torch.arange(self.out.in_features)
        rows_C = torch.full((self.project.out_features,), -1)
        rows_C[sum(self.sizes[:4]) :][: len(channels_C)] = channels_C
        second = {"out.weight": channels_C[None]}
        return [RescalingPair("vo", {"project.weight": rows_C[:, None]}, second, channels_C // self.config.head_dim)]

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, StateCache)
        config, H, R, wide = self.config, self.H, self.config.rank, torch.promote_types(x_BTD.dtype, torch.float32)
        z, q, a_BTH, angle, new_BTC = self.project(x_BTD).split([*self.sizes[:4], sum(self.sizes[4:])], dim=-1)
        tail_B1C = torch.zeros_like(new_BTC[:, :1]) if cache is None else cache.tail_BWC
        all_BSC = torch.cat((tail_B1C, new_BTC), dim=1)
        v, k, step, *share = all_BSC.split(self.sizes[4:], dim=-1)
        step_BSH = softplus(step.to(wide) + self.dt_bias.to(wide))
        share_BSH = share[0].to(wide).sigmoid() if share else torch.ones_like(step_BSH)
        at_once_BSH, later_BTH = share_BSH * step_BSH, ((1 - share_BSH) * step_BSH)[:, 1:]
        a_BTH = a_BTH.to(wide)
        rate_BTH = (a_BTH.clamp_min(0) + (1 - a_BTH.clamp_max(0)).reciprocal()).clamp_min(SLOWEST)
        g_BTH = -rate_BTH * step_BSH[:, 1:]
        turn_BTHA = math.pi * angle.to(wide).tanh()[:, :, None] * step_BSH[:, 1:, :, None]
        angle_B1HA = torch.zeros_like(turn_BTHA[:, :1]) if cache is None else cache.further[0][:, None]
        angle_BSHA = running_sum(torch.cat((angle_B1HA, turn_BTHA), dim=1), modulo=2 * math.pi)

        k_BSRHN = self._turned(k, self.k_norm, self.k_bias, angle_BSHA)
        q_BTRHN = self._turned(q, self.q_norm, self.q_bias, angle_BSHA[:, 1:])
        v_BSRHP, z_BTRHP = (x.to(wide).unflatten(-1, (1, H, -1)) for x in (v, z))
        if R > 1:
            v_BSRHP, z_BTRHP = v_BSRHP * self.v_share.to(wide), z_BTRHP * self.z_share.to(wide)
        scale_BTH = g_BTH.exp() * (at_once_BSH[:, :-1] + later_BTH)
        if segments is not None:
            scale_BTH = torch.where(starts(segments)[..., None], 0.0, scale_BTH)
        y, state_BHNP = linear_attention(
            q_BTRHN.flatten(1, 2),
            (scale_BTH[:, :, None, :, None] * k_BSRHN[:, :-1]).flatten(1, 2),
            v_BSRHP[:, :-1].flatten(1, 2),
            g_BTH,
            **self.operation_options(segments, cache) | {"chunk": config.tokens_per_chunk},
        )
        k_BTRHN, v_BTRHP = k_BSRHN[:, 1:] * at_once_BSH[:, 1:, None, :, None], v_BSRHP[:, 1:]
        y_BTRHP = y.unflatten(1, (-1, R)) + self.skip.to(wide)[:, None] * v_BTRHP
        for r in range(R):  # the token itself
            y_BTRHP = y_BTRHP + (q_BTRHN * k_BTRHN[:, :, r, None]).sum(-1, keepdim=True) * v_BTRHP[:, :, r, None]
        if cache is not None:
            cache.update(x_BTD.shape[1], state_BHNP, new_BTC[:, -1:], angle_BSHA[:, -1])
        record_state(aux, state_BHNP, g_BTH, segments)
        y_BTRHP = y_BTRHP * F.silu(z_BTRHP) * (self.y_share.to(wide) if R > 1 else 1)
        return self.out(y_BTRHP.sum(2).flatten(-2).to(x_BTD.dtype))

    def _turned(self, x_BSC: Tensor, norm: RMSNorm, bias_RHN: Tensor, angle_BSHA: Tensor) -> Tensor:
        """Keys or queries (B, S, R, H, N)."""
        shape, wide = (self.config.rank, self.config.groups, self.config.state_dim), angle_BSHA.dtype
        x_BSRGN = F.rms_norm(x_BSC.to(wide).unflatten(-1, shape), shape[-1:], norm.weight.to(wide), norm.eps)
        x_BSRHN = x_BSRGN.repeat_interleave(self.H // shape[1], dim=3) + bias_RHN.to(wide)
        return turned(x_BSRHN, angle_BSHA[:, :, None].cos(), angle_BSHA[:, :, None].sin())

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, P, N, R, angles = config.heads(width), config.head_dim, config.state_dim, config.rank, config.angles
        kept = H * P + R * config.groups * N + (1 + config.trapezoidal) * H
        matrices = (width, H * P + R * config.groups * N + H + angles + kept), (H * P, width)
        vectors = 2 * N + 2 * R * H * N + 2 * H + (3 * R * H * P if R > 1 else 0)
        parameters = sum(a * b for a, b in matrices) + vectors
        flops = linear_flops(*matrices) + linear_attention_flops(H, N, P, length, config.tokens_per_chunk, rows=R)
        return Cost(parameters, parameters, flops, 4 * H * (N * P + angles) + element_bytes * kept)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"state_dim": Range(values=(16, 32, 64, 128)), "rotated": Range(values=(0.0, 0.5, 1.0))}
