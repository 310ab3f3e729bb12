"""Native sparse attention (arXiv 2502.11089): pooled blocks, selected blocks and a window, mixed by gates.

    o_p = Σ_c g_p^c · Attn(q_p, K^c, V^c),  c in {compression, selection, window},  scale 1/sqrt(K)

From the paper: the three branches, independent sigmoid gates, φ a learned map with a position encoding inside the block,
the mapping of scores (eq. 9), their sum over the heads of a group, first and last blocks always selected, keys and values of
its own for every branch; l 32, d 16, l' 64, n 16 with 1 first and 2 last blocks, w 512.
Left open there and chosen by us: the gate is one linear layer with bias; the form of φ (:class:`workbench.layers.Pooling`); where
rotary positions go (``compress_rope``); a window of exactly w tokens; scores of importance have the attention's scale.
``reuse`` is not in the paper (see :mod:`workbench.mixers.asa_global`).

By our count it reads 1.4 times fewer keys than full attention at 4,096 tokens and 6.5 times fewer at 32,768: below some thousand
tokens no speed-up can be expected.

Legend: B batch, T queries, S keys, N pooled blocks, D model width, H query heads, G key–value heads, K head channels, n selected
blocks, c branches.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Cache, Capabilities, Cost, Mixer, Range, RescalingPair, mixers
from workbench.layers import Linear, Pooling, RMSNorm, Rotary, RowCache, linear_flops
from workbench.mixers.families.softmax import HeadsConfig, channel_scales, heads_of
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

Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = ("compression", "selection", "window")


class Layout(NamedTuple):
    """Which key–value sets a configuration has, and what each branch reads."""

    sets: tuple[str, ...]
    """Names of the sets, in the order of the projection."""
    reads: dict[str, str]
    """Branch -> set; "pooled" -> the set whose blocks are pooled."""
    kept: dict[str, int | None]
    """Set -> tokens its cache keeps (None all); sets that only feed pooled blocks are missing."""


def layout(config: Any) -> Layout:
    """The sets of a resolved configuration."""
    shared = config.kv == "shared"
    sets = ("shared",) if shared else tuple(config.branches)
    reads = {branch: "shared" if shared else branch for branch in config.branches}
    if "compression" in reads or "selection" in reads:
        reads["pooled"] = reads.get("compression", reads.get("selection", ""))
    kept: dict[str, int | None] = {}
    if "window" in reads:
        kept[reads["window"]] = config.window - 1
    if "selection" in reads:
        kept[reads["selection"]] = None
    return Layout(sets, reads, kept)


@mixers.register
class NSA(Mixer):
    """Native sparse attention: compression, selection and window branches, gated."""

    capabilities = Capabilities(flops_check="forward")
    conformance_cases = (
        {"select_blocks": 4, "local_blocks": 1},
        {
            "compress": "linear",
            "kv": "shared",
            "gate": "token",
            "compress_rope": "before",
            "compress_length": 8,
            "compress_stride": 4,
            "select_block": 8,
            "select_blocks": 4,
            "window": 7,
            "kv_heads": 1,
            "qk_norm": True,
        },
        {
            "branches": ["selection", "window"],
            "compress": "mean",
            "compress_length": 4,
            "compress_stride": 4,
            "select_block": 8,
            "select_blocks": 5,
            "reuse": 4,
            "gate": "softmax",
            "kv_heads": 4,
            "window": 1,
        },
    )

    class Config(HeadsConfig):
        """Native sparse attention."""

        kind: Literal["nsa"] = "nsa"
        branches: tuple[Branch, ...] = BRANCHES
        """Branches that write to the output, any of compression, selection and window. Selection scores pooled blocks even
        where they are not attended."""
        compress: Literal["mean", "linear", "mlp"] = "mlp"
        """How a block of keys, or values, becomes one."""
        compress_length: int = 32
        """Tokens l of a pooled block."""
        compress_stride: int = 16
        """Distance d between the starts of pooled blocks; divides l and l'."""
        compress_rope: Literal["before", "after"] = "before"
        """Whether keys are rotated before they are pooled, or the pooled key is, to the position of its first token."""
        select_block: int = 64
        """Tokens l' of a selection block."""
        select_blocks: int = 16
        """Selected blocks n, the forced ones included."""
        initial_blocks: int = 1
        """First blocks that are always selected."""
        local_blocks: int = 2
        """Last blocks, up to the query's own, that are always selected."""
        window: int = 512
        """Keys w of the window branch, the query's own included."""
        kv: Literal["per_branch", "shared"] = "per_branch"
        """Whether every branch has keys and values of its own (the paper, against shortcuts in learning)."""
        gate: Literal["head", "token", "softmax"] = "head"
        """Sigmoids for every head and branch, for every branch, or a softmax over the branches of every head."""
        importance_scaled: bool = True
        """Whether scores that rank blocks are divided by sqrt(K) too (the paper's equation has no scale there)."""
        reuse: int = 1
        """Consecutive positions that go by the selection of the first of them; divides l'."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            "tiny": {
                "head_dim": 16,
                "kv_heads": 2,
                "compress_length": 16,
                "compress_stride": 8,
                "select_block": 16,
                "select_blocks": 6,
                "window": 32,
            },
            "340m": {"head_dim": 64, "kv_heads": 4},
            "1.3b": {"head_dim": 128, "kv_heads": 4},
        }

        @property
        def blocks(self) -> Blocks:
            return Blocks(
                self.compress_length,
                self.compress_stride,
                self.select_block,
                self.select_blocks,
                self.initial_blocks,
                self.local_blocks,
                self.reuse,
            )

        def resolved(self, width: int) -> Self:
            config = super().resolved(width)
            if not config.branches or len(set(config.branches)) != len(config.branches):
                raise ConfigError.at(
                    "branches",
                    got=list(config.branches),
                    expected="one to three different branches",
                    do=f"Any of {', '.join(BRANCHES)}.",
                )
            if "compression" not in config.branches and "selection" in config.branches and config.compress != "mean":
                raise ConfigError.at(
                    "compress",
                    got=config.compress,
                    expected="mean, where pooled blocks only rank",
                    do="Nothing trains φ without the compression branch; set compress: mean.",
                )
            if config.window < 1:
                raise ConfigError.at(
                    "window",
                    got=config.window,
                    expected="at least 1 (the token itself)",
                    do="Without a window, leave it out of `branches`.",
                )
            assert config.head_dim
            if config.head_dim % 16:
                nearest = max(16, round(config.head_dim / 16) * 16)
                raise ConfigError.at(
                    "head_dim",
                    got=config.head_dim,
                    expected="a multiple of 16 (the kernels' tiles)",
                    do=f"Nearest: {nearest}.",
                )
            check_blocks(
                config.blocks,
                {
                    "length": "compress_length",
                    "stride": "compress_stride",
                    "block": "select_block",
                    "selected": "select_blocks",
                    "local": "local_blocks",
                    "reuse": "reuse",
                },
            )
            ordered = tuple(branch for branch in BRANCHES if branch in config.branches)
            return config.changed(branches=ordered)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.G, self.K = config.heads, config.kv_heads, config.head_dim
        self.branches, self.gate_kind, self.window = config.branches, config.gate, config.window
        self.blocks: Blocks = config.blocks
        self.rope_first, self.importance_scaled = config.compress_rope == "before", config.importance_scaled
        self.layout = layout(config)
        self.q = Linear(width, self.H * self.K)
        self.kv = Linear(width, len(self.layout.sets) * 2 * self.G * self.K)
        self.out = Linear(self.H * self.K, width, writes_residual=True)
        self.gate = Linear(width, len(self.branches) * (1 if self.gate_kind == "token" else self.H), bias=True)
        if "pooled" in self.layout.reads:
            self.pool_k = Pooling(config.compress, config.compress_length, self.K)
            self.pool_v = Pooling(config.compress, config.compress_length, self.K)
        self.q_norm = RMSNorm(self.K) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.K) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(config.rotary_dim, config.rotary_theta) if config.rotary else None

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
            block_indices: (B, T, G, n) blocks to attend instead of the ones this layer would select; -1 for none.
        """
        outputs, indices = self._attend(x_BTD, segments, cache, block_indices)
        B, T, _ = x_BTD.shape
        gates_BTcH = self.gate(x_BTD).view(B, T, len(self.branches), -1)
        gates_BTcH = gates_BTcH.softmax(dim=2) if self.gate_kind == "softmax" else gates_BTcH.sigmoid()
        if aux is not None and aux.collect_metrics:
            for index, branch in enumerate(self.branches):
                aux.metrics[f"gate_{branch}"] = gates_BTcH[:, :, index].detach().float().mean()
            if indices is not None:
                own_BT11 = indices.amax(-1, keepdim=True)  # the query's own block is always selected
                there = indices >= 0
                distance = ((own_BT11 - indices) * there).sum() / there.sum().clamp_min(1)
                aux.metrics["selected_distance"] = distance.float() * self.blocks.block  # tokens back, on average
        o_BTHK = torch.stack(outputs, dim=2).mul(gates_BTcH[..., None].to(outputs[0].dtype)).sum(2)
        return self.out(o_BTHK.reshape(B, T, self.H * self.K))

    @torch.no_grad()
    def selection(self, x_BTD: Tensor, segments: Tensor | None = None) -> Tensor:
        """(B, T, G, n) blocks that each query selects, counted from the start of its document; -1 for none."""
        _, indices = self._attend(x_BTD, segments, None, None)
        assert indices is not None, "there is no selection branch"
        return indices

    def _attend(
        self, x_BTD: Tensor, segments: Tensor | None, cache: Cache | None, given: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Outputs of the branches, and the selected blocks."""
        B, T, _ = x_BTD.shape
        assert cache is None or isinstance(cache, SparseCache)
        offset = 0 if cache is None else cache.length
        reads, blocks = self.layout.reads, self.blocks
        start_BT = document_starts(segments, B, T, x_BTD.device)
        # keys are mixed with each other, so that positions begin anew in every document
        at: dict[str, Any] = {"offset": offset}
        if segments is not None:
            at = {"positions_BT": torch.arange(T, device=x_BTD.device) - start_BT, "length": T}
        q = self._rotated(self.q_norm(self.q(x_BTD).view(B, T, self.H, self.K)), **at)
        kv = self.kv(x_BTD).view(B, T, len(self.layout.sets), 2, self.G, self.K)
        raw = {name: (self.k_norm(kv[:, :, i, 0]), kv[:, :, i, 1]) for i, name in enumerate(self.layout.sets)}
        rotated = {name: (self._rotated(k, **at), v) for name, (k, v) in raw.items()}
        rows = rotated if cache is None else {name: held.extend(*rotated[name]) for name, held in cache.rows.items()}
        out: dict[str, Tensor] = {}
        indices = given
        if "pooled" in reads:
            source = (rotated if self.rope_first else raw)[reads["pooled"]]
            ck, cv = self._pooled(source, segments, start_BT, None if cache is None else cache.pooled)
            settings: dict[str, Any] = {"start_BT": start_BT, "offset": offset}
            pooled: dict[str, Any] = {**settings, "length": blocks.length, "stride": blocks.stride}
            lse = None
            if "compression" in reads:
                out["compression"], lse = visible_block_attention(q, ck, cv, **pooled)
            if "selection" in reads:
                scale = self.K**-0.5 if self.importance_scaled else 1.0
                if indices is None:
                    if lse is None or not self.importance_scaled:
                        with torch.no_grad():
                            _, lse = visible_block_attention(q, ck, ck, scale=scale, **pooled)
                    held = None if cache is None or cache.pooled is None else cache.pooled.chosen_BGn
                    indices = select_blocks(
                        q, ck, lse, blocks=blocks, num_keys=offset + T, scale=scale, previous_BGn=held, **settings
                    )
                    if cache is not None and cache.pooled is not None and held is not None:
                        cache.pooled.chosen_BGn = indices[:, -1]
                k, v = rows[reads["selection"]]
                out["selection"], _ = selected_attention(
                    q, k, v, indices, block=blocks.block, reuse=1 if given is not None else blocks.reuse, **settings
                )
        if "window" in reads:
            k, v = rows[reads["window"]]
            out["window"], _ = visible_block_attention(
                q, k, v, start_BT=start_BT, offset=k.shape[1] - T, window=self.window
            )
        if cache is not None:
            cache.length += T
        return [out[branch] for branch in self.branches], indices

    def _rotated(self, x_BTHK: Tensor, **at: Any) -> Tensor:
        return x_BTHK if self.rotary is None else self.rotary(x_BTHK, **at)

    def _pooled(
        self, source: tuple[Tensor, Tensor], segments: Tensor | None, start_BT: Tensor, cache: PooledCache | None
    ) -> list[Tensor]:
        """Keys and values (B, N, G, K) of the pooled blocks."""
        length, stride = self.blocks.length, self.blocks.stride

        def pool(raw: list[Tensor], first: int, rows_BN: Tensor | None = None) -> list[Tensor]:
            N = num_blocks(raw[0].shape[1], length, stride)
            ck, cv = (phi(unfold_blocks(x, rows_BN, length, stride)) for phi, x in zip((self.pool_k, self.pool_v), raw))
            if not self.rope_first and rows_BN is None:
                place = torch.arange(first, first + N, device=ck.device)[None] * stride
                ck = self._rotated(ck, positions_BT=place, length=(first + N) * stride)
            elif not self.rope_first and rows_BN is not None:
                rows_BN = rows_BN.clamp_min(0)
                ck = self._rotated(ck, positions_BT=rows_BN - start_BT.gather(1, rows_BN), length=raw[0].shape[1])
            return [ck, cv]

        if cache is not None:
            return cache.extend(list(source), pool)
        return pool(list(source), 0, None if segments is None else block_starts(start_BT, segments, length, stride))

    def rescaling_pairs(self) -> list[RescalingPair]:
        H, G, K = self.H, self.G, self.K
        if "pooled" in self.layout.reads and self.pool_k.kind != "mean":
            return []  # a learned map of a block adds positions and mixes channels: it does not scale with keys and values
        scale_GK, scale_GV = channel_scales(G, K, self.rotary), channel_scales(G, K)

        def kv_rows(position: int, scales: Tensor) -> Tensor:
            # all sets meet the same queries and the same output matrix
            index = torch.full((len(self.layout.sets), 2, G, K), -1)
            index[:, position] = scales
            return index.flatten()[:, None]

        def per_query_head(scales: Tensor) -> Tensor:
            return scales.repeat_interleave(H // G, dim=0).flatten()

        queries, keys = {"q.weight": per_query_head(scale_GK)[:, None]}, {"kv.weight": kv_rows(0, scale_GK)}
        values, out = {"kv.weight": kv_rows(1, scale_GV)}, {"out.weight": per_query_head(scale_GV)[None]}
        vo = RescalingPair("vo", values, out, heads_of(scale_GV))
        # RMS norms undo any scale of queries and keys
        return (
            [vo] if isinstance(self.q_norm, RMSNorm) else [RescalingPair("qk", queries, keys, heads_of(scale_GK)), vo]
        )

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> SparseCache:
        shapes: list[tuple[int, ...]] = [(self.G, self.K)] * 2
        pooled = (
            PooledCache(batch, length, self.blocks, shapes, self.G, device, dtype)
            if "pooled" in self.layout.reads
            else None
        )
        rows = {
            name: RowCache(batch, length, shapes, device, dtype, keep=keep) for name, keep in self.layout.kept.items()
        }
        return SparseCache(pooled, rows)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, G, K, b, T = config.heads, config.kv_heads, config.head_dim, config.blocks, length
        sets, reads, kept = layout(config)
        gates = len(config.branches) * (1 if config.gate == "token" else H)
        shapes = ((width, H * K), (width, len(sets) * 2 * G * K), (width, gates), (H * K, width))
        parameters = sum(m * n for m, n in shapes) + gates + (2 * K if config.qk_norm else 0)
        flops = float(linear_flops(*shapes))
        held = unevicted = 0
        if "pooled" in reads:
            parameters += 2 * Pooling.parameters_of(config.compress, b.length, K)
            flops += 2 * G * Pooling.flops_of(config.compress, b.length, K) * num_blocks(T, b.length, b.stride) / T
            scored = visible_pairs(T, T, b.length, b.stride, 0)
            # a log-sum-exp of its own where the compression branch does not give it
            passes = ("compression" in reads) + (
                "selection" in reads and ("compression" not in reads or not config.importance_scaled)
            )
            flops += passes * 4 * H * K * scored / T
            held = PooledCache.bytes_of(T, b, 2 * G * K, G, element_bytes)
            unevicted = held
        if "selection" in reads:
            flops += 2 * H * K * group_query_pairs(T, b.length, b.stride, b.reuse) / T
            flops += 4 * H * K * selected_pairs(T, T, b.selected * b.block) / T
        if "window" in reads:
            flops += 4 * H * K * visible_pairs(T, T, 1, 1, config.window) / T
        a_token = 2 * G * K * element_bytes
        held += sum(a_token * (T if keep is None else min(T, keep)) for keep in kept.values())
        return Cost(parameters, parameters, flops, held, unevicted + a_token * T * len(kept))

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        forced = config.initial_blocks + config.local_blocks
        counts = sorted({max(forced, config.select_blocks // 2), config.select_blocks, config.select_blocks * 2})
        space = {
            "select_blocks": Range(values=tuple(counts)),
            "gate": Range(values=("head", "token", "softmax")),
            "kv": Range(values=("per_branch", "shared")),
        }
        if "compression" in config.branches:
            space["compress"] = Range(values=("mean", "linear", "mlp"))
        return space
