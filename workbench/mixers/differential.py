"""Differential attention: the difference of two softmaxes over the same values (Diff Transformer, arXiv 2410.05258).

    o = (softmax(q¹k¹ᵀ / √K) - λ softmax(q²k²ᵀ / √K)) V,   y = W_o [ (1 - λ₀) RMSNorm(o) ] per differential head
    λ = exp(a¹·b¹) - exp(a²·b²) + λ₀

Published (§2.1): two query and two key heads of K channels share values of 2K channels, so that a layer has as many
parameters as attention of ``heads`` heads; λ is one number per layer from four learned vectors N(0, 0.1²); one gain of
2K channels for all heads. Ours: λ₀ is the same in every layer (the paper's default follows the depth, 0.8 - 0.6
exp(-0.3 l), and its ablation reports a constant 0.8 to be close; ``at`` sets single layers); of a group of query heads
that share keys, one key head each belongs to the two softmaxes.

Legend: B batch, T time, S seen tokens, H query heads, G key heads, P = G / 2 pairs of them, R = H / G, K head channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import Cost, Range, Role, mixers
from workbench.layers import RMSNorm
from workbench.mixers.families.attention_options import KeysAndValues
from workbench.mixers.families.softmax import HeadsConfig, KeyValueCache, SoftmaxAttention
from workbench.ops.attention import attention
from workbench.ops.decode_attention import decode_attention


class DifferentialCache(KeyValueCache):
    """Keys and values as attention of as many heads has them; a pair of heads is one value."""

    eight_bits = ()  # a value has the steps of two heads


@mixers.register
class Differential(SoftmaxAttention):
    """Differential attention to all earlier tokens of a document."""

    roles = {"vectors": Role.VECTOR}
    conformance_cases = (
        {},
        {"heads": 8, "kv_heads": 4, "head_dim": 8, "rotary_dim": 4},
        {"qk_norm": True, "rotary": False, "lambda_init": 0.5},
    )

    class Config(HeadsConfig):
        """Differential attention. ``heads`` counts the query heads of both softmaxes, as does ``kv_heads`` the keys."""

        kind: Literal["differential"] = "differential"
        lambda_init: Annotated[float, Field(ge=0, lt=1)] = 0.8
        """λ₀: what λ starts at, and one minus the factor of the normalised output."""

        def resolved(self, width: int) -> Self:
            config = super().resolved(width)
            for name in ("heads", "kv_heads"):
                got = getattr(config, name)
                do = "Set heads, kv_heads or head_dim."
                require(got % 2 == 0, name, got=got, expected="an even number, for pairs", do=do)
            return config

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.lambda_init = config.lambda_init
        self.vectors = nn.Parameter(torch.empty(4, self.K))  # a¹, b¹, a², b²
        self.head_norm = RMSNorm(2 * self.K)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, 0.1, generator=generator)

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        *,
        segments: Tensor | None = None,
        cached: bool = False,
    ) -> Tensor:
        v_BSPV = v_BSGK.unflatten(2, (-1, 2)).flatten(3)
        first, second = (
            attention(self._queries(q_BTHK, part), k_BSGK[:, :, part::2], v_BSPV, segments=segments) for part in (0, 1)
        )
        return self._difference(first, second)

    def attend_step(self, q_BHK: Tensor, kv: KeysAndValues) -> Tensor:
        assert kv.lengths_B is not None
        v_BSPV, scale = kv.v_BSGK.unflatten(2, (-1, 2)).flatten(3), self.K**-0.5
        (first, _), (second, _) = (
            decode_attention(self._queries(q_BHK, part), kv.k_BSGK[:, :, part::2], v_BSPV, kv.lengths_B, scale=scale)
            for part in (0, 1)
        )
        return self._difference(first, second)

    def _queries(self, q: Tensor, part: int) -> Tensor:
        """(…, H / 2, K) of (…, H, K): the heads of one softmax."""
        return q.unflatten(-2, (-1, 2, self.H // self.G)).select(-3, part).flatten(-3, -2)

    def _difference(self, first: Tensor, second: Tensor) -> Tensor:
        """(…, H, K) of two (…, H / 2, 2K), normalised."""
        wide = torch.promote_types(first.dtype, torch.float32)
        a1, b1, a2, b2 = self.vectors.to(wide)
        share = (a1 * b1).sum().exp() - (a2 * b2).sum().exp() + self.lambda_init
        o = self.head_norm(first - share.to(first.dtype) * second).to(first.dtype) * (1 - self.lambda_init)
        return o.unflatten(-1, (2, self.K)).flatten(-3, -2)

    def rescaling_obstacles(self) -> dict[str, str]:
        return super().rescaling_obstacles() | {"vo": "the RMS norm of a head's output undoes any scale of the values"}

    def policy_obstacle(self) -> str | None:
        return "one softmax over keys; this layer has two"

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> DifferentialCache:
        return DifferentialCache(self, batch, length, device, dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        plain, K = super().cost(config, width, length, element_bytes), config.head_dim
        parameters = plain.parameters + 6 * K
        # values have twice the channels
        flops = plain.flops + 2 * config.heads * K * (length + 1) / 2
        return Cost(parameters, parameters, flops, plain.cache_bytes, plain.unevicted_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        groups = tuple(g for g in range(2, config.heads + 1, 2) if config.heads % g == 0)
        return {"kv_heads": Range(values=groups), "lambda_init": Range(low=0.2, high=0.8)}
