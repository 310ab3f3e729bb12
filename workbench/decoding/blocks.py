"""The block index: summaries of blocks of cached keys, kept up to date token by token, and the choice of blocks.

Legend: B sequences, T new tokens, N blocks or sub-blocks, H query heads, G groups of heads that share keys, K key
channels, m chosen blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.decoding.policy import PolicyConfig
from workbench.ops.sparse_decoding import mean_scores, minmax_scores

Shape = tuple[int, int, torch.device | str, torch.dtype]
"""Sequences, capacity in tokens, device and type of a cache."""


class ForcedConfig(PolicyConfig):
    """Tokens that every step keeps, whatever their score (ours; AsyncTLS mentions none, and keeps 0 and 1 here)."""

    sink: Annotated[int, Field(ge=0)] = 16
    """First tokens of the sequence that are always kept."""
    local: Annotated[int, Field(ge=1)] = 64
    """Newest tokens that are always kept, the query's own included."""


class BlockConfig(ForcedConfig):
    """Fields of every policy that chooses blocks."""

    block: Annotated[int, Field(ge=1)]
    """Tokens of a block."""
    block_index: Literal["minmax", "mean"] = "minmax"
    """How blocks are ranked: minmax by an upper bound of their scores (Quest, AsyncTLS), mean by the attention that the
    mean keys of their sub-blocks get (ours, after LSA, arXiv 2608.01662)."""
    sub_block: Annotated[int, Field(ge=1)] = 8
    """Tokens of a sub-block of the mean index; a divisor of ``block``."""

    def forced_blocks(self) -> int:
        """Blocks that overlap the forced tokens, at most."""
        return -(-self.sink // self.block) + (self.local + self.block - 2) // self.block + 1

    def check_budget(self, name: str, tokens: int) -> None:
        """Check that ``tokens`` are whole blocks and hold the forced ones.

        Raises:
            ConfigError: naming the field.
        """
        require(
            self.block_index != "mean" or self.block % self.sub_block == 0,
            "sub_block",
            got=self.sub_block,
            expected=f"a divisor of block={self.block}",
        )
        require(tokens % self.block == 0, name, got=tokens, expected=f"a multiple of block={self.block}")
        least = self.forced_blocks() * self.block
        require(
            tokens >= least,
            name,
            got=tokens,
            expected=f"at least {least}, the blocks that overlap sink={self.sink} and local={self.local} tokens",
        )


class BlockIndex(ABC):
    """Summaries (B, N, G, …) of the blocks of a cache. Memory of blocks without tokens may hold anything.

    Args:
        shape: of the cache.
        block: tokens of a block.
        groups: G.
        channels: K.
    """

    def __init__(self, shape: Shape, block: int, groups: int, channels: int):
        self.block, self.groups, self.channels = block, groups, channels
        self.blocks = -(-shape[1] // block)

    @abstractmethod
    def append(self, k_BTGK: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
        """Take T keys from position ``start_B`` on; those at ``lengths_B`` and later are padding."""

    @abstractmethod
    def scores(self, q_BHK: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
        """(B, G, N) by which blocks are ranked; anything for blocks without tokens."""

    @abstractmethod
    def block_bytes(self) -> float:
        """Bytes of a block's summary, all groups."""

    def bytes_read(self, lengths_B: Tensor) -> Tensor:
        """Bytes of the summaries of all blocks with tokens, all sequences."""
        return ((lengths_B + self.block - 1) // self.block).sum() * self.block_bytes()

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the index adds to a cache."""


class MinMaxIndex(BlockIndex):
    """Largest and smallest number of every key channel in a block (Quest, arXiv 2406.10774; AsyncTLS, arXiv 2604.07815,
    §4.1), in the type of the cache."""

    def __init__(self, shape: Shape, block: int, groups: int, channels: int):
        super().__init__(shape, block, groups, channels)
        batch, _, device, dtype = shape
        self.upper, self.lower = (
            torch.empty(batch, self.blocks, groups, channels, device=device, dtype=dtype) for _ in range(2)
        )

    def append(self, k_BTGK: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
        k_BTGK, T = k_BTGK.to(self.upper.dtype), k_BTGK.shape[1]
        if T == 1:
            k_BGK, number_B = k_BTGK[:, 0], start_B // self.block
            sequence_B = torch.arange(len(start_B), device=start_B.device)
            is_first = (start_B % self.block == 0)[:, None, None]
            for table, extreme in ((self.upper, torch.maximum), (self.lower, torch.minimum)):
                before_BGK = table[sequence_B, number_B]
                table[sequence_B, number_B] = torch.where(is_first, k_BGK, extreme(before_BGK, k_BGK))
            return
        position_BT = start_B[:, None] + torch.arange(T, device=start_B.device)
        is_padding = (position_BT >= lengths_B[:, None])[..., None, None]
        number_BTGK = (position_BT // self.block)[..., None, None].expand_as(k_BTGK)
        first_N = torch.arange(self.blocks, device=start_B.device) * self.block
        is_new = (first_N >= start_B[:, None])[..., None, None]
        for table, reduce, neutral in ((self.upper, "amax", -torch.inf), (self.lower, "amin", torch.inf)):
            table.masked_fill_(is_new, neutral)
            table.scatter_reduce_(1, number_BTGK, k_BTGK.masked_fill(is_padding, neutral), reduce)

    def scores(self, q_BHK: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
        return minmax_scores(q_BHK, self.upper, self.lower)

    def block_bytes(self) -> float:
        return 2 * self.groups * self.channels * self.upper.itemsize

    def tensors(self) -> list[Tensor]:
        return [self.upper, self.lower]


class MeanIndex(BlockIndex):
    """Mean keys of sub-blocks, in the type of the cache. The sum of the newest sub-block has at least fp32.

    A block's score is the sum of its sub-blocks' :func:`workbench.ops.sparse_decoding.mean_scores` (ours). LSA (arXiv
    2608.01662) adds ReLU(q · mean) over sub-blocks, for the keys of an indexer trained for it; a softmax does not
    depend on a common shift of the scores, as attention does not.
    """

    def __init__(self, shape: Shape, block: int, groups: int, channels: int, sub_block: int):
        super().__init__(shape, block, groups, channels)
        batch, _, device, dtype = shape
        self.sub_block, per_block = sub_block, block // sub_block
        size = (batch, self.blocks * per_block, groups, channels)
        self.means = torch.empty(size, device=device, dtype=dtype)
        self.sum_BGK = torch.empty(
            batch, groups, channels, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )

    def append(self, k_BTGK: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
        k_BTGK, T = k_BTGK.to(self.sum_BGK.dtype), k_BTGK.shape[1]
        number_B, before_B = start_B // self.sub_block, start_B % self.sub_block
        sequence_B, is_first = torch.arange(len(start_B), device=start_B.device), (before_B == 0)[:, None, None]
        if T == 1:
            self.sum_BGK.copy_(torch.where(is_first, k_BTGK[:, 0], self.sum_BGK + k_BTGK[:, 0]))
            mean_BGK = self.sum_BGK / (before_B + 1)[:, None, None]
            self.means[sequence_B, number_B] = mean_BGK.to(self.means.dtype)
            return
        position_BT = start_B[:, None] + torch.arange(T, device=start_B.device)
        is_padding = (position_BT >= lengths_B[:, None])[..., None, None]
        number_BTGK = (position_BT // self.sub_block)[..., None, None].expand_as(k_BTGK)
        sums_BNGK = torch.zeros(self.means.shape, device=start_B.device, dtype=self.sum_BGK.dtype)
        sums_BNGK[sequence_B, number_B] = self.sum_BGK.masked_fill(is_first, 0.0)
        sums_BNGK.scatter_add_(1, number_BTGK, k_BTGK.masked_fill(is_padding, 0.0))
        counts_BN = self._counts(lengths_B)
        is_touched = (counts_BN > 0) & (torch.arange(counts_BN.shape[1], device=start_B.device) >= number_B[:, None])
        means_BNGK = (sums_BNGK / counts_BN.clamp_min(1)[..., None, None]).to(self.means.dtype)
        self.means.copy_(torch.where(is_touched[..., None, None], means_BNGK, self.means))
        self.sum_BGK.copy_(sums_BNGK[sequence_B, (lengths_B - 1).clamp_min(0) // self.sub_block])

    def _counts(self, lengths_B: Tensor) -> Tensor:
        """(B, N) tokens of every sub-block."""
        first_N = torch.arange(self.means.shape[1], device=lengths_B.device) * self.sub_block
        return (lengths_B[:, None] - first_N).clamp(0, self.sub_block)

    def scores(self, q_BHK: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
        masses_BGN = mean_scores(q_BHK, self.means, self._counts(lengths_B), scale)
        return masses_BGN.unflatten(-1, (self.blocks, -1)).sum(-1)

    def block_bytes(self) -> float:
        return self.block // self.sub_block * self.groups * self.channels * self.means.itemsize

    def tensors(self) -> list[Tensor]:
        return [self.means, self.sum_BGK]


def block_index(config: BlockConfig, shape: Shape, groups: int, channels: int) -> BlockIndex:
    """The index that ``config.block_index`` names."""
    if config.block_index == "mean":
        return MeanIndex(shape, config.block, groups, channels, config.sub_block)
    return MinMaxIndex(shape, config.block, groups, channels)


def top_blocks(scores_BGN: Tensor, lengths_B: Tensor, config: BlockConfig, count: int) -> Tensor:
    """The ``count`` best blocks of every group, best first: (B, G, m), -1 where there are fewer.

    Blocks that overlap the first ``config.sink`` or the newest ``config.local`` tokens come first; the newest, which
    may be incomplete, is always among them.
    """
    number_N = torch.arange(scores_BGN.shape[-1], device=scores_BGN.device)
    lengths_B1 = lengths_B[:, None]
    is_sink = number_N * config.block < config.sink
    is_local = number_N >= (lengths_B1 - config.local).clamp_min(0) // config.block
    exists_BN = number_N <= (lengths_B1 - 1) // config.block
    ranked = scores_BGN.masked_fill((is_sink | is_local)[:, None], torch.inf)
    best = ranked.masked_fill(~exists_BN[:, None], -torch.inf).topk(min(count, len(number_N)))
    return best.indices.where(best.values > -torch.inf, -1)


def tokens_of(blocks_BGm: Tensor, block: int, lengths_B: Tensor) -> Tensor:
    """Positions (B, G, m · block) of the tokens of blocks, -1 where there is none."""
    inside = torch.arange(block, device=blocks_BGm.device)
    tokens = blocks_BGm[..., None] * block + inside
    exists = (blocks_BGm[..., None] >= 0) & (tokens < lengths_B[:, None, None, None])
    return tokens.where(exists, -1).flatten(2)
