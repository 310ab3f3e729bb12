"""Global layer of alternating sparse attention, ASA (arXiv 2511.00819): compression and selection of grouped latents.

From the abstract: global layers are compression and selection, with grouped latent attention; the cache is half of
NSA's. Second-hand: blocks of 16 tokens; four consecutive queries attend the blocks selected by the first of them. The
rest is ours:

    keys [c^g ; kr] and values c^g of the tokens, g = 1 … h_c (see :mod:`workbench.mixers.families.latent`), queries
    absorbed; keys and scores are separate for each group of heads
    pooled: [φ_c(c^g) ; φ_r(kr)] and φ_c(c^g), l = d = l'
    o = g_cmp · Attn(pooled) + g_slc · Attn(selected), sigmoid gates for every head; selection as in
    :mod:`workbench.mixers.nsa`

Legend: B batch, T queries, S keys, N pooled blocks, H query heads, g latents, C latent channels, R rotary channels, n
blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
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
from workbench.layers import Linear, Pooling, RowCache, linear_flops
from workbench.mixers.families.latent import LatentConfig, LatentProjections
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
    group_query_pairs,
    num_blocks,
    selected_pairs,
    unfold_blocks,
    visible_block_attention,
    visible_pairs,
)
from workbench.pooled import is_token, mean_of


@mixers.register
class ASAGlobal(Mixer):
    """Global layer of ASA: compression and selection over grouped latents."""

    capabilities = Capabilities(flops_check="forward")
    conformance_cases = (
        {"select_blocks": 4},
        {
            "block": 4,
            "select_blocks": 5,
            "reuse": 2,
            "compress": "linear",
            "latents": 4,
            "latent_dim": 12,
            "rotary_dim": 0,
        },
    )

    class Config(LatentConfig):
        """Global layer of ASA."""

        kind: Literal["asa_global"] = "asa_global"
        latents: int = 4
        """Latents h_c per token, each with keys and a selection for its group of heads."""
        block: int = 16
        """Tokens of a block, pooled and selected alike (l = d = l')."""
        select_blocks: int = 64
        """Selected blocks n, the forced ones included. n · block is 1,024 as in NSA: our choice."""
        initial_blocks: int = 1
        """First blocks that are always selected."""
        local_blocks: int = 2
        """Last blocks, up to the query's own, that are always selected."""
        reuse: int = 4
        """Consecutive positions that attend the blocks selected by the first of them; divides the block."""
        compress: Literal["mean", "linear", "mlp"] = "mlp"
        """How a block of latents, and of rotated keys, becomes one."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**fields, **({"latents": 2, "block": 8, "select_blocks": 12} if scale == "tiny" else {})}
            for scale, fields in LatentConfig.scales.items()
        }

        @property
        def blocks(self) -> Blocks:
            return Blocks(
                self.block,
                self.block,
                self.block,
                self.select_blocks,
                self.initial_blocks,
                self.local_blocks,
                self.reuse,
            )

        def resolved(self, width: int) -> Self:
            check_blocks(
                self.blocks,
                {
                    "length": "block",
                    "stride": "block",
                    "block": "block",
                    "selected": "select_blocks",
                    "local": "local_blocks",
                    "reuse": "reuse",
                },
            )
            return super().resolved(width)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.blocks: Blocks = config.blocks
        self.project = LatentProjections(config, width)
        self.pool_c = Pooling(config.compress, config.block, config.latent_dim)
        self.pool_r = Pooling(config.compress, config.block, config.rotary_dim) if config.rotary_dim else None
        self.gate = Linear(width, 2 * config.heads, bias=True)
        self.out = Linear(config.heads * config.head_dim, width, writes_residual=True)

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
            selection: blocks to attend instead of the ones this layer would select.
        """
        outputs, selection = self._attend(x_BTD, segments, cache, selection, aux, budget)
        B, T, _ = x_BTD.shape
        gates_BT2H = self.gate(x_BTD).view(B, T, 2, -1).sigmoid()
        if aux is not None and aux.collect_metrics:
            for index, branch in enumerate(("compression", "selection")):
                aux.metrics[f"gate_{branch}"] = mean_of(gates_BT2H[:, :, index], is_token(segments, 1))
            selection.record_metrics(aux, self.blocks.block, segments)
        mixed_BTHC = torch.stack(outputs, dim=2).mul(gates_BT2H[..., None].to(outputs[0].dtype)).sum(2)
        return self.out(self.project.from_latents(mixed_BTHC).reshape(B, T, -1).to(x_BTD.dtype))

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        return self.project.scores(x_BTD, **Positions.of(x_BTD, segments, None).rotary)

    @torch.no_grad()
    def selection(self, x_BTD: Tensor, segments: Tensor | None = None) -> Selection:
        """The blocks that each query selects, per latent."""
        return self._attend(x_BTD, segments, None, None)[1]

    def _attend(
        self,
        x_BTD: Tensor,
        segments: Tensor | None,
        cache: Cache | None,
        selection: Selection | None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
    ) -> tuple[list[Tensor], Selection]:
        """Weighted latents (B, T, H, C) of both branches, and the selected blocks."""
        assert cache is None or isinstance(cache, SparseCache)
        if cache is not None and cache.positions_B is not None:
            return self._step(x_BTD, cache, selection)
        project, blocks = self.project, self.blocks
        positions, pooled_cache = Positions.of(x_BTD, segments, cache), None if cache is None else cache.pooled
        q_n, q_r, c, kr = project(x_BTD, **positions.rotary)
        q = project.absorbed(q_n, q_r)
        cc, cr = pooled_blocks([c, kr], self._pooled, positions, blocks, pooled_cache)
        if cache is not None:
            c, kr = cache.rows["latents"].extend(c, kr)
            cache.length = positions.end
        latent: dict[str, Any] = {"scale": project.scale, "value_dim": project.C}
        ck = project.latent_keys(cc, cr)
        compressed, lse = visible_block_attention(
            q, ck, length=blocks.length, stride=blocks.stride, **latent, **positions.settings
        )
        if selection is None:
            selection = Selection.by_scores(q, ck, lse, positions, blocks, pooled_cache, aux, budget, project.scale)
        selected = selection.attend(q, project.latent_keys(c, kr), None, positions, blocks.block, **latent)
        return [compressed, selected], selection

    def _step(self, x_BTD: Tensor, cache: SparseCache, selection: Selection | None) -> tuple[list[Tensor], Selection]:
        """As :meth:`_attend`, of one token per sequence."""
        assert cache.pooled is not None and cache.positions_B is not None
        project, scale = self.project, self.project.scale
        q_n, q_r, c, kr = project(x_BTD, **cache.rotary())
        q_BHK = project.absorbed(q_n, q_r)[:, 0].to(c.dtype)
        (cc, cr), visible_B = cache.pooled.append([c, kr], self._pooled)
        cache.rows["latents"].append(c, kr)
        c_BSgC, kr_BS1R = cache.rows["latents"].rows
        shared_cr, shared_kr = (cr, kr_BS1R) if project.R else (None, None)
        compressed, lse_BH = decode_attention(q_BHK, cc, None, visible_B, scale=scale, shared_BS1R=shared_cr)
        if selection is None:
            selection = Selection.for_step(q_BHK, cc, lse_BH, self.blocks, cache, project.g, scale, shared_cr)
        selected = selection.attend_step(
            q_BHK, c_BSgC, None, cache.positions_B, self.blocks.block, scale, shared_BS1R=shared_kr
        )
        return [compressed[:, None], selected[:, None]], selection

    def _pooled(self, raw: list[Tensor], starts: Tensor, bound: int | None, rows_BN: Tensor | None) -> list[Tensor]:
        """Pooled latents (B, N, g, C) and rotated keys (B, N, 1, R)."""
        c, kr = (unfold_blocks(x, rows_BN, self.blocks.length, self.blocks.stride) for x in raw)
        return [self.pool_c(c), kr.mean(-1) if self.pool_r is None else self.pool_r(kr)]

    def score_obstacle(self) -> str:
        return SCORE_OBSTACLE

    def rescaling_pairs(self) -> list[RescalingPair]:
        pairs = self.project.rescaling_pairs()
        if self.pool_r is not None and self.pool_r.kind != "mean":
            # a learned map of rotated keys adds positions and mixes channels: it does not scale with the keys
            pairs = [pair for pair in pairs if pair.name != "qk_rotary"]
        return pairs

    def rescaling_obstacles(self) -> dict[str, str]:
        if self.pool_r is not None and self.pool_r.kind != "mean":
            learned = "the learned map of a block (compress) adds positions and mixes channels of rotated keys"
            return {"qk_rotary": learned}
        return {}

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> SparseCache:
        shapes: list[tuple[int, ...]] = [(self.project.g, self.project.C), (1, self.project.R)]
        pooled = PooledCache(batch, length, self.blocks, shapes, self.project.g, device, dtype)
        rows = {"latents": RowCache(batch, length, shapes, device, dtype)}
        return SparseCache(pooled, rows, self.blocks, length)

    @classmethod
    def blocks_per_query(cls, config: Any) -> BlocksPerQuery:
        return blocks_per_query("select_blocks", config.blocks)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, g, C, N, R, b, T = (
            config.heads,
            config.latents,
            config.latent_dim,
            config.head_dim,
            config.rotary_dim,
            config.blocks,
            length,
        )
        pooling = [(g, C), *([(1, R)] if R else [])]
        parameters = LatentProjections.parameters_of(config, width) + width * 2 * H + 2 * H + H * N * width
        parameters += sum(Pooling.parameters_of(config.compress, b.length, channels) for _, channels in pooling)
        flops = (
            linear_flops(*LatentProjections.shapes(config, width), (width, 2 * H), (H * N, width)) + 2 * C * 2 * H * N
        )
        pooled = sum(heads * Pooling.flops_of(config.compress, b.length, channels) for heads, channels in pooling)
        scored, attended = visible_pairs(T, T, b.length, b.stride, 0), selected_pairs(T, T, b.block, b.selected)
        flops += pooled * num_blocks(T, b.length, b.stride) / T + 2 * H * (2 * C + R) * (scored + attended) / T
        flops += 2 * H * (C + R) * group_query_pairs(T, b.length, b.stride, b.reuse) / T
        cache_bytes = PooledCache.bytes_of(T, b, g * C + R, g, element_bytes) + (g * C + R) * T * element_bytes
        return Cost(parameters, parameters, flops, cache_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        forced = config.initial_blocks + config.local_blocks
        counts = sorted({max(forced, config.select_blocks // 2), config.select_blocks, config.select_blocks * 2})
        reuse = tuple(r for r in (1, 2, 4, 8) if config.block % r == 0)
        return {
            "select_blocks": Range(values=tuple(counts)),
            "reuse": Range(values=reuse),
            "compress": Range(values=("mean", "linear", "mlp")),
            "latent_scale": Range(values=(False, True)),
        }
