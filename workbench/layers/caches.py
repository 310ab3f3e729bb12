"""Decode caches of rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.contract import Cache


class RowCache(Cache):
    """Tensors (B, T, …) of the last ``window`` tokens; of all tokens if ``window`` is None. Allocated at once.

    ``rows`` are the tensors, in eight bits after :meth:`store_in`, and ``steps`` what their numbers are then multiplied
    by. The token at position p is row p; with a window, where the newest token replaces the
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
        self.window, self.dtype = window, dtype
        self.steps: list[Tensor | None] = [None] * len(shapes)
        """(B, T, …) without the last axis: size of a step of each row of channels; None where rows have the type of the
        cache."""
        self.rows = [torch.empty(batch, capacity, *shape, device=device, dtype=dtype) for shape in shapes]

    @property
    def capacity(self) -> int:
        """Rows of a sequence."""
        return self.rows[0].shape[1]

    @property
    def filled(self) -> int:
        """Rows in use after passes over several tokens."""
        return min(self.length, self.capacity)

    eight_bits: ClassVar[tuple[int, ...]] = ()
    """Numbers of the tensors that :meth:`store_in` changes, which what reads the rows has to support."""

    def tensors(self) -> list[Tensor]:
        return [*self.rows, *(steps for steps in self.steps if steps is not None)]

    def store_in(self, dtype: torch.dtype) -> str | None:
        if not self.eight_bits:
            return super().store_in(dtype)
        for number in self.eight_bits:
            row = self.rows[number]
            self.rows[number] = torch.empty(row.shape, device=row.device, dtype=dtype)
            self.steps[number] = torch.empty(row.shape[:-1], device=row.device, dtype=torch.float32)
        return None

    def step_bytes(self, lengths: Sequence[int]) -> float:
        return self.row_bytes(lengths)

    def row_bytes(self, lengths: Sequence[int], most: int | None = None) -> float:
        """Bytes of the rows of sequences of these lengths, of ``most`` tokens at most each. Default: all rows."""
        most = self.capacity if most is None else most
        token_bytes = sum(x[0, 0].numel() * x.itemsize for x in RowCache.tensors(self)) if self.capacity else 0
        return token_bytes * sum(min(length, most) for length in lengths)

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append T tokens to each tensor. Returns what these tokens may see: the tokens cached before, then their own.

        Raises:
            ValueError: when a cache without a window is full.
        """
        start, end, capacity = self.length, self.end_after(new[0].shape[1]), self.capacity
        if self.window is None:
            for number, x in enumerate(new):
                self._write(number, (slice(None), slice(start, end)), x)
            self.length = end
            return tuple(self._read(number, (slice(None), slice(0, end))) for number in range(len(new)))
        before = self._slots(max(0, start - self.window + 1), start)
        kept = min(end - start, capacity)
        slots = self._slots(end - kept, end)
        seen = []
        for number, x in enumerate(new):
            earlier = self._read(number, (slice(None), before))
            if self.steps[number] is not None:  # as later tokens see them
                x = from_eight_bits(*to_eight_bits(x, self.rows[number].dtype), self.dtype)
            seen.append(torch.cat((earlier, x.to(earlier.dtype)), dim=1))
            self._write(number, (slice(None), slots), x[:, x.shape[1] - kept :])
        self.length = end
        return tuple(seen)

    def end_after(self, tokens: int) -> int:
        """Length after so many further tokens.

        Raises:
            ValueError: when a cache without a window has no room for them.
        """
        end = self.length + tokens
        if self.window is None and end > self.capacity:
            raise ValueError(f"cache: got {end} tokens; expected at most {self.capacity}. Make it longer.")
        return end

    def _write(self, number: int, index: Any, x: Tensor) -> None:
        row, steps = self.rows[number], self.steps[number]
        if steps is None:
            row[index] = x.to(row.dtype)
        else:
            codes, sizes = to_eight_bits(x, row.dtype)
            row.view(torch.uint8)[index] = codes.view(torch.uint8)  # an index does not support every type of eight bits
            steps[index] = sizes

    def _read(self, number: int, index: Any) -> Tensor:
        """Rows in the type of the cache; a view where they are stored in it and the index allows one."""
        row, steps = self.rows[number], self.steps[number]
        if steps is None:
            return row[index]
        return from_eight_bits(row.view(torch.uint8)[index].view(row.dtype), steps[index], self.dtype)

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
        for number, x in enumerate(new):
            self._write(number, (sequence_B, slots_B), x[:, 0])
        return lengths_B


def to_eight_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (…, C) in int8 or float8_e4m3fn and the size of a step (…) in fp32 of (…, C): the largest magnitude over
    the largest code, one for every row of channels (ours)."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    x = x.float()
    sizes = x.abs().amax(-1) / largest
    codes = x / sizes.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return (codes.round() if dtype == torch.int8 else codes).clamp(-largest, largest).to(dtype), sizes


def from_eight_bits(codes: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that :func:`to_eight_bits` has stored."""
    return (codes.float() * sizes[..., None]).to(dtype)
