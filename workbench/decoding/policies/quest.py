"""Quest: every step reads the blocks with the largest bound of their scores (arXiv 2406.10774).

    M_t = the best blocks of q_t;  attention over all tokens of M_t

Heads that share keys choose together, as in the comparison of AsyncTLS (arXiv 2604.07815); Quest has no such heads.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from workbench.decoding.blocks import BlockConfig, Shape, block_index
from workbench.decoding.offload import OffloadableConfig, OffloadablePolicy
from workbench.decoding.policy import policies
from workbench.decoding.selective import Selection, Selector
from workbench.decoding.view import View
from workbench.ops.sparse_decoding import IndexReads


@policies.register
class Quest(OffloadablePolicy):
    """The blocks with the largest bound of their scores."""

    conformance_cases = (
        {"tokens": 12, "block": 4, "sink": 2, "local": 3},
        {"tokens": 16, "block": 4, "sink": 0, "local": 1, "block_index": "mean", "sub_block": 2},
        {"tokens": 12, "block": 4, "sink": 2, "local": 3, "offload": {"resident": "lru", "slots": 4}},
    )
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096}

    class Config(OffloadableConfig, BlockConfig):
        """The blocks with the largest bound of their scores."""

        kind: Literal["quest"] = "quest"
        tokens: Annotated[int, Field(ge=1)] = 1024
        """Tokens of the blocks that a step reads."""
        block: Annotated[int, Field(ge=1)] = 16
        """Tokens of a block; Quest has 16, the comparison of AsyncTLS 64."""

        def model_post_init(self, _context: Any) -> None:
            self.check_budget("tokens", self.tokens)

    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        return QuestSelector(self.config, view, shape)


class QuestSelector(Selector):
    """Chooses blocks."""

    def __init__(self, config: Any, view: View, shape: Shape):
        self.config, self.count = config, config.tokens // config.block
        self.index = block_index(config, shape, view)
        super().__init__(view, shape, min(self.count, self.index.blocks))

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        self.index.append(k_BTGK, start_B)

    def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
        blocks_BGm = self.index.best(q_BHK, lengths_B, self.count)
        index = IndexReads(self.config.block, self.index.block_bytes())
        return Selection(blocks_BGm, blocks_BGm, index, block=self.config.block)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.index.tensors()]
