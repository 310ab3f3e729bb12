"""Which blocks are on the device, and in which slots. Bookkeeping by tensors of fixed shapes: nothing waits for it.

The newest block, which grows, and the one before it are always on the device, in two slots of their own that take turns
(a block whose number is even has the first). All other blocks are complete, and so copies of what the host has.

Legend: B sequences, G groups of heads that share keys, N blocks, S slots, m wanted blocks, n tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.ops.sparse_decoding import Pool

TAILS = 2
"""Slots of the newest block and of the one before it, behind the others."""


class Copies(NamedTuple):
    """Copies that bring wanted blocks onto the device."""

    blocks_BGm: Tensor
    """Numbers of blocks, -1 for entries without a copy."""
    slots_BGm: Tensor
    """Where each goes."""
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

    common = ("clock",)

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
        # one column more than there are, for entries that are not valid
        self.slot_of_BGN = torch.full((batch, groups, blocks + 1), -1, device=device)
        self.block_of_BGS = torch.full((batch, groups, slots + 1), -1, device=device)
        self.wanted_at_BGS = torch.full((batch, groups, slots + 1), -1, device=device)
        self.clock = torch.zeros((), dtype=torch.int64, device=device)

    def plan(self, wanted_BGm: Tensor, newest_B: Tensor) -> Copies:
        """Give a slot to every wanted block, and list the copies that this takes.

        Args:
            wanted_BGm: block numbers without duplicates, -1 for none.
            newest_B: number of the newest block when the wanted ones are read; it and the one before it are in slots
                of their own.
        """
        N, S = self.blocks, self.slots
        exists = wanted_BGm >= 0
        valid = exists & (wanted_BGm < newest_B[:, None, None] - 1)
        wanted_BGm = wanted_BGm.where(valid, N)
        if not self.reuse:
            self.slot_of_BGN.fill_(-1)
            self.block_of_BGS.fill_(-1)
        slot_BGm = self.slot_of_BGN.gather(-1, wanted_BGm)
        is_hit = valid & (slot_BGm >= 0)
        is_missing = valid & ~is_hit
        is_kept_BGS = torch.zeros_like(self.block_of_BGS, dtype=torch.bool)
        is_kept_BGS.scatter_(-1, slot_BGm.where(is_hit, S), True)
        if not self.keep:
            self._drop(self.block_of_BGS.masked_fill(is_kept_BGS, -1))
            self.block_of_BGS.masked_fill_(~is_kept_BGS, -1)
        age_BGS = self.wanted_at_BGS.masked_fill(self.block_of_BGS < 0, -1)
        age_BGS = age_BGS.masked_fill(is_kept_BGS, torch.iinfo(torch.int64).max)[..., :S]
        free_BGS = age_BGS.sort(dim=-1, stable=True).indices  # empty slots, then the least recently wanted
        rank_BGm = (is_missing.cumsum(-1) - 1).clamp_(0, S - 1)
        target_BGm = free_BGS.gather(-1, rank_BGm).where(is_missing, S)
        self._drop(self.block_of_BGS.gather(-1, target_BGm).where(is_missing, -1))
        self.block_of_BGS.scatter_(-1, target_BGm, wanted_BGm)
        self.slot_of_BGN.scatter_(-1, wanted_BGm.where(is_missing, N), target_BGm)
        self.clock += 1
        self.wanted_at_BGS.scatter_(-1, torch.where(is_hit, slot_BGm, target_BGm), self.clock.expand_as(target_BGm))
        self.block_of_BGS[..., S], self.slot_of_BGN[..., N] = -1, -1
        hit_rate = 1 - is_missing.sum() / exists.sum()
        return Copies(wanted_BGm.where(is_missing, -1), target_BGm, hit_rate)

    def _drop(self, blocks_BGx: Tensor) -> None:
        """Forget the slots of these blocks, -1 for none."""
        self.slot_of_BGN.scatter_(-1, blocks_BGx.where(blocks_BGx >= 0, self.blocks), -1)

    def pool(self, newest_B: Tensor) -> Pool:
        """Where the rows of blocks are: those of the latest plan, and the newest two."""
        slots_BGN = self.slot_of_BGN[..., : self.blocks].clone()
        tail_BT = newest_B[:, None] - torch.arange(TAILS, device=newest_B.device)
        # a sequence of a single block has no other: its slot is written twice
        tail_BT = tail_BT.clamp_min(0)
        tail_BGT = tail_BT[:, None].expand(-1, slots_BGN.shape[1], -1)
        slots_BGN.scatter_(-1, tail_BGT, self.slots + tail_BGT % TAILS)
        return Pool(slots_BGN, self.block)

    def tensors(self) -> list[Tensor]:
        """The tables."""
        return [self.slot_of_BGN, self.block_of_BGS, self.wanted_at_BGS, self.clock]
