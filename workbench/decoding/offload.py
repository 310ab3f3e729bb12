"""Caches whose rows are on the host: a step copies the blocks that it lacks, beside the computation.

A layer has all rows in pinned memory of the host, blocks of the tokens of one group one after the other, and a few of
these blocks in slots on the device. Indices stay on the device. A policy with ``offload`` brings its blocks in at every
step (AsyncTLS, arXiv 2604.07815, §4):

    synchronous   M_t is copied, then searched:              select, copy, attend
    lagged        M_t is copied for the step that follows:   select, attend, copy beside the layers that follow

with only those blocks copied that no slot has (``transfer: incremental``), or all of them (``full``). In both cases a
step computes bit by bit what it computes with all rows on the device.

Order of one layer, on two streams (events, no wait of the host):

    computation   … wait for the copies of the step before · new row into its slot · select · attend · plan ·  …
    copies                                                                                          └ blocks, new row

A copy starts when the layer has attended, so no slot that is read is written, and as many slots suffice as there are
blocks in M_t. In a captured CUDA graph the last layer waits for the copies of all layers, as a graph has to end where
it began: the copies of a step then run beside the later layers of the same step only.

Legend: B sequences, T new tokens, G groups of heads that share keys, X numbers of a token's row, N blocks, S slots, b
tokens of a block, m chosen blocks, n chosen tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import Config, require
from workbench.contract import Cache
from workbench.decoding.blocks import Shape
from workbench.decoding.host import HostCache, HostPolicy
from workbench.decoding.residency import TAILS, Residency
from workbench.decoding.selective import Selection, SelectiveCache, SelectiveConfig, Selector
from workbench.decoding.transfer import CopyStream, Memory, Method, host_memory
from workbench.decoding.view import View
from workbench.mixers.families.latent import LatentCache
from workbench.mixers.families.softmax import KeyValueCache
from workbench.model import LanguageModel
from workbench.ops.block_transfer import fetch_blocks, store_rows, store_tails


class OffloadConfig(Config):
    """Rows on the host, a few blocks on the device."""

    resident: Literal["exact", "lru"] = "exact"
    """Blocks that stay on the device: those of the latest choice, as in the paper, or those that were chosen most
    recently, as many as there are slots."""
    slots: Annotated[int | None, Field(ge=1)] = None
    """Blocks per sequence and group of heads that have a slot, with lru. Default: twice as many as a step chooses."""
    transfer: Literal["incremental", "full"] = "incremental"
    """Whether a step copies the blocks that are not resident, or all that it chose."""
    method: Method = "kernel"
    """How blocks are copied (:data:`workbench.decoding.transfer.Method`)."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.slots is None or self.resident == "lru",
            "slots",
            got=f"{self.slots} with resident: {self.resident}",
            expected="resident: lru; exact has as many slots as a step chooses blocks",
        )
        require(
            self.transfer == "incremental" or self.resident == "exact",
            "transfer",
            got=f"{self.transfer} with resident: {self.resident}",
            expected="incremental, as blocks that are copied again need not stay",
        )


class OffloadableConfig(SelectiveConfig):
    """Fields of policies that choose blocks, which may be on the host."""

    offload: OffloadConfig | None = None
    """Keep rows on the host, and the blocks of a step on the device: {} with defaults. Default: all on the device."""


class OffloadablePolicy(HostPolicy):
    """A policy whose selectors choose blocks; its configuration is an :class:`OffloadableConfig` with ``block``."""

    _last_layer: int = -1

    def prepare(self, model: LanguageModel) -> None:
        super().prepare(model)
        self._last_layer = max(self.layers(model))

    def graph_obstacle(self) -> str | None:
        offload = self.config.offload
        if offload is None or offload.method == "kernel":
            return super().graph_obstacle()
        return f"offload.method {offload.method!r} needs the numbers of blocks on the host; method kernel does not"

    def new_cache(self, layer: int, view: View, selector: Selector, shape: Shape) -> Cache:
        if self.config.offload is None:
            return super().new_cache(layer, view, selector, shape)
        cls = OffloadedKeyValueCache if view.cache is KeyValueCache else OffloadedLatentCache
        stream = self.copy_stream(shape[2])
        return cls(self.config.offload, self.config.block, stream, layer == self._last_layer, view, selector, *shape)


class OffloadedCache(HostCache, SelectiveCache):
    """Base of caches with rows on the host; before :class:`KeyValueCache` or :class:`LatentCache`.

    Args:
        config: of the offload.
        block: tokens of a block.
        stream: where copies run; the layers of a model share it.
        is_last: whether this is the last layer of the model with such a cache.
        view, selector, shape: as of :class:`SelectiveCache`.
    """

    common = (*SelectiveCache.common, "hit_rate", "host_bytes")

    def __init__(
        self,
        config: OffloadConfig,
        block: int,
        stream: CopyStream,
        is_last: bool,
        view: View,
        selector: Selector,
        *shape: Any,
    ):
        batch, length, device, dtype = shape
        super().__init__(view, selector, 0, length, device, dtype)  # rows are not on the device
        self.copy_on(stream)
        self.block, self.is_last = block, is_last
        chosen, blocks = selector.previous_BGm.shape[-1], -(-length // block)
        slots = min(blocks, chosen if config.resident == "exact" else max(chosen, config.slots or 2 * chosen))
        rule = {"keep": config.resident == "lru", "reuse": config.transfer == "incremental"}
        self.residency = Residency(batch, view.G, blocks, slots, block, device, **rule)
        X = view.row_channels
        host_BGNbX = host_memory(batch, view.G, blocks, block, X, dtype=dtype, device=device)
        # what no copy has filled is not read
        hot_BGSbX = torch.empty(batch, view.G, slots + TAILS, block, X, dtype=dtype, device=device)
        self.memory = Memory(config.method, host_BGNbX, hot_BGSbX, chosen)
        self.new_BTGX = torch.empty(batch, 1, view.G, X, dtype=dtype, device=device)
        self.start_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.has_choice = False
        """Whether the blocks that the next step searches are on their way."""
        self._mark: Any = None

    # -- new tokens ----------------------------------------------------------------------------------------------

    def append_token(self, new: tuple[Tensor, ...], start_B: Tensor) -> None:
        self._wait()  # for the copies of the step before, which read what is overwritten
        self.start_B.copy_(start_B)
        self.new_BTGX.copy_(self._packed(new))
        store_tails(self.new_BTGX, self.memory.hot_BGSbX, self.start_B)

    def append_tokens(self, new: tuple[Tensor, ...], start_B: Tensor) -> tuple[Tensor, ...]:
        self._wait()
        self.has_choice = False
        packed_BTGX, lengths_B = self._packed(new), start_B + new[0].shape[1]
        seen = self._seen(packed_BTGX)
        store_tails(packed_BTGX, self.memory.hot_BGSbX, start_B)
        host_BGNbX = self.memory.host_BGNbX
        stored = packed_BTGX, host_BGNbX, start_B, lengths_B
        self.stream.submit(lambda: store_rows(*stored), packed_BTGX, start_B, lengths_B)
        self._mark = self.stream.submit(_nothing)  # the mark of the rows would keep them
        return seen

    def _packed(self, new: tuple[Tensor, ...]) -> Tensor:
        return self.view.packed(*new).to(self.new_BTGX.dtype)

    def _seen(self, packed_BTGX: Tensor) -> tuple[Tensor, ...]:
        """Rows of all tokens, in the form of the mixer's cache."""
        rows_BSGX = packed_BTGX
        if self.length:
            B, T, G, X = packed_BTGX.shape
            blocks = -(-(self.length + T) // self.block)
            number_BGN = torch.arange(blocks, device=packed_BTGX.device).expand(B, G, -1).contiguous()
            whole_BGNbX = packed_BTGX.new_empty(B, G, blocks, self.block, X)
            fetch_blocks(self.memory.host_BGNbX, whole_BGNbX, number_BGN, number_BGN)
            rows_BSGX = whole_BGNbX.flatten(2, 3).transpose(1, 2)[:, : self.length + T].contiguous()
            rows_BSGX[:, self.length :] = packed_BTGX
        unpacked = self.view.unpacked(rows_BSGX)
        return tuple(row[:, :, : like.shape[2]] for row, like in zip(unpacked, self.rows))  # what groups share, once

    # -- steps ---------------------------------------------------------------------------------------------------

    def read(self, q_BHK: Tensor, selection: Selection, lengths_B: Tensor) -> Tensor:
        newest_B, looks_ahead = (lengths_B - 1) // self.block, self.selector.looks_ahead
        self.host_bytes = torch.zeros((), device=newest_B.device)
        if not (looks_ahead and self.has_choice):  # every step that does not look ahead, and the first after a prompt
            self._bring(self._searched(selection), newest_B, store=not looks_ahead)
            self._wait()
        memory, pool = self.memory, self.residency.pool(newest_B)
        packed_BSGX = memory.hot_BGSbX.flatten(2, 3).transpose(1, 2)
        o = self.view.read_packed(q_BHK, packed_BSGX, selection.tokens_BGn, selection.block, lengths_B, pool)
        if looks_ahead:
            self._bring(selection.units_BGm, lengths_B // self.block, store=True)
            self.has_choice = True
            if self.is_last and q_BHK.is_cuda and torch.cuda.is_current_stream_capturing():
                self._wait()  # for the copies of all layers, which are on one stream
        return o

    def _searched(self, selection: Selection) -> Tensor:
        """The blocks that the chosen tokens are in."""
        before = selection.resident_BGr
        if before is None:
            return selection.units_BGm
        before_BGm = before[..., : selection.units_BGm.shape[-1]]  # beside the newest block, which is on the device
        return torch.where(before_BGm[..., :1] < 0, selection.units_BGm, before_BGm)

    def _bring(self, blocks_BGm: Tensor, newest_B: Tensor, *, store: bool) -> None:
        """Copy blocks onto the device, beside what is computed next; with ``store``, the new row to the host first."""
        copies = self.residency.plan(blocks_BGm, newest_B)
        memory, lengths_B = self.memory, self.start_B + 1
        self.hit_rate = copies.hit_rate
        assert self.host_bytes is not None
        self.host_bytes = self.host_bytes + copies.copied * (memory.host_BGNbX[0, 0, 0].nbytes / len(newest_B))

        def work() -> None:
            if store:
                store_rows(self.new_BTGX, memory.host_BGNbX, self.start_B, lengths_B)
            memory.fetch(copies)

        self._mark = self.stream.submit(work)

    def _wait(self) -> None:
        if self._mark is not None:
            self.stream.wait(self._mark)
        self._mark = None

    # -- tensors -------------------------------------------------------------------------------------------------

    def host_tensors(self) -> list[Tensor]:
        """What is on the host."""
        return self.memory.host_tensors()

    def index_tensors(self) -> list[Tensor]:
        return [*super().index_tensors(), *self.residency.tensors(), self.start_B]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.memory.tensors(), self.new_BTGX]


def _nothing() -> None: ...


class OffloadedKeyValueCache(OffloadedCache, KeyValueCache):
    """Keys and values on the host."""


class OffloadedLatentCache(OffloadedCache, LatentCache):
    """Latents on the host."""
