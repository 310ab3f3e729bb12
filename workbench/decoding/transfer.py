"""Copies beside the computation: a stream of its own, ordered with the computation by events, and what copies blocks.

Legend as in :mod:`workbench.ops.block_transfer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.decoding.residency import Copies
from workbench.ops.block_transfer import fetch_blocks

Method = Literal["kernel", "gather", "blocks"]
"""How blocks are copied from pinned memory: by a kernel that reads it, by one copy of what the CPU has gathered, or by
one copy per block. The last two need the numbers of the blocks on the host, which waits for the selection."""


class CopyStream(ABC):
    """Where copies run. Everything that is submitted runs in order."""

    @abstractmethod
    def submit(self, work: Callable[[], None], *crossing: Tensor) -> Any:
        """Run ``work`` after everything that was computed so far. Returns a mark for :meth:`wait`; whoever has it keeps
        the tensors of the work alive.

        Args:
            crossing: tensors that the work uses and that should be freed as soon as it has run.
        """

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Let the computation wait, on the device, for the work of ``mark`` and for all before it."""

    @abstractmethod
    def finish(self) -> None:
        """Wait, on the host, for everything that was submitted, in replayed graphs too: memory that it uses may be
        freed afterwards. Caches keep this method until they are freed, so it must not lead to them."""


class DeviceStream(CopyStream):
    """A CUDA stream.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device | str):
        self.stream = torch.cuda.Stream(device)
        self.timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        """Begin and end of every work, once set to a list."""
        self.delay = 0
        """Clock cycles that the stream sleeps before every work, for tests."""

    def submit(self, work: Callable[[], None], *crossing: Tensor) -> tuple[torch.cuda.Event, bool, Callable[[], None]]:
        computed, done = torch.cuda.Event(), torch.cuda.Event(enable_timing=self.timed is not None)
        computed.record()
        self.stream.wait_event(computed)
        with torch.cuda.stream(self.stream):
            if self.delay:
                torch.cuda._sleep(self.delay)
            if self.timed is not None:
                begin = torch.cuda.Event(enable_timing=True)
                begin.record()
                self.timed.append((begin, done))
            work()
            done.record()
        for tensor in crossing:
            tensor.record_stream(self.stream)
        return done, torch.cuda.is_current_stream_capturing(), work

    def wait(self, mark: tuple[torch.cuda.Event, bool, Callable[[], None]]) -> None:
        done, is_captured, _ = mark
        # work from outside a graph has ended before its capture begins, and a graph ends with all of its work
        if is_captured == torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().wait_event(done)

    def finish(self) -> None:
        # The whole device, since copies of a replayed graph are ordered by the stream that replays it. While a graph is
        # captured nothing is under way: the capture begins with a synchronisation.
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.stream.device)


class DeferredStream(CopyStream):
    """A stream for tensors of the CPU: work runs when the computation waits for it, as late as it may.

    What reads the target of a copy without waiting finds what was there before.
    """

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.finished = 0

    def submit(self, work: Callable[[], None], *crossing: Tensor) -> int:
        self.queue.append(work)
        return self.finished + len(self.queue)

    def wait(self, mark: int) -> None:
        while self.finished < mark:
            self.queue.pop(0)()
            self.finished += 1

    @staticmethod
    def finish() -> None:
        """Nothing to wait for: work in the queue keeps its tensors."""


def new_stream(device: torch.device | str) -> CopyStream:
    """The copy stream for caches on ``device``."""
    return DeviceStream(device) if torch.device(device).type == "cuda" else DeferredStream()


def host_memory(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory of the host that ``device`` can address: pinned for a GPU."""
    return torch.empty(*shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")


class Memory:
    """The blocks of one layer on the host, and its slots on the device.

    Args:
        method: how blocks are copied; see :data:`Method`.
        host_BGNbX: all blocks, pinned.
        hot_BGSbX: the slots.
        entries: most copies at once, per sequence and group.
    """

    common = ("staging",)

    def __init__(self, method: Method, host_BGNbX: Tensor, hot_BGSbX: Tensor, entries: int):
        self.method, self.host_BGNbX, self.hot_BGSbX = method, host_BGNbX, hot_BGSbX
        self.staging: list[Tensor] = []
        """On the host and on the device, where the CPU gathers blocks."""
        if method == "gather":
            size = host_BGNbX.shape[0] * host_BGNbX.shape[1] * entries, *host_BGNbX.shape[3:]
            pinned = host_memory(*size, dtype=host_BGNbX.dtype, device=hot_BGSbX.device)
            self.staging = [pinned, torch.empty_like(pinned, device=hot_BGSbX.device)]
        self._left: Any = None

    def fetch(self, copies: Copies) -> None:
        """Copy blocks into slots, on the current stream."""
        host, hot = self.host_BGNbX, self.hot_BGSbX
        if self.method == "kernel":
            fetch_blocks(host, hot, copies.blocks_BGm, copies.slots_BGm)
            return
        # the numbers wait for the selection; nothing else on the device does
        blocks_BGm, slots_BGm = torch.stack((copies.blocks_BGm, copies.slots_BGm)).cpu()
        where = (blocks_BGm >= 0).nonzero(as_tuple=True)
        (sequence, group, _), block, slot = where, blocks_BGm[where], slots_BGm[where]
        if self.method == "blocks":
            for b, g, n, s in zip(sequence.tolist(), group.tolist(), block.tolist(), slot.tolist()):
                hot[b, g, s].copy_(host[b, g, n], non_blocking=True)
        elif count := len(block):
            pinned, landed = self.staging
            if self._left is not None:
                self._left.synchronize()  # the copy before has left the buffer
            number = sequence * host.shape[1] + group
            torch.index_select(host.flatten(0, 2), 0, number * host.shape[2] + block, out=pinned[:count])
            landed[:count].copy_(pinned[:count], non_blocking=True)
            if landed.is_cuda:
                self._left = torch.cuda.Event()
                self._left.record()
            target = (number * hot.shape[2] + slot).to(hot.device)
            hot.flatten(0, 2).index_copy_(0, target, landed[:count])

    def host_tensors(self) -> list[Tensor]:
        """What is on the host."""
        return [self.host_BGNbX, *self.staging[:1]]

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [self.host_BGNbX, self.hot_BGSbX, *self.staging]


@contextmanager
def timed(stream: CopyStream) -> Iterator[Callable[[], float]]:
    """Measures how long the work of a stream takes; gives a function that returns the milliseconds so far, after
    waiting for the device. 0 on a CPU."""
    if not isinstance(stream, DeviceStream):
        yield lambda: 0.0
        return
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    stream.timed = pairs

    def milliseconds() -> float:
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs)

    try:
        yield milliseconds
    finally:
        stream.timed = None
