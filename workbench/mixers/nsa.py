"""Native sparse attention (arXiv 2502.11089): pooled blocks, selected blocks and a window, mixed by gates.

    o_p = Σ_c g_p^c · Attn(q_p, K^c, V^c),  c in {compression, selection, window},  scale 1/sqrt(K)

From the paper: the three branches, independent sigmoid gates, φ a learned map with a position encoding inside the
block, the mapping of scores (eq. 9), their sum over the heads of a group, first and last blocks always selected,
separate keys and values for every branch; l 32, d 16, l' 64, n 16 with 1 first and 2 last blocks, w 512.
Left open by the paper, chosen by us: the gate is one linear layer with bias; the form of φ
(:class:`workbench.layers.Pooling`); where rotary positions are applied (``compress_rope``); a window of exactly w
tokens; importance scores have the attention's scale. ``reuse`` is not in the paper (see
:mod:`workbench.mixers.asa_global`).

By our count it reads 1.4 times fewer keys than full attention at 4,096 tokens and 6.5 times fewer at 32,768: no
speed-up can be expected below a few thousand tokens.

Legend: B batch, T queries, S keys, N pooled blocks, D model width, H query heads, G key–value heads, K head channels,
n selected blocks, c branches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from workbench.config import require
from workbench.contract import (
    AuxOutputs,
    BlocksPerQuery,
    Budget,
    Cache,
    Capabilities,
    Cost,
    Mixer,
    ParameterRole,
    Range,
    RescalingPair,
    Role,
    Scores,
    mixers,
)
from workbench.layers import Linear, Pooling, RMSNorm, Rotary, RowCache, ScaledScores, linear_flops
from workbench.mixers.families.softmax import QK_NORM_OBSTACLE, HeadsConfig, channel_scales, heads_of
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

Branch = Literal["compression", "selection", "window"]
BRANCHES: tuple[Branch, ...] = ("compression", "selection", "window")


class Layout(NamedTuple):
    """Key–value sets of a configuration and the set that each branch reads."""

    sets: tuple[str, ...]
    """Names of the sets, in the order of the projection."""
    reads: dict[str, str]
    """Branch -> set; "pooled" -> the set whose blocks are pooled."""
    cached: dict[str, int | None]
    """Set -> number of tokens to cache (None: all), without the sets that are only pooled."""


def layout(config: Any) -> Layout:
    """The sets of a resolved configuration."""
    shared = config.kv == "shared"
    sets = ("shared",) if shared else tuple(config.branches)
    reads = {branch: "shared" if shared else branch for branch in config.branches}
    if "compression" in reads or "selection" in reads:
        reads["pooled"] = reads.get("compression", reads.get("selection", ""))
    cached: dict[str, int | None] = {}
    if "window" in reads:
        cached[reads["window"]] = config.window
    if "selection" in reads:
        cached[reads["selection"]] = None
    return Layout(sets, reads, cached)


@mixers.register
class NSA(ScaledScores, Mixer):
    """Native sparse attention: compression, selection and window branches, gated."""

    capabilities = Capabilities(flops_check="forward")
    widens = ("heads", "kv_heads")
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
        """Branches that write to the output, any of compression, selection and window. Selection scores pooled blocks
        even without the compression branch."""
        compress: Literal["mean", "linear", "mlp"] = "mlp"
        """Pooling φ of a block of keys or values."""
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
        window: Annotated[int, Field(ge=1)] = 512
        """Keys w of the window branch, the query's own included; without a window, leave it out of ``branches``."""
        kv: Literal["per_branch", "shared"] = "per_branch"
        """Separate keys and values for every branch (the paper, against shortcuts in learning), or shared ones."""
        gate: Literal["head", "token", "softmax"] = "head"
        """Sigmoids for every head and branch, for every branch, or a softmax over the branches of every head."""
        importance_scaled: bool = True
        """Whether the scores that rank blocks are divided by sqrt(K) too (the paper's equation has no scale)."""
        reuse: int = 1
        """Consecutive positions that attend the blocks selected by the first of them; divides l'."""

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
            require(
                config.branches and len(set(config.branches)) == len(config.branches),
                "branches",
                got=list(config.branches),
                expected="one to three different branches",
                do=f"Any of {', '.join(BRANCHES)}.",
            )
            require(
                "compression" in config.branches or "selection" not in config.branches or config.compress == "mean",
                "compress",
                got=config.compress,
                expected="mean, where pooled blocks are only ranked",
                do="Nothing trains φ without the compression branch; set compress: mean.",
            )
            assert config.head_dim
            require(
                config.head_dim % 16 == 0,
                "head_dim",
                got=config.head_dim,
                expected="a multiple of 16 (the kernels' tiles)",
                do=f"Nearest: {max(16, round(config.head_dim / 16) * 16)}.",
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
        self.score_channels = self.K
        self.branches, self.gate_kind, self.window = config.branches, config.gate, config.window
        self.blocks: Blocks = config.blocks
        self.rope_first, self.importance_scaled = config.compress_rope == "before", config.importance_scaled
        self.layout = layout(config)
        self.q = Linear(width, self.H * self.K, parts=((self.H, self.K),))
        self.kv = Linear(
            width, len(self.layout.sets) * 2 * self.G * self.K, parts=((self.G, self.K),) * (2 * len(self.layout.sets))
        )
        self.out = Linear(self.H * self.K, width, writes_residual=True)
        per_branch = 1 if self.gate_kind == "token" else self.H
        self.gate = Linear(width, len(self.branches) * per_branch, bias=True)
        gate_parts = ((1, per_branch),) * len(self.branches)
        self.roles = {
            f"gate.{name}": replace(ParameterRole.of(role), parts=gate_parts)
            for name, role in (("weight", Role.HIDDEN), ("bias", Role.BIAS))
        }
        if "pooled" in self.layout.reads:
            self.pool_k = Pooling(config.compress, config.compress_length, self.K)
            self.pool_v = Pooling(config.compress, config.compress_length, self.K)
        self.q_norm = RMSNorm(self.K) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.K) if config.qk_norm else nn.Identity()
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
            selection: blocks to attend instead of the ones this layer would select.
        """
        outputs, selection = self._attend(x_BTD, segments, cache, selection, aux, budget)
        B, T, _ = x_BTD.shape
        gates_BTcH = self.gate(x_BTD).view(B, T, len(self.branches), -1)
        gates_BTcH = gates_BTcH.softmax(dim=2) if self.gate_kind == "softmax" else gates_BTcH.sigmoid()
        if aux is not None and aux.collect_metrics:
            for index, branch in enumerate(self.branches):
                aux.metrics[f"gate_{branch}"] = mean_of(gates_BTcH[:, :, index], is_token(segments, 1))
            if selection is not None:
                selection.record_metrics(aux, self.blocks.block, segments)
        o_BTHK = torch.stack(outputs, dim=2).mul(gates_BTcH[..., None].to(outputs[0].dtype)).sum(2)
        return self.out(o_BTHK.reshape(B, T, self.H * self.K).to(x_BTD.dtype))

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        q, _, rotated = self._project(x_BTD, **Positions.of(x_BTD, segments, None).rotary)
        windows = {"selection": None, "window": self.window}
        reads = {branch: keys for branch, keys in self.layout.reads.items() if branch in windows}
        return [Scores(q, rotated[keys][0], window=windows[branch]) for branch, keys in reads.items()]

    @torch.no_grad()
    def selection(self, x_BTD: Tensor, segments: Tensor | None = None) -> Selection:
        """The blocks that each query selects."""
        _, selection = self._attend(x_BTD, segments, None, None)
        assert selection is not None, "this layer has no selection branch"
        return selection

    def _attend(
        self,
        x_BTD: Tensor,
        segments: Tensor | None,
        cache: Cache | None,
        selection: Selection | None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
    ) -> tuple[list[Tensor], Selection | None]:
        """Outputs (B, T, H, K) of the branches, and the selected blocks."""
        assert cache is None or isinstance(cache, SparseCache)
        if cache is not None and cache.positions_B is not None:
            return self._step(x_BTD, cache, selection)
        positions, reads = Positions.of(x_BTD, segments, cache), self.layout.reads
        q, unrotated, rotated = self._project(x_BTD, **positions.rotary)
        rows = rotated if cache is None else {name: kv.extend(*rotated[name]) for name, kv in cache.rows.items()}
        outputs: dict[str, Tensor] = {}
        if "pooled" in reads:
            pooled_cache = None if cache is None else cache.pooled
            source = (rotated if self.rope_first else unrotated)[reads["pooled"]]
            ck, cv = self._pooled(list(source), positions, pooled_cache)
            lse = None
            if "compression" in reads:
                outputs["compression"], lse = self._attend_pooled(q, ck, cv, positions)
            if "selection" in reads:
                if selection is None:
                    selection = self._select(q, ck, lse, positions, pooled_cache, aux, budget)
                k, v = rows[reads["selection"]]
                outputs["selection"] = selection.attend(q, k, v, positions, self.blocks.block)
        if "window" in reads:
            k, v = rows[reads["window"]]
            offset = k.shape[1] - q.shape[1]  # the cache of a window has evicted earlier tokens
            outputs["window"], _ = visible_block_attention(
                q, k, v, start_BT=positions.start_BT, offset=offset, window=self.window
            )
        if cache is not None:
            cache.length = positions.end
        return [outputs[branch] for branch in self.branches], selection

    def _step(
        self, x_BTD: Tensor, cache: SparseCache, selection: Selection | None
    ) -> tuple[list[Tensor], Selection | None]:
        """As :meth:`_attend`, of one token per sequence."""
        assert cache.positions_B is not None
        reads, scale = self.layout.reads, self.K**-0.5
        q, unrotated, rotated = self._project(x_BTD, **cache.rotary())
        lengths = {name: kv.append(*rotated[name]) for name, kv in cache.rows.items()}
        rows = {name: kv.rows for name, kv in cache.rows.items()}
        outputs: dict[str, Tensor] = {}
        if "pooled" in reads:
            assert cache.pooled is not None
            source = (rotated if self.rope_first else unrotated)[reads["pooled"]]
            q_BHK = q[:, 0].to(source[1].dtype)
            (ck, cv), visible_B = cache.pooled.append(list(source), self._pool)
            lse_BH = None
            if "compression" in reads:
                outputs["compression"], lse_BH = decode_attention(q_BHK, ck, cv, visible_B, scale=scale)
            if "selection" in reads:
                if selection is None:
                    importance = scale if self.importance_scaled else 1.0
                    if lse_BH is None or not self.importance_scaled:
                        _, lse_BH = decode_attention(q_BHK, ck, None, visible_B, scale=importance)
                    selection = Selection.for_step(q_BHK, ck, lse_BH, self.blocks, cache, self.G, importance)
                k, v = rows[reads["selection"]]
                outputs["selection"] = selection.attend_step(q_BHK, k, v, cache.positions_B, self.blocks.block, scale)
        if "window" in reads:
            # a set that the selection reads too has all tokens, one of the window's own only the last ones
            (k, v), seen_B = rows[reads["window"]], lengths[reads["window"]]
            q_BHK = q[:, 0].to(v.dtype)
            outputs["window"], _ = decode_attention(q_BHK, k, v, seen_B, scale=scale, window=self.window)
        return [outputs[branch][:, None] for branch in self.branches], selection

    def _project(
        self, x_BTD: Tensor, **positions: Any
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
        """Rotated queries (B, T, H, K); keys and values (B, T, G, K) of each set, keys unrotated and rotated."""
        B, T, _ = x_BTD.shape
        q = self.scaled(self.q_norm(self.q(x_BTD).view(B, T, self.H, self.K)))
        q = self._rotated(q, **positions)
        kv = self.kv(x_BTD).view(B, T, len(self.layout.sets), 2, self.G, self.K)
        unrotated = {name: (self.k_norm(kv[:, :, i, 0]), kv[:, :, i, 1]) for i, name in enumerate(self.layout.sets)}
        rotated = {name: (self._rotated(k, **positions), v) for name, (k, v) in unrotated.items()}
        return q, unrotated, rotated

    def _rotated(self, x_BTHK: Tensor, **positions: Any) -> Tensor:
        return x_BTHK if self.rotary is None else self.rotary(x_BTHK, **positions)

    def _attend_pooled(
        self, q: Tensor, ck: Tensor, cv: Tensor, positions: Positions, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention over pooled blocks, and the log-sum-exp of its scores."""
        length, stride = self.blocks.length, self.blocks.stride
        return visible_block_attention(q, ck, cv, length=length, stride=stride, scale=scale, **positions.settings)

    def _select(
        self,
        q: Tensor,
        ck: Tensor,
        lse: Tensor | None,
        positions: Positions,
        cache: PooledCache | None,
        aux: AuxOutputs | None,
        budget: Budget | None,
    ) -> Selection:
        """Blocks by importance; ``lse`` is that of the compression branch, None without one."""
        scale = self.K**-0.5 if self.importance_scaled else 1.0
        if lse is None or not self.importance_scaled:
            with torch.no_grad():
                _, lse = self._attend_pooled(q, ck, ck, positions, scale)
        return Selection.by_scores(q, ck, lse, positions, self.blocks, cache, aux, budget, scale)

    def _pooled(self, kv: list[Tensor], positions: Positions, cache: PooledCache | None) -> list[Tensor]:
        """Keys and values (B, N, G, K) of the pooled blocks."""
        return pooled_blocks(kv, self._pool, positions, self.blocks, cache)

    def _pool(self, raw: list[Tensor], starts: Tensor, bound: int | None, rows_BN: Tensor | None) -> list[Tensor]:
        length, stride = self.blocks.length, self.blocks.stride
        ck, cv = (phi(unfold_blocks(x, rows_BN, length, stride)) for phi, x in zip((self.pool_k, self.pool_v), raw))
        return [ck if self.rope_first else self._rotated(ck, positions_BT=starts, length=bound), cv]

    def score_obstacle(self) -> str:
        return SCORE_OBSTACLE

    def rescaling_pairs(self) -> list[RescalingPair]:
        H, G, K = self.H, self.G, self.K
        if "pooled" in self.layout.reads and self.pool_k.kind != "mean":
            return []  # a learned map of a block adds positions and mixes channels: it does not scale with its inputs
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

    def rescaling_obstacles(self) -> dict[str, str]:
        if "pooled" in self.layout.reads and self.pool_k.kind != "mean":
            learned = "the learned map of a block (compress) adds positions and mixes channels: it does not scale"
            return {"qk": learned, "vo": learned}
        return {"qk": QK_NORM_OBSTACLE} if isinstance(self.q_norm, RMSNorm) else {}

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> SparseCache:
        shapes: list[tuple[int, ...]] = [(self.G, self.K)] * 2
        pooled = (
            PooledCache(batch, length, self.blocks, shapes, self.G, device, dtype)
            if "pooled" in self.layout.reads
            else None
        )
        rows = {
            name: RowCache(batch, length, shapes, device, dtype, window) for name, window in self.layout.cached.items()
        }
        return SparseCache(pooled, rows, self.blocks, length)

    @classmethod
    def blocks_per_query(cls, config: Any) -> BlocksPerQuery | None:
        return blocks_per_query("select_blocks", config.blocks) if "selection" in config.branches else None

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, G, K, b, T = config.heads, config.kv_heads, config.head_dim, config.blocks, length
        sets, reads, cached = layout(config)
        gates = len(config.branches) * (1 if config.gate == "token" else H)
        shapes = ((width, H * K), (width, len(sets) * 2 * G * K), (width, gates), (H * K, width))
        parameters = sum(m * n for m, n in shapes) + gates + (2 * K if config.qk_norm else 0)
        flops = float(linear_flops(*shapes))
        cache_bytes = unevicted = 0
        if "pooled" in reads:
            parameters += 2 * Pooling.parameters_of(config.compress, b.length, K)
            flops += 2 * G * Pooling.flops_of(config.compress, b.length, K) * num_blocks(T, b.length, b.stride) / T
            scored = visible_pairs(T, T, b.length, b.stride, 0)
            # a separate pass for the log-sum-exp where the compression branch does not compute it
            passes = ("compression" in reads) + (
                "selection" in reads and ("compression" not in reads or not config.importance_scaled)
            )
            flops += passes * 4 * H * K * scored / T
            cache_bytes = PooledCache.bytes_of(T, b, 2 * G * K, G, element_bytes)
            unevicted = cache_bytes
        if "selection" in reads:
            flops += 2 * H * K * group_query_pairs(T, b.length, b.stride, b.reuse) / T
            flops += 4 * H * K * selected_pairs(T, T, b.block, b.selected) / T
        if "window" in reads:
            flops += 4 * H * K * visible_pairs(T, T, 1, 1, config.window) / T
        token_bytes = 2 * G * K * element_bytes
        cache_bytes += sum(token_bytes * (T if keep is None else min(T, keep)) for keep in cached.values())
        return Cost(parameters, parameters, flops, cache_bytes, unevicted + token_bytes * T * len(cached))

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
