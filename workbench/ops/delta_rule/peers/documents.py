"""Packed documents as sequences of their own, the form that other packages take.

Legend: B batch, T time, H heads, K key channels, V value channels, N sequences of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """The documents of all rows, one after the other; without documents the rows.

    Counting documents synchronises with the device.

    Args:
        segments: (B, T) document numbers.
        state_BHKV: state before the first token of each row.
    """

    def __init__(self, segments: Tensor | None, state_BHKV: Tensor | None):
        self.ends_N1: Tensor | None = None
        """(N + 1) the position of every first token among all rows, and their length; None without documents."""
        self.state_NHKV = None if state_BHKV is None else state_BHKV.float()
        self.last_B: Tensor | slice = slice(None)
        """The last sequence of each row, whose final state is returned."""
        if segments is None:
            return
        starts_BT = torch.ones_like(segments, dtype=torch.bool)
        starts_BT[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts_N = starts_BT.flatten().nonzero()[:, 0]
        self.ends_N1 = torch.cat((starts_N, starts_N.new_tensor([segments.numel()])))
        last_B = starts_BT.sum(1).cumsum(0) - 1
        self.last_B = last_B
        if self.state_NHKV is not None:
            first_B = torch.cat((last_B.new_zeros(1), last_B[:-1] + 1))
            empty = self.state_NHKV.new_zeros(len(starts_N), *self.state_NHKV.shape[1:])
            self.state_NHKV = empty.index_copy(0, first_B, self.state_NHKV)

    def one_row(self, x_BT: Tensor) -> Tensor:
        """(B, T, …) -> (1, B·T, …) where there are documents."""
        return x_BT if self.ends_N1 is None else x_BT.flatten(0, 1)[None]
