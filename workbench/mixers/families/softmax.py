"""Softmax attention with plain heads: multi-head, grouped-query (arXiv 2305.13245) or multi-query.

:class:`HeadsConfig` has the fields of every mixer with plain heads, :class:`SoftmaxAttention` the layer behind ``full``
and ``sliding``.

Legend: B batch, T time, D model width, H query heads, G key–value heads, K head channels.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Generator, Tensor

from workbench.config import require
from workbench.contract import (
    AuxOutputs,
    Cache,
    Capabilities,
    Cost,
    Mixer,
    Range,
    RescalingPair,
    Role,
    Scores,
    VariantConfig,
)
from workbench.layers import Linear, RMSNorm, Rotary, RotaryScaling, RowCache, ScaledScores, linear_flops
from workbench.ops.attention import attention, score_maxima
from workbench.ops.decode_attention import decode_attention
from workbench.ops.sparse_attention import document_starts, visible_block_attention


class HeadsConfig(VariantConfig):
    """Fields that every attention with plain heads shares."""

    heads: Annotated[int | None, Field(ge=1)] = None
    """Query heads H. Default: as many as fit the width, width / head_dim."""
    kv_heads: Annotated[int | None, Field(ge=1)] = None
    """Key–value heads G; H must be a multiple. G = H is multi-head (the default), G = 1 multi-query."""
    head_dim: Annotated[int | None, Field(ge=1)] = None
    """Channels K of one head, even. Default: width / heads, or 64 where neither is given. Where both are given, H·K may
    differ from the width, as in Qwen3 (arXiv 2505.09388)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the rotation."""
    rotary: bool = True
    """Rotary positions; without them the layer has no position signal (NoPE)."""
    rotary_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScaling | None = None
    """Scaling of the rotary positions to a longer context: {kind: linear, factor: 4}, llama3 or yarn. Default: none."""
    rotary_dim: int | None = None
    """Rotated channels per head, an even number, the first ones (partial rotary). Default: all."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"head_dim": 32},
        "340m": {"head_dim": 128},
        "1.3b": {"head_dim": 128},
    }

    @classmethod
    def defaults_at(cls, scale: str, given: dict[str, Any]) -> dict[str, Any]:
        """A given number of heads sets the head size, not the scale's default."""
        drop = {"head_dim"} if given.get("heads") else set()
        return {name: value for name, value in super().defaults_at(scale, given).items() if name not in drop}

    def canonical(self) -> dict[str, Any]:
        plain = super().canonical()
        if self.rotary_scaling is None:
            del plain["rotary_scaling"]  # off: the model is the same
        return plain

    def resolved(self, width: int) -> Self:
        heads, head_dim = self.heads, self.head_dim
        if head_dim is None:
            head_dim = width // heads if heads else min(64, width)
            require(
                not heads or width % heads == 0,
                "heads",
                got=heads,
                expected=f"a divisor of width={width}",
                do=f"Nearest: {nearest_divisor(width, heads or 1)}; or give head_dim.",
            )
        if heads is None:
            require(
                width % head_dim == 0,
                "head_dim",
                got=head_dim,
                expected=f"a divisor of width={width}",
                do=f"Nearest: {nearest_divisor(width, head_dim)}; or give heads.",
            )
            heads = width // head_dim
        require(head_dim % 2 == 0, "head_dim", got=head_dim, expected="an even number (rotary pairs)")
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        require(
            rotary_dim % 2 == 0 and 2 <= rotary_dim <= head_dim,
            "rotary_dim",
            got=rotary_dim,
            expected=f"an even number from 2 to head_dim={head_dim}",
            do="For no rotation at all, set rotary: false.",
        )
        kv_heads = self.kv_heads or heads
        require(
            heads % kv_heads == 0,
            "kv_heads",
            got=kv_heads,
            expected=f"a divisor of heads={heads}",
            do=f"Nearest: {nearest_divisor(heads, kv_heads)}.",
        )
        return self.changed(heads=heads, head_dim=head_dim, kv_heads=kv_heads, rotary_dim=rotary_dim)


class AttentionConfig(HeadsConfig):
    """Fields of softmax attention."""

    softcap: Annotated[float | None, Field(gt=0)] = None
    """Scores s become c·tanh(s/c) (arXiv 2408.00118, §2), there with c = 50. Default: no soft-cap."""
    sink: bool = False
    """Whether every head has a learned score that takes part in the softmax with the value zero, so that a head may
    attend to nothing (attention sinks, arXiv 2309.17453; this form: gpt-oss, arXiv 2508.10925)."""


def nearest_divisor(number: int, target: int) -> int:
    """The divisor of ``number`` that is closest to ``target``."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - target))


def qkv_parts(H: int, G: int, K: int) -> tuple[tuple[int, int], ...]:
    """Heads and their channels of queries, keys and values in one matrix."""
    return (H, K), (G, K), (G, K)


def channel_scales(heads: int, channels: int, rotary: Rotary | None = None) -> Tensor:
    """(heads, channels) index of the scale of every channel; the two channels that a rotation mixes share one."""
    half = 0 if rotary is None else rotary.channels // 2
    channel_K = torch.arange(channels)
    channel_K = torch.where(channel_K < 2 * half, channel_K % max(1, half), channel_K - half)
    return torch.arange(heads)[:, None] * (channels - half) + channel_K


def heads_of(scales: Tensor) -> Tensor:
    """(S,) head of every scale of :func:`channel_scales`."""
    return torch.arange(len(scales)).repeat_interleave(int(scales.max() + 1) // len(scales))


QK_NORM_OBSTACLE = "the RMS norms of queries and keys (qk_norm) undo any scale: only the effective rates would change"


def stacked_pairs(H: int, G: int, K: int, *, rotary: Rotary | None, qk_norm: bool) -> list[RescalingPair]:
    """Pairs of attention whose ``qkv.weight`` stacks queries, keys and values, and whose ``out.weight`` reads the
    heads.

    The query heads of a group share the scales of their keys. Soft-caps and sinks see scores, which do not change.
    """
    unscaled_qHK, unscaled_kGK = torch.full((H, K), -1), torch.full((G, K), -1)

    def rows(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in parts])[:, None]

    def per_query_head(scale_GK: Tensor) -> Tensor:
        return scale_GK.repeat_interleave(H // G, dim=0)

    scale_GK, scale_GV = channel_scales(G, K, rotary), channel_scales(G, K)
    q = rows(per_query_head(scale_GK), unscaled_kGK, unscaled_kGK)
    k = rows(unscaled_qHK, scale_GK, unscaled_kGK)
    v = rows(unscaled_qHK, unscaled_kGK, scale_GV)
    qk = RescalingPair("qk", {"qkv.weight": q}, {"qkv.weight": k}, heads_of(scale_GK))
    out = per_query_head(scale_GV).flatten()[None]
    vo = RescalingPair("vo", {"qkv.weight": v}, {"out.weight": out}, heads_of(scale_GV))
    # RMS norms undo any scale of queries and keys
    return [vo] if qk_norm else [qk, vo]


class KeyValueCache(RowCache):
    """Keys and values (B, T, G, K) of the tokens that later queries of ``mixer`` see.

    The cache owns the read: the mixer computes queries and new keys and values, :meth:`attend` appends and attends. A
    subclass with another ``attend`` reads less than everything (see ``workbench.decoding.policies``).

    Args:
        mixer: layer whose window, softcap and sinks apply.
        batch: sequences B.
        length: largest number of tokens.
    """

    eight_bits = (0, 1)

    def __init__(
        self, mixer: SoftmaxAttention, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ):
        super().__init__(batch, length, [(mixer.G, mixer.K)] * 2, device, dtype, mixer.window)
        self.mixer = mixer

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Append T keys and values, and attend from their queries to all that they see: (B, T, H, K)."""
        if self.positions_B is None:
            return self.mixer.attend(q_BTHK, *self.extend(k_BTGK, v_BTGK), cached=True).to(q_BTHK.dtype)
        lengths_B = self.append(k_BTGK, v_BTGK)
        mixer, (k_BSGK, v_BSGK) = self.mixer, self.rows
        o_BHK, _ = decode_attention(
            q_BTHK[:, 0].to(self.dtype),
            k_BSGK,
            v_BSGK,
            lengths_B,
            scale=mixer.K**-0.5,
            k_steps_BSG=self.steps[0],
            v_steps_BSG=self.steps[1],
            softcap=mixer.softcap,
            sink_H=mixer.sink,
        )
        return o_BHK[:, None].to(q_BTHK.dtype)


class SoftmaxAttention(ScaledScores, Mixer):
    """Causal softmax attention; ``window`` is None for full attention."""

    capabilities = Capabilities(flops_check="decode")
    roles = {"sink": Role.VECTOR}
    widens = ("heads", "kv_heads")
    conformance_cases = (
        {},
        {"kv_heads": 1, "softcap": 2.0, "sink": True, "rotary_dim": 8},
        {"qk_norm": True, "rotary": False},
    )

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.G, self.K = config.heads, config.kv_heads, config.head_dim
        self.score_channels = self.K
        self.window: int | None = getattr(config, "window", None)
        self.qkv = Linear(width, (self.H + 2 * self.G) * self.K, parts=qkv_parts(self.H, self.G, self.K))
        self.out = Linear(self.H * self.K, width, writes_residual=True)
        self.q_norm = RMSNorm(self.K) if config.qk_norm else torch.nn.Identity()
        self.k_norm = RMSNorm(self.K) if config.qk_norm else torch.nn.Identity()
        self.rotary = None
        if config.rotary:
            self.rotary = Rotary(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        self.softcap = config.softcap
        self.sink = torch.nn.Parameter(torch.empty(self.H)) if config.sink else None

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.zero_()  # the sink starts as a key of score 0

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, **({} if cache is None else cache.rotary()))
        if cache is None:
            if aux is not None and aux.score_maxima is not None and self.score_obstacle() is None:
                queries = q_BTHK.to(v_BTGK.dtype)
                aux.score_maxima.append(score_maxima(queries, k_BTGK, window=self.window, segments=segments))
            o_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, segments=segments)
        else:
            assert isinstance(cache, KeyValueCache)
            o_BTHK = cache.attend(q_BTHK, k_BTGK, v_BTGK)
        return self.out(o_BTHK.reshape(B, T, self.H * self.K))

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        q_BTHK, k_BTGK, _ = self._project(x_BTD)
        return [Scores(q_BTHK, k_BTGK, window=self.window)]

    def _project(self, x_BTD: Tensor, **positions: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, K) and keys (B, T, G, K), and values (B, T, G, K)."""
        heads = self.qkv(x_BTD).view(*x_BTD.shape[:2], self.H + 2 * self.G, self.K)
        q_BTHK, k_BTGK, v_BTGK = heads.split((self.H, self.G, self.G), dim=2)
        q_BTHK, k_BTGK = self.scaled(self.q_norm(q_BTHK)), self.k_norm(k_BTGK)
        if self.rotary is not None:
            q_BTHK, k_BTGK = self.rotary.pair(q_BTHK, k_BTGK, **positions)
        return q_BTHK, k_BTGK, v_BTGK

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        *,
        segments: Tensor | None = None,
        cached: bool = False,
    ) -> Tensor:
        """Attention of T queries over S ≥ T keys, the last T of which belong to the queries: (B, T, H, K).

        Args:
            segments: (B, T) document numbers, only with S = T.
            cached: whether T and S change from call to call, as those of prompts do. On CUDA, windows then use the
                kernel of visible blocks: FlexAttention would compile for every length.
        """
        blocks = cached and self.window is not None and q_BTHK.is_cuda
        if self.softcap is None and self.sink is None and not blocks:
            return attention(q_BTHK, k_BSGK, v_BSGK, window=self.window, segments=segments)
        B, T = q_BTHK.shape[:2]
        o_BTHK, _ = visible_block_attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            start_BT=document_starts(segments, B, T, q_BTHK.device),
            offset=k_BSGK.shape[1] - T,
            window=self.window,
            softcap=self.softcap,
            sink_H=self.sink,
        )
        return o_BTHK

    def rescaling_pairs(self) -> list[RescalingPair]:
        return stacked_pairs(self.H, self.G, self.K, rotary=self.rotary, qk_norm=isinstance(self.q_norm, RMSNorm))

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": QK_NORM_OBSTACLE} if isinstance(self.q_norm, RMSNorm) else {}

    def score_obstacle(self) -> str | None:
        return QK_NORM_OBSTACLE if isinstance(self.q_norm, RMSNorm) else None

    def score_factors(self, factors_H: Tensor) -> dict[str, Tensor]:
        q_H, k_G = (factors_H, factors_H.new_ones(self.G)) if self.G < self.H else (factors_H.sqrt(), factors_H.sqrt())
        rows = torch.cat((q_H, k_G, torch.ones_like(k_G))).repeat_interleave(self.K)
        return {"qkv.weight": rows[:, None]}

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueCache:
        return KeyValueCache(self, batch, length, device, dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, G, K = config.heads, config.kv_heads, config.head_dim
        window = getattr(config, "window", None) or length
        parameters = (
            width * (H + 2 * G) * K + H * K * width + (2 * K if config.qk_norm else 0) + (H if config.sink else 0)
        )
        # position t sees min(t, w) keys; scores and weighted values cost 2K each per key and head
        w = min(window, length)
        mean_keys = (w * (w + 1) / 2 + (length - w) * w) / length
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops((width, (H + 2 * G) * K), (H * K, width)) + 4 * H * K * mean_keys,
            cache_bytes=2 * G * K * w * element_bytes,
            unevicted_bytes=2 * G * K * length * element_bytes,
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        divisors = tuple(g for g in range(1, config.heads + 1) if config.heads % g == 0)
        switches = {name: Range(values=(False, True)) for name in ("qk_norm", "sink")}
        return {"kv_heads": Range(values=divisors), **switches}
