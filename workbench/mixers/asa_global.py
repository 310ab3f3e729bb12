"""Global layer of alternating sparse attention, ASA (arXiv 2511.00819): pooled and selected blocks over grouped latents.

Known from the abstract: global layers are compression and selection, with grouped latent attention; the cache is half of NSA's.
Known second-hand only: blocks of 16 tokens, and that four consecutive queries go by the blocks of the first of them.
Everything else is ours:

    keys [c^g ; kr] and values c^g of the tokens, g = 1 … h_c (see :mod:`workbench.mixers.families.latent`), queries absorbed, so that a
    group of heads has keys, and scores, of its own
    pooled: [φ_c(c^g) ; φ_r(kr)] and φ_c(c^g), l = d = l'
    o = g_cmp · Attn(pooled) + g_slc · Attn(selected), sigmoid gates for every head; selection as in :mod:`workbench.mixers.nsa`

Legend: B batch, T queries, S keys, N pooled blocks, H query heads, g latents, C latent channels, R rotary channels, n blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Mixer, Range, RescalingPair, mixers
from workbench.layers import Linear, Pooling, RowCache, linear_flops
from workbench.mixers.families.latent import LatentConfig, LatentProjections
from workbench.mixers.families.sparse import PooledCache, SparseCache, check_blocks
from workbench.ops.sparse_attention import (
    Blocks,
    block_starts,
    document_starts,
    group_query_pairs,
    num_blocks,
    select_blocks,
    selected_attention,
    selected_pairs,
    unfold_blocks,
    visible_block_attention,
    visible_pairs,
)


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
        """Latents h_c of a token, each with keys and a selection for its group of heads."""
        block: int = 16
        """Tokens of a block, pooled and selected alike (l = d = l')."""
        select_blocks: int = 64
        """Selected blocks n, the forced ones included. n · block is 1,024 as in NSA: our choice."""
        initial_blocks: int = 1
        """First blocks that are always selected."""
        local_blocks: int = 2
        """Last blocks, up to the query's own, that are always selected."""
        reuse: int = 4
        """Consecutive positions that go by the selection of the first of them; divides the block."""
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
        block_indices: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Mixer.forward`.

        Args:
            block_indices: (B, T, g, n) blocks to attend instead of the ones this layer would select; -1 for none.
        """
        outputs, indices = self._attend(x_BTD, segments, cache, block_indices)
        B, T, _ = x_BTD.shape
        gates_BT2H = self.gate(x_BTD).view(B, T, 2, -1).sigmoid()
        if aux is not None and aux.collect_metrics:
            for index, branch in enumerate(("compression", "selection")):
                aux.metrics[f"gate_{branch}"] = gates_BT2H[:, :, index].detach().float().mean()
            there = indices >= 0
            distance = ((indices.amax(-1, keepdim=True) - indices) * there).sum() / there.sum().clamp_min(1)
            aux.metrics["selected_distance"] = distance.float() * self.blocks.block
        mixed_BTHC = torch.stack(outputs, dim=2).mul(gates_BT2H[..., None].to(outputs[0].dtype)).sum(2)
        return self.out(self.project.from_latents(mixed_BTHC).reshape(B, T, -1))

    @torch.no_grad()
    def selection(self, x_BTD: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T, g, n) blocks that each query selects, counted from the start of its document; -1 for none."""
        return self._attend(x_BTD, segments, None, None)[1]

    def _attend(
        self, x_BTD: Tensor, segments: Tensor | None, cache: Cache | None, given: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Weighted latents (B, T, H, C) of both branches, and the selected blocks."""
        B, T, _ = x_BTD.shape
        assert cache is None or isinstance(cache, SparseCache)
        project, blocks, offset = self.project, self.blocks, 0 if cache is None else cache.length
        start_BT = document_starts(segments, B, T, x_BTD.device)
        at: dict[str, Any] = {"offset": offset}
        if segments is not None:  # φ mixes rotated keys, so that positions begin anew in every document
            at = {"positions_BT": torch.arange(T, device=x_BTD.device) - start_BT, "length": T}
        q_n, q_r, c, kr = project(x_BTD, **at)
        q = project.absorbed(q_n, q_r)
        pooled = None if cache is None else cache.pooled
        if pooled is None:
            block_starts_BN = (
                None if segments is None else block_starts(start_BT, segments, blocks.length, blocks.stride)
            )
            cc, cr = self._pooled([c, kr], 0, block_starts_BN)
        else:
            cc, cr = pooled.extend([c, kr], self._pooled)
        if cache is not None:
            c, kr = cache.rows["latents"].extend(c, kr)
            cache.length += T
        settings: dict[str, Any] = {"start_BT": start_BT, "offset": offset, "scale": project.scale}
        values = {"value_dim": project.C}
        ck = project.latent_keys(cc, cr)
        compressed, lse = visible_block_attention(
            q, ck, length=blocks.length, stride=blocks.stride, **values, **settings
        )
        indices = given
        if indices is None:
            held = None if pooled is None else pooled.chosen_BGn
            indices = select_blocks(q, ck, lse, blocks=blocks, num_keys=offset + T, previous_BGn=held, **settings)
            if pooled is not None and held is not None:
                pooled.chosen_BGn = indices[:, -1]
        selected, _ = selected_attention(
            q,
            project.latent_keys(c, kr),
            None,
            indices,
            block=blocks.block,
            reuse=1 if given is not None else blocks.reuse,
            **values,
            **settings,
        )
        return [compressed, selected], indices

    def _pooled(self, raw: list[Tensor], first: int, rows_BN: Tensor | None = None) -> list[Tensor]:
        """Pooled latents (B, N, g, C) and rotated keys (B, N, 1, R)."""
        c, kr = (unfold_blocks(x, rows_BN, self.blocks.length, self.blocks.stride) for x in raw)
        return [self.pool_c(c), kr.mean(-1) if self.pool_r is None else self.pool_r(kr)]

    def rescaling_pairs(self) -> list[RescalingPair]:
        pairs = self.project.rescaling_pairs()
        if self.pool_r is not None and self.pool_r.kind != "mean":
            # a learned map of a block of rotated keys adds positions and mixes channels: it does not scale with the keys
            pairs = [pair for pair in pairs if pair.name != "qk_rotary"]
        return pairs

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> SparseCache:
        shapes: list[tuple[int, ...]] = [(self.project.g, self.project.C), (1, self.project.R)]
        pooled = PooledCache(batch, length, self.blocks, shapes, self.project.g, device, dtype)
        return SparseCache(pooled, {"latents": RowCache(batch, length, shapes, device, dtype)})

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
        scored, attended = visible_pairs(T, T, b.length, b.stride, 0), selected_pairs(T, T, b.selected * b.block)
        flops += pooled * num_blocks(T, b.length, b.stride) / T + 2 * H * (2 * C + R) * (scored + attended) / T
        flops += 2 * H * (C + R) * group_query_pairs(T, b.length, b.stride, b.reuse) / T
        held = PooledCache.bytes_of(T, b, g * C + R, g, element_bytes) + (g * C + R) * T * element_bytes
        return Cost(parameters, parameters, flops, held)

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
