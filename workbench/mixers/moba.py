"""Mixture of block attention, MoBA (arXiv 2502.13189): every head attends its k best blocks by mean key.

    the query's own block, causally, and the k - 1 earlier blocks with the largest q · mean(keys); softmax over their
    tokens

No gates, no parameters beyond those of softmax attention. Every query head selects separately, so for the kernels every
head is a group.

Legend: B batch, T queries, S keys, N blocks, D model width, H query heads, G key–value heads, K head channels.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import (
    AuxOutputs,
    BlocksPerQuery,
    Budget,
    Cache,
    Capabilities,
    Cost,
    Mixer,
    Range,
    RescalingPair,
    Scores,
    mixers,
)
from workbench.layers import Linear, RMSNorm, Rotary, RowCache, ScaledScores, linear_flops
from workbench.mixers.families.softmax import QK_NORM_OBSTACLE, HeadsConfig, qkv_parts, stacked_pairs
from workbench.mixers.families.sparse import (
    SCORE_OBSTACLE,
    PooledCache,
    Positions,
    Selection,
    SparseCache,
    blocks_per_query,
    check_blocks,
    pooled_blocks,
)
from workbench.ops.decode_attention import decode_attention
from workbench.ops.sparse_attention import (
    Blocks,
    selected_pairs,
    unfold_blocks,
    visible_block_attention,
    visible_pairs,
)


@mixers.register
class MoBA(ScaledScores, Mixer):
    """Mixture of block attention: softmax over the k best blocks of every head, ranked by mean keys."""

    capabilities = Capabilities(flops_check="forward")
    widens = ("heads", "kv_heads")
    conformance_cases = ({"block": 8, "top_k": 3, "kv_heads": 2},)

    class Config(HeadsConfig):
        """Mixture of block attention."""

        kind: Literal["moba"] = "moba"
        block: Annotated[int, Field(ge=1)] = 256
        """Tokens per block."""
        top_k: Annotated[int, Field(ge=1)] = 8
        """Blocks per head, the query's own included."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            "tiny": {"head_dim": 16, "block": 16, "top_k": 6},
            "340m": {"head_dim": 64, "kv_heads": 4},
            "1.3b": {"head_dim": 128, "kv_heads": 4},
        }

        @property
        def blocks(self) -> Blocks:
            return Blocks(self.block, self.block, self.block, self.top_k, initial=0, local=1)

        def resolved(self, width: int) -> Self:
            names = dict.fromkeys(("length", "stride", "block", "local", "reuse"), "block")
            check_blocks(self.blocks, {**names, "selected": "top_k"})
            return super().resolved(width)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.G, self.K, self.blocks = config.heads, config.kv_heads, config.head_dim, config.blocks
        self.score_channels = self.K
        self.qkv = Linear(width, (self.H + 2 * self.G) * self.K, parts=qkv_parts(self.H, self.G, self.K))
        self.out = Linear(self.H * self.K, width, writes_residual=True)
        self.q_norm = RMSNorm(self.K) if config.qk_norm else torch.nn.Identity()
        self.k_norm = RMSNorm(self.K) if config.qk_norm else torch.nn.Identity()
        self.rotary = None
        if config.rotary:
            self.rotary = Rotary(config.rotary_dim, config.rotary_theta, config.rotary_scaling)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
        selection: Selection | None = None,
    ) -> Tensor:
        """As :meth:`Mixer.forward`.

        Args:
            selection: blocks to attend, per query head, instead of the ones this layer would select.
        """
        B, T, _ = x_BTD.shape
        assert cache is None or isinstance(cache, SparseCache)
        if cache is not None and cache.positions_B is not None:
            return self.out(self._step(x_BTD, cache, selection).reshape(B, T, self.H * self.K).to(x_BTD.dtype))
        positions, blocks = Positions.of(x_BTD, segments, cache), self.blocks
        q, k, v = self._project(x_BTD, offset=positions.offset)
        pooled_cache = None if cache is None else cache.pooled
        (ck,) = pooled_blocks([k], self._pooled, positions, blocks, pooled_cache)
        if cache is not None:
            k, v = cache.rows["shared"].extend(k, v)
            cache.length = positions.end
        k, v, ck = (x.repeat_interleave(self.H // self.G, dim=2) for x in (k, v, ck))
        if selection is None:
            with torch.no_grad():  # a softmax over the blocks of a head ranks them as their scores do
                _, lse = visible_block_attention(
                    q, ck, ck, length=blocks.length, stride=blocks.stride, **positions.settings
                )
            selection = Selection.by_scores(q, ck, lse, positions, blocks, pooled_cache, aux, budget)
        o = selection.attend(q, k, v, positions, blocks.block)
        return self.out(o.reshape(B, T, self.H * self.K).to(x_BTD.dtype))

    def _step(self, x_BTD: Tensor, cache: SparseCache, selection: Selection | None) -> Tensor:
        """(B, H, K) of one token per sequence."""
        assert cache.pooled is not None and cache.positions_B is not None
        q, k, v = self._project(x_BTD, **cache.rotary())
        q_BHK, scale = q[:, 0].to(v.dtype), self.K**-0.5
        (ck,), visible_B = cache.pooled.append([k], self._pooled)
        cache.rows["shared"].append(k, v)
        if selection is None:
            _, lse_BH = decode_attention(q_BHK, ck, None, visible_B, scale=scale)
            selection = Selection.for_step(q_BHK, ck, lse_BH, self.blocks, cache, self.H, scale)
        k_BSGK, v_BSGK = cache.rows["shared"].rows
        return selection.attend_step(q_BHK, k_BSGK, v_BSGK, cache.positions_B, self.blocks.block, scale)

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        q, k, _ = self._project(x_BTD)
        return [Scores(q, k)]

    def _project(self, x_BTD: Tensor, **positions: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, K) and keys (B, T, G, K), and values (B, T, G, K)."""
        heads = self.qkv(x_BTD).view(*x_BTD.shape[:2], self.H + 2 * self.G, self.K)
        q, k, v = heads.split((self.H, self.G, self.G), dim=2)
        q, k = self.scaled(self.q_norm(q)), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary.pair(q, k, **positions)
        return q, k, v

    def _pooled(self, raw: list[Tensor], starts: Tensor, bound: int | None, rows_BN: Tensor | None) -> list[Tensor]:
        """Mean keys (B, N, G, K)."""
        return [unfold_blocks(x, rows_BN, self.blocks.length, self.blocks.stride).mean(-1) for x in raw]

    def score_obstacle(self) -> str:
        return SCORE_OBSTACLE

    def rescaling_pairs(self) -> list[RescalingPair]:
        # blocks are ranked by the mean of their keys, which scales as the keys do
        return stacked_pairs(self.H, self.G, self.K, rotary=self.rotary, qk_norm=isinstance(self.q_norm, RMSNorm))

    def rescaling_obstacles(self) -> dict[str, str]:
        return {"qk": QK_NORM_OBSTACLE} if isinstance(self.q_norm, RMSNorm) else {}

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> SparseCache:
        pooled = PooledCache(batch, length, self.blocks, [(self.G, self.K)], self.G, device, dtype)
        rows = {"shared": RowCache(batch, length, [(self.G, self.K)] * 2, device, dtype)}
        return SparseCache(pooled, rows, self.blocks, length)

    @classmethod
    def blocks_per_query(cls, config: Any) -> BlocksPerQuery:
        return blocks_per_query("top_k", config.blocks)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, G, K, b, T = config.heads, config.kv_heads, config.head_dim, config.blocks, length
        shapes = ((width, (H + 2 * G) * K), (H * K, width))
        parameters = sum(m * n for m, n in shapes) + (2 * K if config.qk_norm else 0)
        # blocks are scored twice, for the normaliser (which also weights values that are discarded) and for the ranking
        scored, attended = visible_pairs(T, T, b.length, b.stride, 0), selected_pairs(T, T, b.block, b.selected)
        flops = linear_flops(*shapes) + H * K * (6 * scored + 4 * attended) / T
        cache_bytes = PooledCache.bytes_of(T, b, G * K, G, element_bytes) + 2 * G * K * T * element_bytes
        return Cost(parameters, parameters, flops, cache_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"top_k": Range(values=tuple(sorted({max(1, config.top_k // 2), config.top_k, config.top_k * 2})))}
