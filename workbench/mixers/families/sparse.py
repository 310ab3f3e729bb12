"""What mixers with pooled and selected blocks share: checks of block sizes, decode caches, positions, selections.

Legend: B batch, T queries, N pooled blocks, H query heads, G key–value heads, K head channels, n selected blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.config import require
from workbench.contract import AuxOutputs, BlocksPerQuery, Budget, Cache
from workbench.layers import RowCache
from workbench.mixers.families.softmax import nearest_divisor
from workbench.ops.sparse_attention import (
    Blocks,
    block_coverage,
    block_starts,
    chosen_block_attention,
    document_starts,
    num_blocks,
    select_blocks,
    select_for_step,
    selected_attention,
    visible_counts,
)
from workbench.pooled import is_token, mean_of

COVERED_QUERIES = 1024
"""Queries of a row over which the coverage of diagnostics is averaged."""
SCORE_OBSTACLE = "queries meet pooled keys and keys of selected blocks, whose largest score is not measured"


def check_blocks(blocks: Blocks, path: dict[str, str]) -> None:
    """Check that block sizes fit each other.

    Args:
        blocks: the sizes.
        path: name of the field of each size, for messages.

    Raises:
        ConfigError: naming the field that does not fit.
    """
    for name in ("length", "stride", "block", "selected", "reuse"):
        value = getattr(blocks, name)
        require(value >= 1, path[name], got=value, expected="at least 1")
    common = math.gcd(blocks.length, blocks.block)
    for name, multiple in (("length", blocks.length), ("block", blocks.block)):
        require(
            multiple % blocks.stride == 0,
            path[name],
            got=multiple,
            expected=f"a multiple of {path['stride']}={blocks.stride}",
            do=f"Nearest {path['stride']}: {nearest_divisor(common, blocks.stride)}.",
        )
    require(
        blocks.block % blocks.reuse == 0,
        path["reuse"],
        got=blocks.reuse,
        expected=f"a divisor of {path['block']}={blocks.block}",
        do=f"Nearest: {nearest_divisor(blocks.block, blocks.reuse)}.",
    )
    require(
        blocks.local >= 1 and blocks.initial >= 0,
        path["local"],
        got=blocks.local,
        expected="at least 1: the query's own block",
    )
    forced = blocks.initial + blocks.local
    require(
        blocks.selected >= forced,
        path["selected"],
        got=blocks.selected,
        expected=f"at least the forced blocks: {blocks.initial} first and {blocks.local} last",
        do=f"Set {path['selected']}: {forced} or more.",
    )


def blocks_per_query(field: str, blocks: Blocks) -> BlocksPerQuery:
    """The number that ``field`` sets; below the forced blocks there is no choice."""
    return BlocksPerQuery(field, blocks.selected, blocks.initial + blocks.local)


@dataclass(frozen=True)
class Positions:
    """Positions of T queries: cached tokens before them, and the starts of their documents."""

    start_BT: Tensor
    """Row index at which each query's document starts."""
    offset: int
    """Cached tokens before the first query."""
    segments: Tensor | None

    @classmethod
    def of(cls, x_BTD: Tensor, segments: Tensor | None, cache: Cache | None) -> Positions:
        B, T, _ = x_BTD.shape
        offset = 0 if cache is None else cache.length
        return cls(document_starts(segments, B, T, x_BTD.device), offset, segments)

    @property
    def end(self) -> int:
        """Tokens up to the last query."""
        return self.offset + self.start_BT.shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the operations."""
        return {"start_BT": self.start_BT, "offset": self.offset}

    @property
    def rotary(self) -> dict[str, Any]:
        """Keyword arguments of :class:`workbench.layers.Rotary`. Pooling mixes rotated keys with each other, so
        positions restart in every document."""
        if self.segments is None:
            return {"offset": self.offset}
        T = self.start_BT.shape[1]
        return {"positions_BT": torch.arange(T, device=self.start_BT.device) - self.start_BT, "length": T}


@dataclass(frozen=True)
class Selection:
    """Blocks that queries attend. A layer can attend the selection of another one (argument ``selection`` of its
    forward)."""

    indices: Tensor
    """(B, T, G, n) int32, counted from the start of the query's document; -1 for none."""
    reuse: int = 1
    """Consecutive positions whose blocks are those of the first of them."""

    @classmethod
    def by_scores(
        cls,
        q_BTHK: Tensor,
        ck_BNGK: Tensor,
        lse_BTH: Tensor,
        positions: Positions,
        blocks: Blocks,
        cache: PooledCache | None,
        aux: AuxOutputs | None = None,
        budget: Budget | None = None,
        scale: float | None = None,
    ) -> Selection:
        """The blocks that queries select by their scores with pooled keys.

        Args:
            q_BTHK: queries.
            ck_BNGK: pooled keys.
            lse_BTH: log-sum-exp of the scores.
            positions: of the queries.
            blocks: sizes and numbers of blocks.
            cache: decode state; a selection that later positions reuse is stored in it.
            aux: collects the coverage of the selection, and the choice of the budget.
            budget: how many blocks are selected. Default: ``blocks.selected``.
            scale: of the scores. Default: 1/sqrt(K).
        """
        previous = None if cache is None else cache.selected_BGn
        count = None
        scored = (q_BTHK, ck_BNGK, lse_BTH)
        if budget is not None:
            assert cache is None, "a budget is for whole rows, not for decoding"
            blocks = blocks._replace(selected=budget.largest)
            coverage_K = None
            if budget.candidates_K is not None:
                coverage_K = _coverage(scored, budget.candidates_K, budget.queries, positions, blocks, scale)
            choice = budget.choose(coverage_K)
            count = choice.blocks
            if aux is not None:
                aux.budget = choice
                if aux.collect_metrics:
                    aux.metrics.update(choice.metrics)
        if cache is None and aux is not None and aux.collect_metrics:
            number = torch.full((), blocks.selected, device=q_BTHK.device) if count is None else count
            aux.metrics["coverage"] = mean_of(
                _coverage(scored, number.to(torch.int32)[None], COVERED_QUERIES, positions, blocks, scale)
            )
        indices = select_blocks(
            q_BTHK,
            ck_BNGK,
            lse_BTH,
            blocks=blocks,
            num_keys=positions.end,
            scale=scale,
            previous_BGn=previous,
            budget=count,
            **positions.settings,
        )
        if cache is not None and previous is not None:
            previous.copy_(indices[:, -1])
        return cls(indices, blocks.reuse)

    def attend(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor | None, positions: Positions, block: int, **options: Any
    ) -> Tensor:
        """Attention to the tokens of the selected blocks: (B, T, H, V)."""
        settings = {**positions.settings, **options}
        output, _ = selected_attention(q_BTHK, k_BSGK, v_BSGV, self.indices, block=block, reuse=self.reuse, **settings)
        return output

    @classmethod
    def for_step(
        cls,
        q_BHK: Tensor,
        ck_BNgK: Tensor,
        lse_BH: Tensor,
        blocks: Blocks,
        cache: SparseCache,
        groups: int,
        scale: float,
        shared_BN1R: Tensor | None = None,
    ) -> Selection:
        """The blocks that the queries of a step select; arguments as of :func:`select_for_step`."""
        assert cache.positions_B is not None and cache.pooled is not None
        chosen_BGn = select_for_step(
            q_BHK,
            ck_BNgK,
            lse_BH,
            cache.positions_B,
            blocks=(blocks.length, blocks.stride, blocks.block, blocks.selected, blocks.initial, blocks.local),
            capacity=cache.capacity,
            groups=groups,
            scale=scale,
            shared_BN1R=shared_BN1R,
        )
        if (previous_BGn := cache.pooled.selected_BGn) is not None:
            selects_B11 = (cache.positions_B % blocks.reuse == 0)[:, None, None]
            chosen_BGn = torch.where(selects_B11, chosen_BGn, previous_BGn.long())
            previous_BGn.copy_(chosen_BGn)
        return cls(chosen_BGn[:, None], blocks.reuse)

    def attend_step(
        self,
        q_BHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor | None,
        positions_B: Tensor,
        block: int,
        scale: float,
        shared_BS1R: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries of a step to the tokens of the selected blocks: (B, H, V)."""
        return chosen_block_attention(
            q_BHK,
            k_BSGK,
            v_BSGV,
            self.indices[:, 0].long(),
            positions_B,
            block=block,
            scale=scale,
            shared_BS1R=shared_BS1R,
        )

    def record_metrics(self, aux: AuxOutputs, block: int, segments: Tensor | None) -> None:
        """Mean distance of the selected blocks from the query's own, in tokens."""
        own_block = self.indices.amax(-1, keepdim=True)  # always selected
        selected = self.indices >= 0
        if (valid := is_token(segments, 2)) is not None:
            selected = selected & valid
        aux.metrics["selected_distance"] = mean_of((own_block - self.indices) * block, selected)


def _coverage(
    scored: tuple[Tensor, Tensor, Tensor],
    counts_K: Tensor,
    queries: int,
    positions: Positions,
    blocks: Blocks,
    scale: float | None,
) -> Tensor:
    return block_coverage(
        *scored,
        counts_K,
        blocks=blocks,
        start_BT=positions.start_BT,
        queries=queries,
        scale=scale,
        valid_BT=is_token(positions.segments),
    )


Pool = Callable[[list[Tensor], Tensor, int | None, Tensor | None], list[Tensor]]
"""pool(raw tokens, positions of the blocks' first tokens (B or 1, N), a bound on them if it is known, their rows (B, N)
in packed documents) -> pooled blocks (B, N, …)."""


def pooled_blocks(
    raw: list[Tensor], pool: Pool, positions: Positions, blocks: Blocks, cache: PooledCache | None
) -> list[Tensor]:
    """Pooled blocks of all tokens so far, (B, N, …) for each tensor (B, T, …) of ``raw``."""
    if cache is not None:
        return cache.extend(raw, pool)
    T, device = raw[0].shape[1], raw[0].device
    if positions.segments is None:
        N = num_blocks(T, blocks.length, blocks.stride)
        return pool(raw, torch.arange(N, device=device)[None] * blocks.stride, N * blocks.stride, None)
    rows_BN = block_starts(positions.start_BT, positions.segments, blocks.length, blocks.stride)
    existing_BN = rows_BN.clamp_min(0)
    return pool(raw, existing_BN - positions.start_BT.gather(1, existing_BN), T, rows_BN)


class PooledCache(Cache):
    """Pooled blocks so far, and the last l raw tokens, position p in row p mod l.

    ``selected_BGn`` is the last selection, cached if positions share one.
    """

    ragged = True

    def __init__(
        self,
        batch: int,
        length: int,
        blocks: Blocks,
        shapes: list[tuple[int, ...]],
        groups: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.blocks = blocks
        self.pooled = RowCache(batch, num_blocks(length, blocks.length, blocks.stride), shapes, device, dtype)
        self.raw = RowCache(batch, length, shapes, device, dtype, window=blocks.length)
        self.selected_BGn = None
        if blocks.reuse > 1:
            self.selected_BGn = torch.full((batch, groups, blocks.selected), -1, dtype=torch.int32, device=device)

    def tensors(self) -> list[Tensor]:
        selected = [] if self.selected_BGn is None else [self.selected_BGn]
        return [*self.pooled.tensors(), *self.raw.tensors(), *selected]

    def step_from(self, positions_B: Tensor) -> None:
        super().step_from(positions_B)
        self.raw.step_from(positions_B)

    def extend(self, new: list[Tensor], pool: Pool) -> list[Tensor]:
        """Append T raw tokens of each tensor. Returns all pooled blocks."""
        length, stride = self.blocks.length, self.blocks.stride
        done = self.pooled.length
        # of the last l - 1 tokens and the new ones, those from the start of the first block that is not pooled yet
        raw = [
            x[:, max(0, x.shape[1] - (self.length + new[0].shape[1] - done * stride)) :] for x in self.raw.extend(*new)
        ]
        count = num_blocks(raw[0].shape[1], length, stride)
        raw = [x.to(y.dtype) for x, y in zip(raw, new)]
        if count:
            starts_1N = torch.arange(done, done + count, device=raw[0].device)[None] * stride
            self.pooled.extend(*pool(raw, starts_1N, (done + count) * stride, None))
        self.length += new[0].shape[1]
        return [x[:, : self.pooled.filled] for x in self.pooled.rows]

    def append(self, new: list[Tensor], pool: Pool) -> tuple[list[Tensor], Tensor]:
        """Append the raw token of a step to each tensor, and pool the block that it completes. Returns the memory of
        all pooled blocks, and (B,) how many are visible, the first ones."""
        (length, stride), position_B = self.blocks[:2], self.positions_B
        assert position_B is not None
        self.raw.append(*new)
        visible_B = visible_counts(position_B, length, stride)
        if self.pooled.capacity:
            first_B = position_B + 1 - length
            slots_BL = (first_B[:, None] + torch.arange(length, device=first_B.device)) % self.raw.capacity
            sequence_B = torch.arange(len(first_B), device=first_B.device)
            raw = [row[sequence_B[:, None], slots_BL].to(x.dtype) for row, x in zip(self.raw.rows, new)]
            block = pool(raw, first_B[:, None], None, None)
            is_complete_B = (first_B >= 0) & (first_B % stride == 0)
            number_B = (first_B // stride).clamp_min(0)
            for row, x in zip(self.pooled.rows, block):
                is_new = is_complete_B.view(-1, *[1] * (x.dim() - 2))
                row[sequence_B, number_B] = torch.where(is_new, x[:, 0].to(row.dtype), row[sequence_B, number_B])
        return self.pooled.rows, visible_B

    @staticmethod
    def bytes_of(length: int, blocks: Blocks, channels: int, groups: int, element_bytes: int) -> int:
        """Bytes of pooled blocks, raw tail and shared selection, for ``channels`` elements per token."""
        rows = num_blocks(length, blocks.length, blocks.stride) + min(length, blocks.length)
        return rows * channels * element_bytes + (4 * groups * blocks.selected if blocks.reuse > 1 else 0)


class SparseCache(Cache):
    """``pooled`` blocks, and the ``rows`` of each set of keys and values that is attended token by token, in sequences
    of at most ``capacity`` tokens."""

    ragged = True

    def __init__(self, pooled: PooledCache | None, rows: dict[str, RowCache], blocks: Blocks, capacity: int):
        self.pooled, self.rows, self.blocks, self.capacity = pooled, rows, blocks, capacity

    def tensors(self) -> list[Tensor]:
        pooled = [] if self.pooled is None else self.pooled.tensors()
        return pooled + [tensor for rows in self.rows.values() for tensor in rows.tensors()]

    def step_bytes(self, lengths: Sequence[int]) -> float:
        total = 0.0
        for rows in self.rows.values():
            chosen = self.blocks.selected * self.blocks.block if rows.window is None else rows.window
            total += rows.row_bytes(lengths, chosen)
        if self.pooled is not None:
            visible = [num_blocks(length, self.blocks.length, self.blocks.stride) for length in lengths]
            total += self.pooled.pooled.step_bytes(visible) + self.pooled.raw.step_bytes(lengths)
        return total

    def step_from(self, positions_B: Tensor) -> None:
        super().step_from(positions_B)
        for cache in (self.pooled, *self.rows.values()):
            if cache is not None:
                cache.step_from(positions_B)
