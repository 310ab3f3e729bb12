"""Decode caches of rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.contract import Cache


class RowCache(Cache):
    """Tensors (B, T, …) of the last ``keep`` tokens; of all tokens if ``keep`` is None. Allocated at once.

    ``rows`` are the tensors, of which the first ``filled`` tokens are in use.

    Args:
        batch: sequences B.
        length: most tokens of a sequence.
        shapes: shape of one token in each tensor.
        keep: window size in tokens.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device | str,
        dtype: torch.dtype,
        keep: int | None = None,
    ):
        capacity = length if keep is None else min(keep, length)
        self.keep, self.length, self.filled = keep, 0, 0
        self.rows = [torch.empty(batch, capacity, *shape, device=device, dtype=dtype) for shape in shapes]

    def tensors(self) -> list[Tensor]:
        return self.rows

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append T tokens to each tensor. Returns what these tokens may see: the tokens cached before, then their own.

        Raises:
            ValueError: when a cache without a window is full.
        """
        T, capacity = new[0].shape[1], self.rows[0].shape[1]
        if self.keep is None:
            if self.filled + T > capacity:
                raise ValueError(f"cache: got {self.filled + T} tokens; expected at most {capacity}. Make it longer.")
            for row, x in zip(self.rows, new, strict=True):
                row[:, self.filled : self.filled + T] = x
            self.filled += T
            seen = tuple(row[:, : self.filled] for row in self.rows)
        else:
            seen = tuple(
                torch.cat((row[:, : self.filled], x.to(row.dtype)), dim=1)
                for row, x in zip(self.rows, new, strict=True)
            )
            self.filled = min(capacity, self.filled + T)
            for row, x in zip(self.rows, seen):
                row[:, : self.filled] = x[:, x.shape[1] - self.filled :]
        self.length += T
        return seen
