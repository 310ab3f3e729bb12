"""Hierarchical search of a learned index: blocks first, then tokens inside them (HISA, arXiv 2603.28458v2).

    J_b = Σ over sub-blocks n of b of Σ_j w_j ReLU(q_j · mean_n)    mean_n the mean index key
    M_t = the best blocks; those of the first and of the newest token first
    S_t = the tokens in M_t with the largest index scores Σ_j w_j ReLU(q_j · k_s), as many as the layer attends

Where M_t is every block, the step is the layer's own, and up to ``top_k`` tokens it is dense. What is attended is the
layer's; the policy changes how it is found: of N blocks, N means are scored and not all tokens.

Published by HISA: one mean per block, blocks of 128 tokens, 64 of them, the first and the last always among them, no
training. LSA (arXiv 2608.01662v1, hierarchical indexing) sums over sub-blocks of 8 (``sub_block: 8``), has 1,024 blocks
of 128 (``candidates: 131072``) and leaves the first four indices as they are (``flat_layers``); it searches prompts so,
and steps in full. Ours: the first and the newest block are two of the ``candidates``; blocks that overlap tokens that
the layer always selects come first as well; prompts are searched in full.

Legend: B sequences, T new tokens, N sub-blocks, J index heads, X index channels, m chosen blocks, n selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.contract import Cache, Mixer
from workbench.decoding.blocks import MeanKeys
from workbench.decoding.policy import Policy, PolicyConfig, policies
from workbench.decoding.reads import step_bytes
from workbench.mixers.families.indexed import IndexedCache, LearnedIndex
from workbench.model import LanguageModel
from workbench.ops.sparse_decoding import (
    Forced,
    IndexReads,
    Searched,
    indexer_blocks,
    indexer_tokens,
    new_tickets,
    read_numbers,
)
from workbench.ops.token_index import IndexKeys


@policies.register
class Hierarchical(Policy):
    """The best tokens of a learned index inside its best blocks."""

    conformance_cases = (
        {"candidates": 20, "block": 4},
        {"candidates": 24, "block": 4, "sub_block": 2},
        {"candidates": 20, "block": 4, "sub_block": 1, "flat_layers": 1},
    )
    everything: ClassVar[dict[str, Any]] = {"candidates": 4096}

    class Config(PolicyConfig):
        """The best tokens of a learned index inside its best blocks."""

        kind: Literal["hierarchical"] = "hierarchical"
        candidates: Annotated[int, Field(ge=1)] = 8192
        """Tokens of the blocks that are searched; at least as many as a layer attends."""
        block: Annotated[int, Field(ge=1)] = 128
        """Tokens of a block."""
        sub_block: Annotated[int | None, Field(ge=1)] = None
        """Tokens of a sub-block, a divisor of ``block``; LSA has 8. Default: those of a block, as in HISA."""
        flat_layers: Annotated[int, Field(ge=0)] = 0
        """First layers of the model whose index is searched in full."""

        def model_post_init(self, _context: Any) -> None:
            require(
                self.block % self.means_of == 0,
                "sub_block",
                got=self.sub_block,
                expected=f"a divisor of block={self.block}",
            )
            require(
                self.candidates % self.block == 0,
                "candidates",
                got=self.candidates,
                expected=f"a multiple of block={self.block}",
            )

        @property
        def means_of(self) -> int:
            """Tokens of a mean."""
            return self.block if self.sub_block is None else self.sub_block

    def cache_for(
        self, layer: int, mixer: Mixer, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> Cache:
        if layer < self.config.flat_layers or not _has_index(mixer):
            return mixer.new_cache(batch, length, device, dtype)
        return HierarchicalCache(self.config, mixer, batch, length, device, dtype)

    def check(self, model: LanguageModel) -> None:
        super().check(model)
        self.refuse(model, self._too_few)
        mixers = [block.get_submodule("mixer") for block in model.blocks]
        if not any(_has_index(mixer) for mixer in mixers[self.config.flat_layers :]):  # type: ignore[arg-type]
            self.refuse(model, self._unchanged)

    def _too_few(self, layer: int, mixer: Any) -> str | None:
        if layer < self.config.flat_layers or not _has_index(mixer):
            return None
        block, (sink, local) = self.config.block, _forced_blocks(mixer.forced_tokens)
        forced = -(-sink // block) + (local + block - 2) // block + 1
        least = max(-(-mixer.top_k // block), forced) * block
        if self.config.candidates >= least:
            return None
        return (
            f"candidates of at least {least}: the layer attends top_k={mixer.top_k} tokens, "
            f"and {forced} blocks of {block} are always searched"
        )

    def _unchanged(self, layer: int, mixer: Mixer) -> str:
        if not _has_index(mixer):
            return "attention to tokens that a learned index of the layer selects (dsa, lsa, or these on latents)"
        return f"a layer behind the first flat_layers={self.config.flat_layers}"


class HierarchicalCache(IndexedCache):
    """What is attended and index keys, with the means of these.

    Args:
        config: of the policy.
        mixer: a layer with an index of its own.
        shape: of the cache.
    """

    common = ("tickets", "latest_read")

    def __init__(self, config: Any, mixer: Any, *shape: Any):
        X, (batch, length, device, dtype) = mixer.index.X, shape
        super().__init__(batch, length, mixer.row_shapes(), [(X,)], mixer.top_k, device, dtype)
        self.block, self.per = config.block, config.block // config.means_of
        blocks = -(-length // self.block)
        self.count = min(config.candidates // self.block, blocks)
        self.means = MeanKeys(shape, 1, X, blocks * self.per, config.means_of)
        self.previous_B1m = torch.full((batch, 1, self.count), -1, device=device)
        """Blocks of the step before."""
        self.tickets = new_tickets(batch, 1, device)
        self.latest_read: Tensor | None = None
        """(F,) numbers of the latest step, :data:`workbench.decoding.reads.FIELDS`."""

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        start_B = torch.full((len(new[0]),), self.length, device=new[0].device)
        seen = super().extend(*new)
        self.means.append(new[-1][:, :, None], start_B)
        self.latest_read = None
        return seen

    def append(self, *new: Tensor) -> Tensor:
        lengths_B = super().append(*new)
        self.means.append(new[-1][:, :, None], lengths_B - 1)
        return lengths_B

    def select(self, index: IndexKeys, lengths_B: Tensor, forced: Forced) -> Tensor:
        k_B1SX, means_B1NX = self.rows[-1][:, None], self.means.means
        query = index.q_BTJX[:, 0], index.w_BTJ[:, 0]
        blocks_B1m = indexer_blocks(
            *query,
            means_B1NX,
            lengths_B,
            block=self.block,
            sub_block=self.means.sub_block,
            count=self.count,
            forced=_forced_blocks(forced),
            tickets=self.tickets,
        )
        searched = Searched(blocks_B1m, None, self.block, newest=False)
        settings: dict[str, Any] = {"count": self.top_k, "forced": forced, "tickets": self.tickets}
        tokens_B1n = indexer_tokens(*query, k_B1SX, lengths_B, searched=searched, **settings)
        key_bytes = k_B1SX.shape[-1] * k_B1SX.itemsize
        self.latest_read = read_numbers(
            tokens_B1n,
            blocks_B1m,
            self.previous_B1m,
            lengths_B,
            row_bytes=sum(row[0, 0].nbytes for row in self.rows[: self.num_attended]),
            index=IndexReads(self.block, self.per * key_bytes, key_bytes, searched),
            tickets=self.tickets,
        )
        return tokens_B1n[:, 0]

    def step_bytes(self, lengths: Sequence[int]) -> float:
        """Of the latest step; waits for the device."""
        return super().step_bytes(lengths) if self.latest_read is None else step_bytes(self.latest_read, len(lengths))

    def index_tensors(self) -> list[Tensor]:
        """What the policy adds to the mixer's own cache."""
        latest = [] if self.latest_read is None else [self.latest_read]
        return [*self.means.tensors(), self.previous_B1m, self.tickets, *latest]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.index_tensors()]


def _has_index(mixer: Mixer) -> bool:
    return isinstance(mixer, LearnedIndex) and mixer.index is not None


def _forced_blocks(forced: Forced) -> Forced:
    """Tokens whose blocks are always searched, in a layer that always selects these tokens."""
    return Forced(max(1, forced.sink), max(1, forced.local))
