"""What mixers with selected blocks share: checks of block sizes, and decode caches of pooled blocks.

Legend: B batch, T time, N pooled blocks, G key–value heads, n selected blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import Cache
from workbench.layers import RowCache
from workbench.mixers.families.softmax import nearest_divisor
from workbench.ops.sparse_attention import Blocks, num_blocks


def check_blocks(blocks: Blocks, path: dict[str, str]) -> None:
    """Raise ConfigError where block sizes do not go together. ``path`` names the field of each size."""
    for name in ("length", "stride", "block", "selected", "reuse"):
        if getattr(blocks, name) < 1:
            raise ConfigError.at(path[name], got=getattr(blocks, name), expected="at least 1")
    for name, multiple in (("length", blocks.length), ("block", blocks.block)):
        if multiple % blocks.stride:
            raise ConfigError.at(
                path[name],
                got=multiple,
                expected=f"a multiple of {path['stride']}={blocks.stride}",
                do=f"Nearest {path['stride']}: {nearest_divisor(math.gcd(blocks.length, blocks.block), blocks.stride)}.",
            )
    if blocks.block % blocks.reuse:
        raise ConfigError.at(
            path["reuse"],
            got=blocks.reuse,
            expected=f"a divisor of {path['block']}={blocks.block}",
            do=f"Nearest: {nearest_divisor(blocks.block, blocks.reuse)}.",
        )
    if blocks.local < 1 or blocks.initial < 0:
        raise ConfigError.at(path["local"], got=blocks.local, expected="at least 1: the query's own block")
    if blocks.selected < blocks.initial + blocks.local:
        raise ConfigError.at(
            path["selected"],
            got=blocks.selected,
            expected=f"at least the forced blocks: {blocks.initial} first and {blocks.local} last",
            do=f"Set {path['selected']}: {blocks.initial + blocks.local} or more.",
        )


class PooledCache(Cache):
    """Pooled blocks so far, and the raw tokens (at most l - 1) of the blocks that are not whole yet.

    ``chosen_BGn`` is the last selection, kept where positions share one.
    """

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
        self.blocks, self.length, self.held = blocks, 0, 0
        self.pooled = RowCache(batch, num_blocks(length, blocks.length, blocks.stride), shapes, device, dtype)
        room = min(length, blocks.length - 1)
        self.tail = [torch.empty(batch, room, *shape, device=device, dtype=dtype) for shape in shapes]
        self.chosen_BGn = None
        if blocks.reuse > 1:
            self.chosen_BGn = torch.full((batch, groups, blocks.selected), -1, dtype=torch.int32, device=device)

    def tensors(self) -> list[Tensor]:
        return [*self.pooled.tensors(), *self.tail, *([] if self.chosen_BGn is None else [self.chosen_BGn])]

    def extend(self, new: list[Tensor], pool: Callable[[list[Tensor], int], list[Tensor]]) -> list[Tensor]:
        """Append T raw tokens of each tensor; returns all pooled blocks. ``pool`` gets raw tokens and the number of the first
        block they begin."""
        raw = [
            torch.cat((tail[:, : self.held], x.to(tail.dtype)), dim=1) for tail, x in zip(self.tail, new, strict=True)
        ]
        count = num_blocks(raw[0].shape[1], self.blocks.length, self.blocks.stride)
        if count:
            self.pooled.extend(*pool(raw, self.pooled.length))
        rest = [x[:, count * self.blocks.stride :] for x in raw]
        self.held = rest[0].shape[1]
        for tail, x in zip(self.tail, rest):
            tail[:, : self.held] = x
        self.length += new[0].shape[1]
        return [x[:, : self.pooled.filled] for x in self.pooled.rows]

    @staticmethod
    def bytes_of(length: int, blocks: Blocks, channels: int, groups: int, element_bytes: int) -> int:
        """Of ``channels`` elements a token: pooled blocks, raw tail, the shared selection."""
        rows = num_blocks(length, blocks.length, blocks.stride) + min(length, blocks.length - 1)
        return rows * channels * element_bytes + (4 * groups * blocks.selected if blocks.reuse > 1 else 0)


class SparseCache(Cache):
    """``pooled`` blocks, and the ``rows`` of each set of keys and values that is attended token by token."""

    def __init__(self, pooled: PooledCache | None, rows: dict[str, RowCache]):
        self.pooled, self.rows, self.length = pooled, rows, 0

    def tensors(self) -> list[Tensor]:
        own = [] if self.pooled is None else self.pooled.tensors()
        return own + [tensor for rows in self.rows.values() for tensor in rows.tensors()]
