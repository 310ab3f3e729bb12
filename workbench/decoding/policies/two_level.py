"""Two levels: blocks first, then tokens inside them (AsyncTLS, arXiv 2604.07815, §4).

    synchronous:  M_t = the best blocks of q_t;  S_t = the best tokens of q_t inside M_t
    lagged:       M_t = the best blocks of q_t;  S_t = the best tokens of q_t inside M_{t-1}

and attention over S_t with all channels. Lagged, the blocks that a step searches are known one step ahead, which gives
their transfer from the host the time of a step; a block that is needed suddenly is out of reach for one step.

Published: the lag, the two indices, a first step that searches the blocks of the last prompt query, a resident set that
is exactly M_{t-1}. Ours: the newest block, whose summary is incomplete, is always searched, and a few first and newest
tokens are always kept (``sink: 0`` and ``local: 1`` keep nothing but the query's own); the search is synchronous in the
first step of a sequence without a prompt of several tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.decoding.blocks import BlockConfig, Shape, block_index
from workbench.decoding.channels import CalibratedPolicy, ChannelConfig, TokenIndex
from workbench.decoding.offload import OffloadableConfig, OffloadablePolicy
from workbench.decoding.policy import policies
from workbench.decoding.selective import Selection, Selector
from workbench.decoding.view import View
from workbench.ops.sparse_decoding import IndexReads, Searched


@policies.register
class TwoLevel(CalibratedPolicy, OffloadablePolicy):
    """The best tokens inside the best blocks, of this step or of the one before."""

    conformance_cases = (
        {"tokens": 6, "candidates": 16, "block": 4, "sink": 2, "local": 3, "channels": "all"},
        {"tokens": 5, "candidates": 12, "block": 4, "sink": 0, "local": 1, "channels": "all", "lagged": False},
        {
            "tokens": 6,
            "candidates": 16,
            "block": 4,
            "sink": 1,
            "local": 4,
            "channels": "all",
            "bits": 16,
            "block_index": "mean",
            "sub_block": 2,
            "first_step": "synchronous",
        },
        {
            "tokens": 6,
            "candidates": 16,
            "block": 4,
            "sink": 2,
            "local": 3,
            "channels": "all",
            "offload": {},
        },
    )
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096, "candidates": 4096, "channels": "all"}

    class Config(OffloadableConfig, BlockConfig, ChannelConfig):
        """The best tokens inside the best blocks, of this step or of the one before."""

        kind: Literal["two_level"] = "two_level"
        block: Annotated[int, Field(ge=1)] = 64
        """Tokens of a block."""
        candidates: Annotated[int, Field(ge=1)] = 8192
        """Tokens of the blocks that are searched."""
        lagged: bool = True
        """Whether the blocks of the step before are searched."""
        first_step: Literal["prompt_query", "synchronous"] = "prompt_query"
        """Blocks that the first lagged step searches: those of the last query of the prompt, as in the paper, or its
        own."""

        def model_post_init(self, _context: Any) -> None:
            self.check_tokens()
            self.check_budget("candidates", self.candidates)
            require(
                self.tokens <= self.candidates,
                "tokens",
                got=self.tokens,
                expected=f"at most candidates={self.candidates}",
            )

    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        return TwoLevelSelector(self.config, view, shape, self.channels(layer, view))


class TwoLevelSelector(Selector):
    """Chooses blocks, and tokens inside blocks; ``previous_BGm`` is M_{t-1}."""

    def __init__(self, config: Any, view: View, shape: Shape, channels_Gc: Tensor):
        self.config, self.count = config, config.candidates // config.block
        self.blocks = block_index(config, shape, view)
        self.tokens = TokenIndex(config, view, channels_Gc, shape)
        super().__init__(view, shape, min(self.count, self.blocks.blocks))
        self.looks_ahead = config.lagged

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        self.blocks.append(k_BTGK, start_B)
        self.tokens.append(k_BTGK, start_B)

    def observe(self, q_BHK: Tensor, lengths_B: Tensor) -> None:
        if self.config.lagged and self.config.first_step == "prompt_query":
            self.previous_BGm.copy_(self.blocks.best(q_BHK, lengths_B, self.count))
        else:
            self.previous_BGm.fill_(-1)  # blocks of a step before these tokens

    def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
        block, blocks_BGm = self.config.block, self.blocks.best(q_BHK, lengths_B, self.count)
        searched = Searched(blocks_BGm, None, block, newest=False)
        if self.config.lagged:
            searched = Searched(self.previous_BGm, blocks_BGm, block, newest=True)
        tokens_BGn = self.tokens.best(q_BHK, searched, lengths_B)
        index = IndexReads(block, self.blocks.block_bytes(), self.tokens.token_bytes(), searched)
        return Selection(tokens_BGn, blocks_BGm, index, self.previous_BGm if self.config.lagged else None)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.blocks.tensors(), *self.tokens.tensors()]
