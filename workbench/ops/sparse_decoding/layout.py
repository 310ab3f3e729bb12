"""What the operators are passed beside tensors. Legend as in the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Forced(NamedTuple):
    """Tokens that are chosen whatever their score."""

    sink: int
    """First tokens of a sequence."""
    local: int
    """Newest tokens of a sequence."""


class TokenKeys(NamedTuple):
    """Keys by which tokens are ranked."""

    keys_BGSc: Tensor
    """Keys in c channels; with ``steps_BGS`` packed as :func:`workbench.ops.sparse_decoding.quantised` gives them, (B,
    G, S, c/2)."""
    steps_BGS: Tensor | None
    """Size of a quantisation step of every key. None for keys that are not quantised."""
    channels_Gc: Tensor | None
    """Channels of the queries that meet these keys. None for all."""


class Searched(NamedTuple):
    """The tokens of a list of blocks."""

    blocks_BGJ: Tensor
    """Numbers of blocks, ascending, -1 behind them."""
    first_BGJ: Tensor | None
    """The blocks where ``blocks_BGJ`` is empty, in a lagged policy's first step. None: nothing."""
    block: int
    """Tokens of a block."""
    newest: bool
    """Whether the newest token is a candidate if its block is not listed."""

    def tokens(self, lengths_B: Tensor) -> Tensor:
        """Positions of the candidates, -1 for none: (B, G, J · block), with ``newest`` one more."""
        tokens = tokens_of(self._blocks(), self.block, lengths_B)
        if not self.newest:
            return tokens
        return torch.cat((tokens, torch.where(self._lists_newest(lengths_B), -1, lengths_B[:, None, None] - 1)), dim=-1)

    def size(self, lengths_B: Tensor) -> Tensor:
        """How many candidates there are, all groups and sequences."""
        size = tokens_in(self._blocks(), self.block, lengths_B)
        return size + (~self._lists_newest(lengths_B)).sum() if self.newest else size

    def _blocks(self) -> Tensor:
        if self.first_BGJ is None:
            return self.blocks_BGJ
        return torch.where(self.blocks_BGJ[..., :1] < 0, self.first_BGJ, self.blocks_BGJ)

    def _lists_newest(self, lengths_B: Tensor) -> Tensor:
        return (self._blocks() == (lengths_B[:, None, None] - 1) // self.block).any(-1, keepdim=True)


class IndexReads(NamedTuple):
    """What a step reads of indices."""

    block: int = 1
    """Tokens of a block."""
    block_bytes: float = 0.0
    """Of the summary of a block, all groups; those of all blocks with tokens are read."""
    token_bytes: float = 0.0
    """Of the entry of a candidate token, one group."""
    searched: Searched | None = None
    """The candidates. None: every token."""


class Pool(NamedTuple):
    """Where the rows of tokens are if the caches of a layer hold some of its blocks only."""

    slots_BGN: Tensor
    """Slot of every block, -1 for none: rows ``slot · block`` and following."""
    block: int
    """Tokens of a block."""

    def rows(self, tokens_BGn: Tensor) -> Tensor:
        """Rows of tokens, -1 for tokens without any."""
        block = tokens_BGn.clamp_min(0) // self.block
        slots = self.slots_BGN.gather(-1, block).where(tokens_BGn >= 0, -1)
        return (slots * self.block + tokens_BGn % self.block).where(slots >= 0, -1)


def tokens_of(blocks_BGm: Tensor, block: int, lengths_B: Tensor) -> Tensor:
    """Positions (B, G, m · block) of the tokens of blocks, -1 where there is none."""
    inside = torch.arange(block, device=blocks_BGm.device)
    tokens = blocks_BGm[..., None] * block + inside
    exists = (blocks_BGm[..., None] >= 0) & (tokens < lengths_B[:, None, None, None])
    return tokens.where(exists, -1).flatten(2)


def tokens_in(blocks_BGm: Tensor, block: int, lengths_B: Tensor) -> Tensor:
    """How many tokens blocks have, all groups and sequences."""
    tokens = (lengths_B[:, None, None] - blocks_BGm * block).clamp(0, block)
    return tokens.masked_fill(blocks_BGm < 0, 0).sum()


def new_tickets(batch: int, heads: int, device: torch.device | str) -> Tensor:
    """Counters for the operators of one layer."""
    return torch.zeros(batch * heads, dtype=torch.int32, device=device)
