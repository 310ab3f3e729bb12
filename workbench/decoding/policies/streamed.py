"""Dense with everything on the host: every step copies all rows of a layer, while the layers before it compute.

The baseline for policies with ``offload``. It computes what ``dense`` computes, and a step takes at least as long as a
copy of the whole cache. Two buffers on the device take turns: while a layer attends to one, the rows of the next layer
are copied into the other.

Legend: B sequences, S capacity.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from workbench.contract import Cache
from workbench.decoding.blocks import Shape
from workbench.decoding.host import HostCache, HostPolicy
from workbench.decoding.policy import policies
from workbench.decoding.reads import FIELDS
from workbench.decoding.selective import SelectiveConfig, Selector
from workbench.decoding.transfer import CopyStream, host_memory
from workbench.decoding.view import View
from workbench.mixers.families.latent import LatentCache
from workbench.mixers.families.softmax import KeyValueCache
from workbench.ops.block_transfer import store_rows

BUFFERS = 2
"""Layers whose rows are on the device at once."""


@policies.register
class Streamed(HostPolicy):
    """Every step reads everything, from the host."""

    class Config(SelectiveConfig):
        """Read everything, from the host. ``dense_layers`` stay on the device."""

        kind: Literal["streamed"] = "streamed"

    def __init__(self, config: Any):
        super().__init__(config)
        self._chain = Chain()

    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        return Selector(view, shape, 0)  # nothing is chosen

    def new_cache(self, layer: int, view: View, selector: Selector, shape: Shape) -> Cache:
        if layer <= self._chain.layer:  # the first cache of further sequences
            self._chain = Chain()
        cls = StreamedKeyValueCache if view.cache is KeyValueCache else StreamedLatentCache
        cache = cls(view, self._chain, self.copy_stream(shape[2]), *shape)
        self._chain.add(layer, cache)
        return cache


class Chain:
    """The layers that share buffers, in the order in which they attend."""

    def __init__(self) -> None:
        self.layer = -1
        """The newest one."""
        self.caches: list[Any] = []
        self.buffers: list[list[Tensor]] = []
        self.marks: dict[int, Any] = {}
        """Number of a cache -> mark of the copy that brings its rows."""

    def add(self, layer: int, cache: Any) -> None:
        """Add the cache of a layer."""
        self.layer = layer
        self.caches.append(cache)

    def after(self, number: int) -> int:
        """The next cache whose buffer is that of cache ``number``."""
        following = [(number + i) % len(self.caches) for i in range(1, len(self.caches) + 1)]
        return next(other for other in following if other % BUFFERS == number % BUFFERS)


class StreamedCache(HostCache):
    """Base of caches with rows on the host; before :class:`KeyValueCache` or :class:`LatentCache`.

    Args:
        view: of the layer.
        chain: the layers before this one.
        stream: where copies run.
        shape: of the cache.
    """

    capacity: int  # of the cache that this is mixed into

    def __init__(self, view: View, chain: Chain, stream: CopyStream, *shape: Any):
        batch, length, device, dtype = shape
        super().__init__(view.mixer, 0, length, device, dtype)  # type: ignore[call-arg]
        sizes = [(batch, length, *row.shape[2:]) for row in self.rows]
        self.copy_on(stream)
        self.view, self.number = view, len(chain.caches)
        self.chain = lambda: chain  # layers do not own one another's memory
        self.host = [host_memory(*size, dtype=dtype, device=device) for size in sizes]
        if self.number < BUFFERS:
            chain.buffers.append([torch.empty(*size, dtype=dtype, device=device) for size in sizes])
        self.rows = chain.buffers[self.number % BUFFERS]
        self.start_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.latest_read: Tensor | None = None
        """(F,) numbers of the latest step, :data:`workbench.decoding.reads.FIELDS`."""

    def attend(self, *inputs: Tensor) -> Tensor:
        """Append T tokens and attend from their queries; arguments and result as of the mixer's own cache."""
        o = super().attend(*inputs)  # type: ignore[misc]
        if inputs[0].shape[1] == 1:
            chain = self.chain()
            other = chain.caches[chain.after(self.number)]
            chain.marks[other.number] = other.bring()
            if self.number == len(chain.caches) - 1 and o.is_cuda and torch.cuda.is_current_stream_capturing():
                self.stream.wait(chain.marks[other.number])  # a graph ends with all of its work
                chain.marks.clear()
                chain.marks.update(dict.fromkeys(range(min(BUFFERS, len(chain.caches)))))
        return o

    def append_tokens(self, new: tuple[Tensor, ...], start_B: Tensor) -> tuple[Tensor, ...]:
        end = self.length + new[0].shape[1]
        self.chain().marks.clear()  # the buffers have other sequences, or an earlier state
        if self.length:
            self.stream.wait(self.bring())
        for row, x in zip(self.rows, new, strict=True):
            row[:, self.length : end] = x
        self._store(new, start_B, start_B + new[0].shape[1])
        return tuple(row[:, :end] for row in self.rows)

    def append_token(self, new: tuple[Tensor, ...], start_B: Tensor) -> None:
        marks = self.chain().marks
        mark = marks.pop(self.number) if self.number in marks else self.bring()
        if mark is not None:
            self.stream.wait(mark)
        self.start_B.copy_(start_B)
        sequence_B = torch.arange(len(start_B), device=start_B.device)
        for row, x in zip(self.rows, new, strict=True):
            row[sequence_B, self.start_B] = x[:, 0].to(row.dtype)
        lengths_B = self.start_B + 1
        self._store(new, self.start_B, lengths_B)
        numbers = dict.fromkeys(FIELDS, torch.full((), torch.nan, device=start_B.device, dtype=torch.float64))
        row_bytes = sum(host[0, 0].nbytes for host in self.host)
        tokens = lengths_B.double().mean()
        numbers |= {"tokens": tokens, "bytes": tokens * row_bytes, "dense_bytes": tokens * row_bytes}
        numbers |= {"hit_rate": tokens * 0, "host_bytes": tokens * 0 + self.capacity * row_bytes}
        self.latest_read = torch.stack([numbers[name] for name in FIELDS])

    def _store(self, new: tuple[Tensor, ...], start_B: Tensor, lengths_B: Tensor) -> None:
        """Write new rows to the host."""
        rows = [x.to(host.dtype).flatten(2)[:, :, None].contiguous() for x, host in zip(new, self.host, strict=True)]
        targets = [host.flatten(2)[:, None, None] for host in self.host]

        def work() -> None:
            for x, target in zip(rows, targets):
                store_rows(x, target, start_B, lengths_B)

        self.stream.submit(work, *rows, start_B, lengths_B)

    def bring(self) -> Any:
        """Copy all rows to the device. Returns the mark of the copy."""

        def work() -> None:
            for row, host in zip(self.rows, self.host):
                row.copy_(host, non_blocking=True)

        return self.stream.submit(work)

    def store_in(self, dtype: torch.dtype) -> str | None:
        return "rows are on the host in the type of the model"

    def host_tensors(self) -> list[Tensor]:
        """What is on the host."""
        return self.host

    def tensors(self) -> list[Tensor]:
        """All cached tensors; layers share buffers."""
        latest = [] if self.latest_read is None else [self.latest_read]
        return [*self.rows, *self.host, self.start_B, *latest]


class StreamedKeyValueCache(StreamedCache, KeyValueCache):
    """Keys and values on the host."""


class StreamedLatentCache(StreamedCache, LatentCache):
    """Latents on the host."""
