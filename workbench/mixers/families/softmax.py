"""Softmax attention with plain heads: multi-head, grouped-query (arXiv 2305.13245) or multi-query.

:class:`HeadsConfig` has the fields of every mixer with plain heads, :class:`SoftmaxAttention` the layer behind ``full``
and ``sliding``.

Legend: B batch, T time, D model width, H query heads, G key–value heads, K head channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Shared,
    Taken,
    VariantConfig,
)
from workbench.layers import (
    Linear,
    RMSNorm,
    Rotary,
    RotaryScaling,
    RowCache,
    ScaledScores,
    ShortConvolution,
    linear_flops,
)
from workbench.mixers.families.attention_options import (
    CONV_WIDTH,
    VALUES,
    AttentionOptions,
    KeysAndValues,
    TakerCache,
    excluded,
)
from workbench.ops.attention import attention, score_maxima
from workbench.ops.decode_attention import decode_attention
from workbench.ops.short_convolution import Heads
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


class AttentionConfig(AttentionOptions, HeadsConfig):
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


def stacked_pairs(
    H: int, G: int, K: int, *, rotary: Rotary | None, qk_norm: bool, scales_per_value: int | None = None
) -> list[RescalingPair]:
    """Pairs of attention whose ``qkv.weight`` stacks queries, keys and values, and whose ``out.weight`` reads the
    heads.

    The query heads of a group share the scales of their keys. Soft-caps and sinks see scores, which do not change.

    Args:
        scales_per_value: 1 where the channels of a value must share a scale. Default: one per channel.
    """
    unscaled_qHK, unscaled_kGK = torch.full((H, K), -1), torch.full((G, K), -1)

    def rows(*parts: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in parts])[:, None]

    def per_query_head(scale_GK: Tensor) -> Tensor:
        return scale_GK.repeat_interleave(H // G, dim=0)

    scale_GK, scale_GV = channel_scales(G, K, rotary), channel_scales(G, scales_per_value or K).expand(G, K)
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

    eight_bits: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(
        self, mixer: SoftmaxAttention, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ):
        super().__init__(batch, length, [(mixer.G, mixer.K)] * 2, device, dtype, mixer.window)
        self.mixer = mixer
        size = batch, CONV_WIDTH - 1, mixer.G * mixer.K
        self.tails = {name: torch.zeros(size, device=device, dtype=dtype) for name in mixer.convolutions}
        """The last inputs of every convolution, (B, W - 1, G·K)."""

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.tails.values()]

    def step_bytes(self, lengths: Sequence[int]) -> float:
        # inputs of convolutions are read and written
        return super().step_bytes(lengths) + 2 * sum(tail.nbytes for tail in self.tails.values())

    def seen(self, k_BTGK: Tensor, v_BTGK: Tensor) -> KeysAndValues:
        """Append T keys and values. Returns all that their queries see."""
        if self.positions_B is None:
            k_BSGK, v_BSGK = self.extend(k_BTGK, v_BTGK)
            return KeysAndValues(k_BSGK, v_BSGK)
        lengths_B = self.append(k_BTGK, v_BTGK)
        k_BSGK, v_BSGK = self.rows
        return KeysAndValues(k_BSGK, v_BSGK, lengths_B, self.steps[0], self.steps[1], self.dtype)

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Append T keys and values, and attend from their queries to all that they see: (B, T, H, K)."""
        return self.mixer.read(q_BTHK, self.seen(k_BTGK, v_BTGK))


class SoftmaxAttention(ScaledScores, Mixer):
    """Causal softmax attention; ``window`` is None for full attention.

    Fields that a configuration lacks are off: options (:mod:`workbench.mixers.families.attention_options`), soft-cap,
    sink, window.
    """

    capabilities = Capabilities(flops_check="decode")
    roles = {"sink": Role.VECTOR, "value_shares": Role.VECTOR}
    widens = ("heads", "kv_heads")
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"kv_heads": 1, "softcap": 2.0, "sink": True, "rotary_dim": 8},
        {"qk_norm": True, "rotary": False},
        {"kv_heads": 1, "output_gate": "channel", "exclusive": True, "convolution": "keys_values"},
        {"output_gate": "head", "value_residual": True, "convolution": "keys"},
    )

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.G, self.K = config.heads, config.kv_heads, config.head_dim
        self.score_channels = self.K
        self.window: int | None = getattr(config, "window", None)
        self.takes_keys: bool = getattr(config, "shared_kv", False)
        if self.takes_keys:
            self.q = Linear(width, self.H * self.K, parts=((self.H, self.K),))
        else:
            self.qkv = Linear(width, (self.H + 2 * self.G) * self.K, parts=qkv_parts(self.H, self.G, self.K))
        self.out = Linear(self.H * self.K, width, writes_residual=True)
        self.q_norm = RMSNorm(self.K) if config.qk_norm else torch.nn.Identity()
        self.k_norm = RMSNorm(self.K) if config.qk_norm and not self.takes_keys else torch.nn.Identity()
        self.rotary = None
        if config.rotary:
            self.rotary = Rotary(config.rotary_dim, config.rotary_theta, config.rotary_scaling)
        self.softcap: float | None = getattr(config, "softcap", None)
        self.sink = torch.nn.Parameter(torch.empty(self.H)) if getattr(config, "sink", False) else None
        self.exclusive: bool = getattr(config, "exclusive", False)
        self.gate = None
        if (channels := gate_channels(config)) > 0:
            self.gate = Linear(width, self.H * channels, parts=((self.H, channels),))
        self.value_shares = None
        if getattr(config, "value_residual", False):
            self.value_shares = torch.nn.Parameter(torch.empty(2))  # of the first layer's values, of this layer's
        self.convolutions = torch.nn.ModuleDict(
            {
                name: ShortConvolution(self.G * self.K, CONV_WIDTH, residual=True)
                for name in getattr(config, "convolved", ())
            }
        )
        self.keys_name = keys_name(config)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(0.5 if name == "value_shares" else 0.0)  # the sink starts as a key of score 0

    @classmethod
    def gives(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        names = [] if getattr(config, "shared_kv", False) else [keys_name(config)]
        names += [VALUES] if getattr(config, "value_residual", False) else []
        return {name: _settings_of(name, config) for name in names}

    @classmethod
    def takes(cls, config: Any) -> Mapping[str, Taken]:
        wanted: dict[str, Taken] = {}
        if getattr(config, "value_residual", False):
            wanted[VALUES] = Taken("first", False, _settings_of(VALUES, config))
        if getattr(config, "shared_kv", False):
            wanted[keys_name(config)] = Taken("nearest", True, _settings_of(keys_name(config), config))
        return wanted

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        o_BTHK = (self._taken if self.takes_keys else self._attended)(x_BTD, segments, cache, aux, shared)
        if self.gate is not None:
            o_BTHK = o_BTHK * torch.sigmoid(self.gate(x_BTD)).unflatten(-1, (self.H, -1)).to(o_BTHK.dtype)
        return self.out(o_BTHK.reshape(B, T, self.H * self.K))

    def _attended(
        self,
        x_BTD: Tensor,
        segments: Tensor | None,
        cache: Cache | None,
        aux: AuxOutputs | None,
        shared: Shared | None,
    ) -> Tensor:
        """Attention to the layer's keys and values, which it may give to later layers."""
        assert cache is None or isinstance(cache, KeyValueCache)
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, segments=segments, cache=cache, shared=shared)
        if cache is None and aux is not None and aux.score_maxima is not None and self.score_obstacle() is None:
            queries = q_BTHK.to(v_BTGK.dtype)
            aux.score_maxima.append(score_maxima(queries, k_BTGK, window=self.window, segments=segments))
        if self.keys_name in self.given_to_later:
            assert shared is not None
            kv = KeysAndValues(k_BTGK, v_BTGK) if cache is None else cache.seen(k_BTGK, v_BTGK)
            shared.given[self.keys_name] = kv
            o_BTHK = self.attend(q_BTHK, *kv[:2], segments=segments) if cache is None else self.read(q_BTHK, kv)
        elif cache is None:
            o_BTHK = self.attend(q_BTHK, k_BTGK, v_BTGK, segments=segments)
        else:
            o_BTHK = cache.attend(q_BTHK, k_BTGK, v_BTGK)
        return excluded(o_BTHK, v_BTGK) if self.exclusive else o_BTHK

    def _taken(
        self,
        x_BTD: Tensor,
        segments: Tensor | None,
        cache: Cache | None,
        aux: AuxOutputs | None,
        shared: Shared | None,
    ) -> Tensor:
        """Attention to the keys and values of an earlier layer."""
        assert shared is not None, "a layer with shared_kv runs in a model that has the layer that gives them"
        kv: KeysAndValues = shared.taken[self.keys_name]
        q_BTHK = self.scaled(self.q_norm(self.q(x_BTD).unflatten(-1, (self.H, self.K))))
        if self.rotary is not None:
            q_BTHK = self.rotary(q_BTHK, **({} if cache is None else cache.rotary()))
        if cache is None:
            return self.attend(q_BTHK, *kv[:2], segments=segments)
        if cache.positions_B is None:
            cache.length += x_BTD.shape[1]
        return self.read(q_BTHK, kv)

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        if self.takes_keys:
            return []  # its keys are not computed from its input
        q_BTHK, k_BTGK, _ = self._project(x_BTD, segments=segments)
        return [Scores(q_BTHK, k_BTGK, window=self.window)]

    def _project(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: RowCache | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, K) and keys (B, T, G, K), and values (B, T, G, K)."""
        heads = self.qkv(x_BTD).view(*x_BTD.shape[:2], self.H + 2 * self.G, self.K)
        q_BTHK, k_BTGK, v_BTGK = heads.split((self.H, self.G, self.G), dim=2)
        if self.convolutions:
            k_BTGK = self._convolved("k", k_BTGK, segments, cache)
            v_BTGK = self._convolved("v", v_BTGK, segments, cache)
        if self.value_shares is not None:
            v_BTGK = self._mixed(v_BTGK, shared)
        q_BTHK, k_BTGK = self.scaled(self.q_norm(q_BTHK)), self.k_norm(k_BTGK)
        if self.rotary is not None:
            q_BTHK, k_BTGK = self.rotary.pair(q_BTHK, k_BTGK, **({} if cache is None else cache.rotary()))
        return q_BTHK, k_BTGK, v_BTGK

    def _convolved(self, name: str, x_BTGK: Tensor, segments: Tensor | None, cache: RowCache | None) -> Tensor:
        """Keys ("k") or values ("v") with their convolution, where they have one."""
        if name not in self.convolutions:
            return x_BTGK
        assert cache is None or isinstance(cache, KeyValueCache)
        convolution, x_BTC = self.convolutions[name], x_BTGK.flatten(2)
        assert isinstance(convolution, ShortConvolution)
        tail_BWC = None if cache is None else cache.tails[name]
        (y_BTGK,) = convolution(x_BTC, [Heads(self.G, self.K)], segments=segments, tail_BWC=tail_BWC)
        if tail_BWC is not None:
            tail_BWC.copy_(convolution.next_tail(x_BTC.to(tail_BWC.dtype), tail_BWC))
        return y_BTGK

    def _mixed(self, v_BTGK: Tensor, shared: Shared | None) -> Tensor:
        """Values in shares with those of the first layer, which mixes with itself."""
        assert self.value_shares is not None
        first_BTGK = v_BTGK
        if shared is not None:
            first_BTGK = shared.taken.get(VALUES, v_BTGK)
            if VALUES in self.given_to_later:
                shared.given[VALUES] = v_BTGK
        of_first, of_own = self.value_shares.to(v_BTGK.dtype)
        return of_first * first_BTGK + of_own * v_BTGK

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

    def read(self, q_BTHK: Tensor, kv: KeysAndValues) -> Tensor:
        """Attention to what a cache has: (B, T, H, K)."""
        if kv.lengths_B is None:
            return self.attend(q_BTHK, kv.k_BSGK, kv.v_BSGK, cached=True).to(q_BTHK.dtype)
        return self.attend_step(q_BTHK[:, 0].to(kv.dtype), kv)[:, None].to(q_BTHK.dtype)

    def attend_step(self, q_BHK: Tensor, kv: KeysAndValues) -> Tensor:
        """Attention of one query per sequence: (B, H, K)."""
        assert kv.lengths_B is not None
        o_BHK, _ = decode_attention(
            q_BHK,
            kv.k_BSGK,
            kv.v_BSGK,
            kv.lengths_B,
            scale=self.K**-0.5,
            k_steps_BSG=kv.k_steps_BSG,
            v_steps_BSG=kv.v_steps_BSG,
            softcap=self.softcap,
            sink_H=self.sink,
        )
        return o_BHK

    def rescaling_pairs(self) -> list[RescalingPair]:
        obstacles = self.rescaling_obstacles()
        qk_norm = isinstance(self.q_norm, RMSNorm)
        if self.takes_keys:
            return []
        pairs = stacked_pairs(
            self.H, self.G, self.K, rotary=self.rotary, qk_norm=qk_norm, scales_per_value=1 if self.exclusive else None
        )
        return [pair for pair in pairs if pair.name not in obstacles]

    def rescaling_obstacles(self) -> dict[str, str]:
        if self.takes_keys:
            return dict.fromkeys(("qk", "vo"), "keys and values are those of an earlier layer")
        obstacles = {"qk": QK_NORM_OBSTACLE} if isinstance(self.q_norm, RMSNorm) else {}
        if self.value_shares is not None:
            obstacles["vo"] = "values are mixed with those of the first layer"
        if self.keys_name in self.given_to_later:
            obstacles |= dict.fromkeys(("qk", "vo"), "later layers read its keys and values")
        return obstacles

    def score_obstacle(self) -> str | None:
        if self.takes_keys:
            return "its keys are those of an earlier layer"
        return QK_NORM_OBSTACLE if isinstance(self.q_norm, RMSNorm) else None

    def score_factors(self, factors_H: Tensor) -> dict[str, Tensor]:
        # keys that several heads or layers read keep their scale
        are_shared = self.G < self.H or self.keys_name in self.given_to_later
        q_H, k_G = (factors_H, factors_H.new_ones(self.G)) if are_shared else (factors_H.sqrt(), factors_H.sqrt())
        rows = torch.cat((q_H, k_G, torch.ones_like(k_G))).repeat_interleave(self.K)
        return {"qkv.weight": rows[:, None]}

    def policy_obstacle(self) -> str | None:
        """Why a decoding policy cannot replace this layer's cache; None where it can."""
        if self.takes_keys or self.keys_name in self.given_to_later:
            return "keys and values of one layer; several layers read these"
        return "keys and values alone; this layer also caches inputs of its convolution" if self.convolutions else None

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> Cache:
        return TakerCache(self.keys_name) if self.takes_keys else KeyValueCache(self, batch, length, device, dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, G, K = config.heads, config.kv_heads, config.head_dim
        window = getattr(config, "window", None) or length
        takes_keys, taps = getattr(config, "shared_kv", False), len(getattr(config, "convolved", ())) * G * K
        projected = (H if takes_keys else H + 2 * G) * K + H * gate_channels(config)
        parameters = width * projected + H * K * width + taps * CONV_WIDTH
        parameters += (K if takes_keys else 2 * K) if config.qk_norm else 0
        parameters += (H if getattr(config, "sink", False) else 0) + (
            2 if getattr(config, "value_residual", False) else 0
        )
        # position t sees min(t, w) keys; scores and weighted values cost 2K each per key and head
        w = min(window, length)
        mean_keys = (w * (w + 1) / 2 + (length - w) * w) / length
        row_bytes, tail_bytes = 0 if takes_keys else 2 * G * K * element_bytes, taps * (CONV_WIDTH - 1) * element_bytes
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops((width, projected), (H * K, width)) + 4 * H * K * mean_keys,
            cache_bytes=row_bytes * w + tail_bytes,
            unevicted_bytes=row_bytes * length + tail_bytes,
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        divisors = tuple(g for g in range(1, config.heads + 1) if config.heads % g == 0)
        # not the output gate and the convolutions: they change the parameters that a budget matches
        names = ["qk_norm", "sink", *(() if config.shared_kv else ("exclusive", "value_residual"))]
        switches = {name: Range(values=(False, True)) for name in names}
        return {"kv_heads": Range(values=divisors), **switches}


def gate_channels(config: Any) -> int:
    """Numbers of the output gate for one head."""
    return {"none": 0, "head": 1, "channel": config.head_dim}[getattr(config, "output_gate", "none")]


def keys_name(config: Any) -> str:
    """Name under which layers of this kind share keys and values."""
    return f"keys and values of {config.kind}"


def _settings_of(name: str, config: Any) -> dict[str, Any]:
    """Settings on which what layers exchange depends."""
    fields = ["kv_heads", "head_dim"]
    if name != VALUES:
        fields += ["window", "rotary", "rotary_theta", "rotary_scaling", "rotary_dim", "qk_norm"]
    return {field: getattr(config, field) for field in fields if hasattr(config, field)}
