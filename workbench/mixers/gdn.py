"""Gated DeltaNet (arXiv 2412.06464): a recurrent state per head, decayed and edited by the gated delta rule.

    q, k, v = silu(conv(W x)), q and k L2-normalised per head     S_t = (I - β k kᵀ) exp(g) S_{t-1} + β k vᵀ
    g = -exp(A_log) · softplus(W_a x + dt_bias),  β = σ(W_β x)     y = W_o [ RMSNorm_head(Sᵀ q / sqrt(K)) * silu(W_g x) ]

Legend: B batch, T time, D model width, H heads, K key channels, V value channels, C = H(2K + V) convolved channels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.config import ConfigError
from workbench.contract import Cache, Capabilities, Cost, Mixer, Range, Side, VariantConfig, mixers
from workbench.layers import Linear, RMSNorm, ShortConvolution, linear_flops
from workbench.ops.delta_rule import delta_rule, delta_rule_flops

CONV_WIDTH = 4


class DeltaCache(Cache):
    """``state_BHKV`` (fp32) and ``tail_BWC``, the last W - 1 inputs of the short convolution."""

    def __init__(self, state_BHKV: Tensor, tail_BWC: Tensor):
        self.state_BHKV, self.tail_BWC, self.length = state_BHKV, tail_BWC, 0

    def tensors(self) -> list[Tensor]:
        return [self.state_BHKV, self.tail_BWC]


@mixers.register
class GatedDeltaNet(Mixer):
    """Gated DeltaNet layer; constant state in decode."""

    capabilities = Capabilities(flops_from="forward")
    conformance_cases = ({}, {"negative_eigenvalues": True, "heads": 3, "head_dim": 16, "value_dim": 24, "chunk": 8})

    class Config(VariantConfig):
        """Gated DeltaNet."""

        kind: Literal["gdn"] = "gdn"
        heads: int | None = None
        """Heads H. Default: width / head_dim."""
        head_dim: int | None = None
        """Key channels K of one head. Default: width / heads, or 128 where neither is given."""
        value_dim: int | None = None
        """Value channels V of one head. Default: K."""
        negative_eigenvalues: bool = False
        """Edit strength β in (0, 2) instead of (0, 1): the state may flip sign along a key (arXiv 2411.12537)."""
        chunk: int = 64
        """Tokens in a chunk of the training form; changes speed and rounding, not the function."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            "tiny": {"head_dim": 32, "chunk": 32},
            "340m": {"head_dim": 128},
            "1.3b": {"head_dim": 128},
        }

        def resolved(self, width: int) -> Self:
            for name in ("heads", "head_dim", "value_dim", "chunk"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ConfigError.at(name, got=value, expected="at least 1")
            if self.chunk & (self.chunk - 1):
                raise ConfigError.at("chunk", got=self.chunk, expected="a power of two")
            head_dim = self.head_dim or (width // self.heads if self.heads else min(128, width))
            heads = self.heads or width // head_dim
            if self.heads is None and width % head_dim:
                raise ConfigError.at("head_dim", got=head_dim, expected=f"a divisor of width={width}, or heads given")
            if heads < 1 or head_dim < 1:
                raise ConfigError.at("heads", got=heads, expected=f"at least one head of width {width} or less")
            return self.changed(heads=heads, head_dim=head_dim, value_dim=self.value_dim or head_dim)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.K, self.V, self.chunk = config.heads, config.head_dim, config.value_dim, config.chunk
        self.strongest_edit = 2.0 if config.negative_eigenvalues else 1.0
        self.qkv = Linear(width, self.H * (2 * self.K + self.V))
        self.conv = ShortConvolution(self.H * (2 * self.K + self.V), CONV_WIDTH)
        self.decay = Linear(width, self.H)
        self.edit = Linear(width, self.H)
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.gate = Linear(width, self.H * self.V)
        self.norm = RMSNorm(self.V)
        self.out = Linear(self.H * self.V, width, writes_residual=True)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "A_log":  # from 1e-4, not 0, so that the logarithm is finite
            parameter.uniform_(1e-4, 16.0, generator=generator).log_()
        else:  # dt_bias: softplus(dt_bias) is log-uniform in (0.001, 0.1)
            step = parameter.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp().clamp_min(1e-4)
            parameter.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, x_BTD: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None, side: Side | None = None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        H, K, V = self.H, self.K, self.V
        assert cache is None or isinstance(cache, DeltaCache)
        raw_BTC = self.qkv(x_BTD)
        mixed_BTC = self.conv(raw_BTC, segments=segments, tail_BWC=None if cache is None else cache.tail_BWC)
        q_BTHK, k_BTHK, v_BTHV = (
            part.reshape(B, T, H, part.shape[-1] // H) for part in mixed_BTC.split((H * K, H * K, H * V), dim=-1)
        )  # fmt: skip
        q_BTHK, k_BTHK = _l2(q_BTHK) / math.sqrt(K), _l2(k_BTHK)
        # the gates are fp32 whatever the model's type: small steps of the decay decide what is remembered
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        step_BTH = -F.logsigmoid(
            -(self.decay(x_BTD).to(wide) + self.dt_bias.to(wide))
        )  # softplus, whose own traced gradient has wrong strides
        g_BTH = -self.A_log.to(wide).exp() * step_BTH
        beta_BTH = self.strongest_edit * self.edit(x_BTD).to(wide).sigmoid()
        state = None if cache is None else cache.state_BHKV
        o_BTHV, state = delta_rule(
            q_BTHK, k_BTHK, v_BTHV, g_BTH, strength_BTH=beta_BTH, state_BHKV=state, segments=segments, chunk=self.chunk
        )
        if cache is not None:
            cache.state_BHKV = state
            cache.tail_BWC = self.conv.next_tail(raw_BTC, cache.tail_BWC)
            cache.length += T
        if side is not None and side.watch:
            side.metrics["half_life"] = (math.log(0.5) / g_BTH.detach().clamp_max(-1e-6)).median()
            side.metrics["edit_strength"] = beta_BTH.detach().mean()
            side.metrics["state_norm"] = state.detach().norm(dim=(-2, -1)).mean()
        gated = self.norm(o_BTHV.to(x_BTD.dtype)).reshape(B, T, H * V) * F.silu(self.gate(x_BTD))
        return self.out(gated)

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> DeltaCache:
        wide = torch.promote_types(dtype, torch.float32)
        return DeltaCache(
            torch.zeros(batch, self.H, self.K, self.V, device=device, dtype=wide),
            torch.zeros(batch, CONV_WIDTH - 1, self.H * (2 * self.K + self.V), device=device, dtype=dtype),
        )

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, K, V = config.heads, config.head_dim, config.value_dim
        C = H * (2 * K + V)
        projections = ((width, C), (width, H), (width, H), (width, H * V), (H * V, width))
        parameters = sum(a * b for a, b in projections) + CONV_WIDTH * C + 2 * H + V
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops(*projections) + delta_rule_flops(H, K, V, length, config.chunk),
            cache_bytes=4 * H * K * V + element_bytes * (CONV_WIDTH - 1) * C,
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"negative_eigenvalues": Range(values=(False, True))}


def _l2(x: Tensor) -> Tensor:
    """Unit length over the last axis; a zero vector stays zero with a finite gradient."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
