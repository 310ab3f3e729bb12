"""The block index: summaries of blocks of cached keys, kept up to date token by token, by which blocks are chosen.

Legend: B sequences, T new tokens, N blocks or sub-blocks, H query heads, G groups of heads that share keys, K key
channels, m chosen blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.decoding.policy import PolicyConfig
from workbench.decoding.view import View
from workbench.ops.sparse_decoding import (
    Forced,
    extend_means,
    extend_minmax,
    mean_blocks,
    minmax_blocks,
    new_tickets,
)

Shape = tuple[int, int, torch.device | str, torch.dtype]
"""Sequences, capacity in tokens, device and type of a cache."""


class ForcedConfig(PolicyConfig):
    """Tokens that every step keeps, whatever their score (ours; AsyncTLS mentions none, and keeps 0 and 1 here)."""

    sink: Annotated[int, Field(ge=0)] = 16
    """First tokens of the sequence that are always kept."""
    local: Annotated[int, Field(ge=1)] = 64
    """Newest tokens that are always kept, the query's own included."""

    def forced(self) -> Forced:
        """These tokens, as operators take them."""
        return Forced(self.sink, self.local)


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
    """Summaries (B, G, N, …) of the blocks of a cache. Memory of blocks without tokens may hold anything.

    Args:
        config: of the policy.
        shape: of the cache.
        view: of the layer.
    """

    common: ClassVar[tuple[str, ...]] = ("tickets",)

    def __init__(self, config: BlockConfig, shape: Shape, view: View):
        self.config, self.scale, self.G, self.K = config, view.scale, view.G, view.K
        self.blocks = -(-shape[1] // config.block)
        self.tickets = new_tickets(shape[0], view.H, shape[2])

    @abstractmethod
    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        """Take T keys from position ``start_B`` on."""

    @abstractmethod
    def best(self, q_BHK: Tensor, lengths_B: Tensor, count: int) -> Tensor:
        """The ``count`` best blocks of every group, in ascending order: (B, G, m), -1 behind them.

        Blocks that overlap the first ``config.sink`` or the newest ``config.local`` tokens come first; the newest,
        which may be incomplete, is always among them.
        """

    @abstractmethod
    def block_bytes(self) -> float:
        """Bytes of a block's summary, all groups."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the index adds to a cache."""


class MinMaxIndex(BlockIndex):
    """Largest and smallest number of every key channel in a block (Quest, arXiv 2406.10774; AsyncTLS, arXiv 2604.07815,
    §4.1), in the type of the cache."""

    def __init__(self, config: BlockConfig, shape: Shape, view: View):
        super().__init__(config, shape, view)
        batch, _, device, dtype = shape
        size = (batch, self.G, self.blocks, self.K)
        self.upper, self.lower = (torch.empty(size, device=device, dtype=dtype) for _ in range(2))

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        T, block = k_BTGK.shape[1], self.config.block
        if T == 1:
            extend_minmax(self.upper, self.lower, k_BTGK[:, 0], start_B, block=block)
            return
        k_BGTK = k_BTGK.to(self.upper.dtype).transpose(1, 2)
        position_BT = start_B[:, None] + torch.arange(T, device=start_B.device)
        number_BGTK = (position_BT // block)[:, None, :, None].expand_as(k_BGTK)
        first_N = torch.arange(self.blocks, device=start_B.device) * block
        is_new = (first_N >= start_B[:, None])[:, None, :, None]
        for table, reduce, neutral in ((self.upper, "amax", -torch.inf), (self.lower, "amin", torch.inf)):
            table.masked_fill_(is_new, neutral)
            table.scatter_reduce_(2, number_BGTK, k_BGTK, reduce)

    def best(self, q_BHK: Tensor, lengths_B: Tensor, count: int) -> Tensor:
        config = self.config
        options = {"block": config.block, "count": count, "forced": config.forced(), "tickets": self.tickets}
        return minmax_blocks(q_BHK, self.upper, self.lower, lengths_B, **options)  # type: ignore[arg-type]

    def block_bytes(self) -> float:
        return 2 * self.G * self.K * self.upper.itemsize

    def tensors(self) -> list[Tensor]:
        return [self.upper, self.lower, self.tickets]


class MeanKeys:
    """Mean keys of sub-blocks, in the type of the cache. The sum of the newest sub-block has at least fp32. Memory of
    sub-blocks without tokens may hold anything.

    Args:
        shape: of the cache.
        groups: G.
        channels: K.
        sub_blocks: N.
        sub_block: tokens of a sub-block.
    """

    def __init__(self, shape: Shape, groups: int, channels: int, sub_blocks: int, sub_block: int):
        batch, _, device, dtype = shape
        self.sub_block = sub_block
        self.means = torch.empty(batch, groups, sub_blocks, channels, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.sum_BGK = torch.empty(batch, groups, channels, device=device, dtype=wide)

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        """As of :meth:`BlockIndex.append`."""
        T, sub_block, N = k_BTGK.shape[1], self.sub_block, self.means.shape[2]
        if T == 1:
            extend_means(self.means, self.sum_BGK, k_BTGK[:, 0], start_B, sub_block=sub_block)
            return
        k_BGTK = k_BTGK.to(self.sum_BGK.dtype).transpose(1, 2)
        number_B, before_B, lengths_B = start_B // sub_block, start_B % sub_block, start_B + T
        sequence_B, is_first = torch.arange(len(start_B), device=start_B.device), (before_B == 0)[:, None, None]
        position_BT = start_B[:, None] + torch.arange(T, device=start_B.device)
        number_BGTK = (position_BT // sub_block)[:, None, :, None].expand_as(k_BGTK)
        sums_BGNK = torch.zeros(self.means.shape, device=start_B.device, dtype=self.sum_BGK.dtype)
        sums_BGNK[sequence_B, :, number_B] = self.sum_BGK.masked_fill(is_first, 0.0)
        sums_BGNK.scatter_add_(2, number_BGTK, k_BGTK)
        every_N = torch.arange(N, device=start_B.device)
        counts_BN = (lengths_B[:, None] - every_N * sub_block).clamp(0, sub_block)
        is_touched = (counts_BN > 0) & (every_N >= number_B[:, None])
        means_BGNK = (sums_BGNK / counts_BN.clamp_min(1)[:, None, :, None]).to(self.means.dtype)
        self.means.copy_(torch.where(is_touched[:, None, :, None], means_BGNK, self.means))
        self.sum_BGK.copy_(sums_BGNK[sequence_B, :, (lengths_B - 1) // sub_block])

    def tensors(self) -> list[Tensor]:
        """What the means add to a cache."""
        return [self.means, self.sum_BGK]


class MeanIndex(BlockIndex):
    """Mean keys of sub-blocks.

    A block is ranked by the attention that the means of its sub-blocks get,
    :func:`workbench.ops.sparse_decoding.mean_blocks` (ours). LSA (arXiv 2608.01662) adds ReLU(q · mean) over
    sub-blocks, for the keys of an indexer trained for it; a softmax does not depend on a common shift of the scores, as
    attention does not.
    """

    def __init__(self, config: BlockConfig, shape: Shape, view: View):
        super().__init__(config, shape, view)
        per = config.block // config.sub_block
        self.keys = MeanKeys(shape, self.G, self.K, self.blocks * per, config.sub_block)

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        self.keys.append(k_BTGK, start_B)

    def best(self, q_BHK: Tensor, lengths_B: Tensor, count: int) -> Tensor:
        config = self.config
        options = {"block": config.block, "sub_block": config.sub_block, "scale": self.scale, "count": count}
        return mean_blocks(
            q_BHK,
            self.keys.means,
            lengths_B,
            forced=config.forced(),
            tickets=self.tickets,
            **options,  # type: ignore[arg-type]
        )

    def block_bytes(self) -> float:
        return self.config.block // self.config.sub_block * self.G * self.K * self.keys.means.itemsize

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), self.tickets]


def block_index(config: BlockConfig, shape: Shape, view: View) -> BlockIndex:
    """The index that ``config.block_index`` names."""
    return (MeanIndex if config.block_index == "mean" else MinMaxIndex)(config, shape, view)
