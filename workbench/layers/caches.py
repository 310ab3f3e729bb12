"""Decode caches of rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.contract import Cache


class RowCache(Cache):
    """Tensors (B, T, …) of the last ``window`` tokens; of all tokens if ``window`` is None. Allocated at once.

    ``rows`` are the tensors. The token at position p is row p; with a window, where the newest token replaces the
    oldest one, row p mod w.

    Args:
        batch: sequences B.
        length: most tokens of a sequence.
        shapes: shape of one token in each tensor.
        window: w, tokens that a query sees, its own included.
    """

    ragged = True

    def __init__(
        self,
        batch: int,
        length: int,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device | str,
        dtype: torch.dtype,
        window: int | None = None,
    ):
        capacity = length if window is None else min(window, length)
        self.window = window
        self.rows = [torch.empty(batch, capacity, *shape, device=device, dtype=dtype) for shape in shapes]

    @property
    def capacity(self) -> int:
        """Rows of a sequence."""
        return self.rows[0].shape[1]

    @property
    def filled(self) -> int:
        """Rows in use after passes over several tokens."""
        return min(self.length, self.capacity)

    def tensors(self) -> list[Tensor]:
        return self.rows

    def step_bytes(self, lengths: Sequence[int]) -> float:
        return self.bytes_of_tokens(lengths, self.capacity)

    def bytes_of_tokens(self, lengths: Sequence[int], most: int) -> float:
        """Bytes of the tokens of sequences of these lengths, of ``most`` at most each."""
        token_bytes = sum(row[0, 0].numel() * row.itemsize for row in self.rows) if self.capacity else 0
        return token_bytes * sum(min(length, most) for length in lengths)

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append T tokens to each tensor. Returns what these tokens may see: the tokens cached before, then their own.

        Raises:
            ValueError: when a cache without a window is full.
        """
        start, end, capacity = self.length, self.length + new[0].shape[1], self.capacity
        if self.window is None:
            if end > capacity:
                raise ValueError(f"cache: got {end} tokens; expected at most {capacity}. Make it longer.")
            for row, x in zip(self.rows, new, strict=True):
                row[:, start:end] = x
            self.length = end
            return tuple(row[:, :end] for row in self.rows)
        before = self._slots(max(0, start - self.window + 1), start)
        seen = tuple(torch.cat((row[:, before], x.to(row.dtype)), dim=1) for row, x in zip(self.rows, new, strict=True))
        kept = min(end - start, capacity)
        slots = self._slots(end - kept, end)
        for row, x in zip(self.rows, new):
            row[:, slots] = x[:, x.shape[1] - kept :].to(row.dtype)
        self.length = end
        return seen

    def _slots(self, first: int, last: int) -> Tensor:
        """Rows of the positions ``first`` to ``last - 1``."""
        return torch.arange(first, last, device=self.rows[0].device) % self.capacity

    def append(self, *new: Tensor) -> Tensor:
        """Append the token of a step to each tensor, (B, 1, …). Returns (B,) how many rows its query sees, which are
        the first ones, in any order."""
        assert self.positions_B is not None
        lengths_B, slots_B = self.positions_B + 1, self.positions_B
        if self.window is not None:
            lengths_B, slots_B = lengths_B.clamp_max(self.window), slots_B % self.capacity
        sequence_B = torch.arange(len(slots_B), device=slots_B.device)
        for row, x in zip(self.rows, new, strict=True):
            row[sequence_B, slots_B] = x[:, 0].to(row.dtype)
        return lengths_B
