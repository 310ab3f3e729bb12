"""Caches that read a choice of their tokens, and the base of the policies that make the choice.

A policy of this kind is a configuration and a :class:`Selector`; :class:`SelectiveCache` appends, asks the selector for
positions and attends to them. Where rows are stored is the cache's matter, what is read the selector's.

Passes over several tokens (prompts) attend to everything; a pass over a single token is a decoding step. Sizes on the
path of a step depend on configuration and capacity alone, and lengths are tensors.

Legend: B sequences, T new tokens, H query heads, G groups of heads that share keys, K key channels, n chosen tokens, m
chosen units.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from workbench.contract import Cache, Mixer
from workbench.decoding.blocks import Shape
from workbench.decoding.policy import Policy, PolicyConfig
from workbench.decoding.reads import FIELDS, step_bytes
from workbench.decoding.view import View, unread, view_of
from workbench.mixers.families.latent import LatentCache
from workbench.mixers.families.softmax import KeyValueCache
from workbench.model import LanguageModel
from workbench.ops.sparse_decoding import IndexReads, new_tickets, read_numbers, tokens_of


class SelectiveConfig(PolicyConfig):
    """Fields of every policy that chooses what a layer reads."""

    dense_layers: Annotated[int, Field(ge=0)] = 0
    """First layers that read everything; Quest (arXiv 2406.10774) has 2."""


class Selection(NamedTuple):
    """What one step reads."""

    tokens_BGn: Tensor
    """Positions to attend, without duplicates, -1 for none; with ``block``, numbers of blocks."""
    units_BGm: Tensor
    """What is compared between steps: blocks, or tokens; -1 for none."""
    indices: IndexReads = IndexReads()
    """What is read of indices."""
    resident_BGr: Tensor | None = None
    """Blocks that are resident before the step beside the newest one, where the policy has a resident set; -1 for
    none."""
    block: int = 1
    """Tokens of a block, where all tokens of blocks are attended."""

    def positions(self, lengths_B: Tensor) -> Tensor:
        """Positions to attend, -1 for none."""
        return self.tokens_BGn if self.block == 1 else tokens_of(self.tokens_BGn, self.block, lengths_B)


class Selector:
    """Chooses the tokens of one layer, step by step.

    Args:
        view: of the layer.
        shape: of its cache.
        units: how many there may be in a step.
    """

    def __init__(self, view: View, shape: Shape, units: int):
        self.view, self.shape = view, shape
        self.previous_BGm = torch.full((shape[0], view.G, units), -1, device=shape[2])
        """Units of the step before."""

    looks_ahead = False
    """Whether a step searches the units of the step before, so that its own are needed by the next step only."""

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        """Take T new keys from position ``start_B`` on. Default: none are needed."""

    def observe(self, q_BHK: Tensor, lengths_B: Tensor) -> None:
        """Take the last query of a prompt, before the first step. Default: it is not needed."""

    def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
        """Choose for one query per sequence, the newest of ``lengths_B`` tokens."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """What the selector adds to a cache."""
        return [self.previous_BGm]


class SelectiveCache:
    """Base of caches that read what a selector chooses; before :class:`KeyValueCache` or :class:`LatentCache`."""

    # of the cache that this is mixed into
    rows: list[Tensor]
    length: int
    positions_B: Tensor | None
    mixer: Any
    if TYPE_CHECKING:

        @property
        def capacity(self) -> int: ...

    common: ClassVar[tuple[str, ...]] = ("tickets", "latest_read")

    def __init__(self, view: View, selector: Selector, *shape: Any):
        super().__init__(view.mixer, *shape)  # type: ignore[call-arg]
        self.view, self.selector = view, selector
        self.tickets = new_tickets(1, 1, self.rows[0].device)
        self.latest_read: Tensor | None = None
        """(F,) numbers of the latest step, :data:`workbench.decoding.reads.FIELDS`."""
        self.hit_rate: Tensor | None = None
        """Share of the units of the latest step that were resident, where the cache knows."""
        self.host_bytes: Tensor | None = None
        """Bytes that it copies from the host, per sequence, where rows are on the host."""

    def attend(self, *inputs: Tensor) -> Tensor:
        """Append T tokens and attend from their queries; arguments and result as of the mixer's own cache."""
        queries, new = inputs[:-2], inputs[-2:]
        B, T = new[0].shape[:2]
        if self.positions_B is None:
            start_B = torch.full((B,), self.length, device=new[0].device)
            rows = self.extend(*new)  # type: ignore[attr-defined]
        else:
            start_B = self.positions_B
            self.append(*new)  # type: ignore[attr-defined]
        lengths_B = start_B + T
        self.selector.append(self.view.keys(*new), start_B)
        if T > 1:
            self.latest_read = None
            self.selector.observe(self.view.queries(*(q[:, -1:] for q in queries))[:, 0], lengths_B)
            return self.mixer.attend(*queries, *rows).to(queries[0].dtype)
        q_BHK = self.view.queries(*queries)[:, 0]
        selection = self.selector.select(q_BHK, lengths_B)
        o = self.read(q_BHK, selection, lengths_B)
        self._count(selection, lengths_B)
        return o.to(queries[0].dtype)

    def read(self, q_BHK: Tensor, selection: Selection, lengths_B: Tensor) -> Tensor:
        """The output of a step, (B, 1, H, V)."""
        return self.view.read(q_BHK, self.rows, selection.tokens_BGn, selection.block, lengths_B)

    def _count(self, selection: Selection, lengths_B: Tensor) -> None:
        numbers_F = read_numbers(
            selection.tokens_BGn,
            selection.units_BGm,
            self.selector.previous_BGm,
            lengths_B,
            resident_BGr=selection.resident_BGr,
            block=selection.block,
            row_bytes=self.view.row_channels * self.rows[0].itemsize,
            index=selection.indices,
            tickets=self.tickets,
        )
        for name, number in (("hit_rate", self.hit_rate), ("host_bytes", self.host_bytes)):
            if number is not None:
                numbers_F[FIELDS.index(name)].copy_(number)
        self.latest_read = numbers_F

    def store_in(self, dtype: torch.dtype) -> str | None:
        return "the policy reads chosen tokens in the type of the model"

    def step_bytes(self, lengths: Sequence[int]) -> float:
        """Of the latest step; waits for the device."""
        if self.latest_read is None:
            return super().step_bytes(lengths)  # type: ignore[misc]
        return step_bytes(self.latest_read, len(lengths))

    def index_tensors(self) -> list[Tensor]:
        """What the policy adds to the mixer's own cache."""
        latest = [x for x in (self.latest_read, self.hit_rate, self.host_bytes) if x is not None]
        return [*self.selector.tensors(), self.tickets, *latest]

    def tensors(self) -> list[Tensor]:
        """All cached tensors."""
        return [*super().tensors(), *self.index_tensors()]  # type: ignore[misc]


class SelectiveKeyValueCache(SelectiveCache, KeyValueCache):
    """Keys and values of which a step reads a choice."""


class SelectiveLatentCache(SelectiveCache, LatentCache):
    """Latents of which a step reads a choice."""


class SelectivePolicy(Policy):
    """A policy that reads a choice of tokens in every layer that keeps all of them.

    Layers with a window keep their cache, as do mixers that choose by themselves what they read; a model without any
    other layer is refused, as the policy would change nothing.
    """

    @abstractmethod
    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        """What chooses the tokens of layer number ``layer``."""

    def cache_for(
        self, layer: int, mixer: Mixer, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> Cache:
        view = view_of(mixer)
        if view is None or layer < self.config.dense_layers:
            return mixer.new_cache(batch, length, device, dtype)
        shape = (batch, length, device, dtype)
        return self.new_cache(layer, view, self.selector(layer, view, shape), shape)

    def new_cache(self, layer: int, view: View, selector: Selector, shape: Shape) -> Cache:
        """The cache of a layer that the policy changes."""
        cls = SelectiveKeyValueCache if view.cache is KeyValueCache else SelectiveLatentCache
        return cls(view, selector, *shape)

    def layers(self, model: LanguageModel) -> list[int]:
        """Numbers of the layers that the policy changes."""
        mixers = [block.get_submodule("mixer") for block in model.blocks]
        return [n for n, mixer in enumerate(mixers) if n >= self.config.dense_layers and view_of(mixer)]  # type: ignore[arg-type]

    def check(self, model: LanguageModel) -> None:
        super().check(model)
        if not self.layers(model):
            self.refuse(model, self._unchanged)

    def _unchanged(self, layer: int, mixer: Mixer) -> str:
        if view_of(mixer) is None:
            return unread(mixer)
        return f"a layer behind the first dense_layers={self.config.dense_layers}"
