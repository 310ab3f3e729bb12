"""What policies and caches with rows on the host have in common: the stream of copies, and how tokens are appended.

Legend: B sequences, T new tokens.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from workbench.decoding.selective import SelectivePolicy
from workbench.decoding.transfer import CopyStream, new_stream


class HostPolicy(SelectivePolicy):
    """Base of policies whose caches may have rows on the host."""

    def __init__(self, config: Any):
        super().__init__(config)
        self._streams: dict[torch.device, CopyStream] = {}

    def copy_stream(self, device: torch.device | str) -> CopyStream:
        """The stream that all layers on a device share."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._streams:
            self._streams[device] = new_stream(device)
        return self._streams[device]


class HostCache:
    """Base of caches with rows on the host; before :class:`KeyValueCache` or :class:`LatentCache`."""

    # of the cache that this is mixed into
    rows: list[Tensor]
    length: int
    positions_B: Tensor | None

    start_B: Tensor
    """(B,) position of the newest token of a step."""

    stream: CopyStream
    """Where copies run; the layers of a model share it."""

    def copy_on(self, stream: CopyStream) -> None:
        """Let copies run on ``stream``. The memory of this cache is freed after the last of them: allocators do not
        know that kernels of another stream use it, or read pinned memory."""
        self.stream = stream
        # called before the attributes are deleted; not at exit, when the device may be gone
        weakref.finalize(self, stream.finish).atexit = False

    def part(self, first: int, last: int) -> Self:
        """As :meth:`workbench.contract.Cache.part`. Copies that a part has submitted end before it is freed."""
        part: Self = super().part(first, last)  # type: ignore[misc]
        part.copy_on(self.stream)
        return part

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append T tokens to all sequences. Returns what a pass over several tokens sees.

        Raises:
            ValueError: when the cache is full.
        """
        (B, T), end = new[0].shape[:2], self.end_after(new[0].shape[1])  # type: ignore[attr-defined]
        start_B = torch.full((B,), self.length, device=self.start_B.device)
        if T == 1:
            self.append_token(new, start_B)
            seen = tuple(row[:, :end] for row in self.rows)
        else:
            seen = self.append_tokens(new, start_B)
        self.length = end
        return seen

    def append(self, *new: Tensor) -> Tensor:
        """Append the token of a step to every sequence. Returns (B,) their lengths."""
        assert self.positions_B is not None
        self.append_token(new, self.positions_B)
        return self.start_B + 1

    @abstractmethod
    def append_token(self, new: tuple[Tensor, ...], start_B: Tensor) -> None:
        """Append one token to every sequence, at these positions."""

    @abstractmethod
    def append_tokens(self, new: tuple[Tensor, ...], start_B: Tensor) -> tuple[Tensor, ...]:
        """Append several tokens to all sequences, which are equally long. Returns what they see."""
