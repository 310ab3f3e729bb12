"""Tables of slots. Legend as in the package."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

TAILS = 2
"""Slots of the newest blocks, behind the others."""


class Tables(NamedTuple):
    """Which blocks have which slots: int64, with one column more than there are blocks or slots, for entries of lists
    that are not valid; its contents have no meaning."""

    slot_of_BGN: Tensor
    """(B, G, N + 1) slot of every block, -1 for none."""
    block_of_BGS: Tensor
    """(B, G, S + 1) block in every slot, -1 for none; without the slots of the newest blocks."""
    wanted_at_BGS: Tensor
    """(B, G, S + 1) when the block in a slot was wanted last."""
    clock_BG: Tensor
    """(B, G) the number of plans so far."""

    @classmethod
    def empty(cls, batch: int, groups: int, blocks: int, slots: int, device: torch.device | str) -> Self:
        """Tables of slots without blocks."""

        def full(columns: int) -> Tensor:
            return torch.full((batch, groups, columns + 1), -1, device=device)

        clock_BG = torch.zeros(batch, groups, dtype=torch.int64, device=device)
        return cls(full(blocks), full(slots), full(slots), clock_BG)
