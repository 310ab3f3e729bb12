"""Preconditioned delta rule (arXiv 2604.21100): the write key is divided by the root of how much was written along it.

    A_t = exp(a) A_{t-1} + b k²                  diagonal of a decayed sum of squared keys, per head
    M_t = x^(-s / (1 + |s|)),  s = log(A_t + 1e-6) - c        in (1/x, x)
    S_t = (I - β (M k) kᵀ) Diag(exp g) S_{t-1} + β (M k) vᵀ        o_t = S_tᵀ q_t

Gated DeltaNet with one decay per head (PGDN, the default), Kimi Delta Attention with `decay: channel` (PKDA; that code
then has KDA's gate as well, `output_gate: sigmoid, output_gate_rank: null`).

Published: a diagonal approximation of the curvature of the regression that the delta rule solves, as a preconditioner
of the write key alone. Read in public code (flash-linear-attention 0.6): the squash M with x = 1.5 around a learned
centre c per head, which starts at -0.2; a = -exp(A_log) · softplus(W x + dt_bias) and b = σ(W x) as the layer's other
gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import Cost, Range, Role, mixers
from workbench.layers import softplus
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer, GateShape, Operands
from workbench.mixers.families.recurrent import StateCache
from workbench.ops.linear_attention import linear_attention, linear_attention_flops

CENTRE = -0.2
"""Initial centre c of log A."""
SMALLEST = 1e-6
"""Added to A before its logarithm."""


@mixers.register
class PreconditionedDeltaNet(DeltaRuleMixer):
    """Preconditioned delta-rule layer."""

    roles = DeltaRuleMixer.roles | {name: Role.VECTOR for name in ("A_log_atk", "dt_bias_atk", "log_atk_scale")}
    conformance_cases = ({}, {"decay": "channel", "heads": 3, "head_dim": 16, "value_dim": 24, "chunk": 16})

    class Config(DeltaRuleConfig):
        """Preconditioned delta rule."""

        kind: Literal["preconditioned"] = "preconditioned"
        decay: Literal["scalar", "channel"] = "scalar"
        """Decay of the state: one number per head, or one per key channel."""
        erase: Literal["scalar"] = "scalar"
        """Axis of the erase gate: one number per head."""
        write: Literal["scalar"] = "scalar"
        """Axis of the write gate: one number per head."""
        tied: Literal[True] = True
        """Erase and write gate are one gate."""
        erase_gate_on: Literal["key"] = "key"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e."""
        negative_eigenvalues: Literal[False] = False
        """A constant: with β up to 2, a preconditioned edit could diverge."""
        output_gate: Literal["sigmoid", "silu", "none"] = "silu"
        """Activation of the gate on the output."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""
        squash: Annotated[float, Field(gt=1, le=2)] = 1.5
        """Largest factor x by which a channel of the write key grows or shrinks; above 2 an edit could diverge."""

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.cached_shapes = *self.cached_shapes, (self.H, 1, self.K)  # A of every head
        self.A_log_atk, self.dt_bias_atk, self.log_atk_scale = (nn.Parameter(torch.empty(self.H)) for _ in range(3))

    @classmethod
    def gate_shapes(cls, config: Any) -> dict[str, GateShape]:
        return super().gate_shapes(config) | {
            "atk_decay": GateShape(config.heads),
            "atk_write": GateShape(config.heads),
        }

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "log_atk_scale":
            parameter.fill_(CENTRE)
        else:
            super().init_parameter(name.removesuffix("_atk"), parameter, generator)

    def operate(
        self, operands: Operands, raw: Mapping[str, Tensor], segments: Tensor | None, cache: StateCache | None
    ) -> tuple[Tensor, Tensor | None]:
        q_BTHK, k_BTHK, value, g, _, beta_BTH = operands
        wide = torch.promote_types(k_BTHK.dtype, torch.float32)
        k_wide, step_BTH = k_BTHK.to(wide), raw["atk_decay"].to(wide) + self.dt_bias_atk.to(wide)
        one_BTH1 = k_wide.new_ones(*k_wide.shape[:3], 1)
        curvature_BTHK, last_BH1K = linear_attention(
            one_BTH1,
            raw["atk_write"].to(wide).sigmoid()[..., None],
            k_wide.square(),
            -self.A_log_atk.to(wide).exp() * softplus(step_BTH),
            segments=segments,
            state_BHKV=None if cache is None else cache.further[0],
            backend="auto" if cache is None or cache.positions_B is None else "recurrent",
        )
        if cache is not None:
            cache.further[0].copy_(last_BH1K)
        s = (curvature_BTHK + SMALLEST).log() - self.log_atk_scale.to(wide)[:, None]
        factor_BTHK = (-math.log(self.config.squash) * s / (1 + s.abs())).exp()
        write_key = (k_wide * factor_BTHK).to(k_BTHK.dtype)
        return super().operate(Operands(q_BTHK, write_key, value, g, k_BTHK, beta_BTH), raw, segments, cache)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, K = config.heads, config.head_dim
        flops = linear_attention_flops(H, 1, K, length)
        return (
            super()
            .cost(config, width, length, element_bytes)
            .plus(parameters=3 * H, flops=flops, cache_bytes=4 * H * K)
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        space = super().search_space(config, width)
        space = {name: space[name] for name in space if name != "negative_eigenvalues"}
        return {**space, "squash": Range(low=1.1, high=2.0)}
