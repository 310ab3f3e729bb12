"""Which blocks are on the device, and in which slots. Bookkeeping by tensors of fixed shapes: nothing waits for it.

The newest block, which grows, and the one before it are always on the device, in two slots of their own that take turns
(a block whose number is even has the first). All other blocks are complete, and so copies of what the host has.

Legend: B sequences, G groups of heads that share keys, N blocks, S slots, m wanted blocks, n tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.ops.block_transfer import TAILS, Tables, plan_copies, slots_of_blocks
from workbench.ops.sparse_decoding import Pool


class Copies(NamedTuple):
    """Copies that bring wanted blocks onto the device."""

    blocks_BGm: Tensor
    """Numbers of blocks, -1 for entries without a copy."""
    slots_BGm: Tensor
    """Where each goes."""
    copied: Tensor
    """How many they are."""
    hit_rate: Tensor
    """Share of the wanted blocks that need no copy; NaN where none is wanted."""


class Residency:
    """The slots of one layer.

    Args:
        batch: B.
        groups: G.
        blocks: N.
        slots: S; at least as many as are wanted at once.
        block: tokens of a block.
        device: of the tables.
        keep: whether blocks that are not wanted stay, the least recently wanted one being replaced first. Otherwise
            the resident set is exactly what was wanted last.
        reuse: whether blocks that are resident are not copied again.
    """

    def __init__(
        self,
        batch: int,
        groups: int,
        blocks: int,
        slots: int,
        block: int,
        device: torch.device | str,
        *,
        keep: bool = False,
        reuse: bool = True,
    ):
        self.blocks, self.slots, self.block, self.keep, self.reuse = blocks, slots, block, keep, reuse
        self.slot_of_BGN, self.block_of_BGS, self.wanted_at_BGS, self.clock_BG = Tables.empty(
            batch, groups, blocks, slots, device
        )

    @property
    def tables(self) -> Tables:
        """What is where."""
        return Tables(self.slot_of_BGN, self.block_of_BGS, self.wanted_at_BGS, self.clock_BG)

    def plan(self, wanted_BGm: Tensor, newest_B: Tensor) -> Copies:
        """Give a slot to every wanted block, and list the copies that this takes.

        Args:
            wanted_BGm: block numbers without duplicates, -1 for none.
            newest_B: number of the newest block when the wanted ones are read; it and the one before it are in slots
                of their own.
        """
        blocks_BGm, slots_BGm, counts_2BG = plan_copies(
            self.tables, wanted_BGm, newest_B, keep=self.keep, reuse=self.reuse
        )
        wanted, missing = counts_2BG.flatten(1).sum(1).unbind()
        return Copies(blocks_BGm, slots_BGm, missing, 1 - missing / wanted)

    def pool(self, newest_B: Tensor) -> Pool:
        """Where the rows of blocks are: those of the latest plan, and the newest two."""
        return Pool(slots_of_blocks(self.tables, newest_B), self.block)

    def tensors(self) -> list[Tensor]:
        """The tables."""
        return list(self.tables)


__all__ = ["TAILS", "Copies", "Residency"]
