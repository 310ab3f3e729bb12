"""Double Sparsity: every step reads the tokens whose keys score best in a few channels (arXiv 2408.07092).

    S_t = the best tokens of q_t among all;  attention over S_t with all channels

The channels are calibrated and stored in four bits. Heads that share keys choose together, by their mean weight, as in
AsyncTLS (arXiv 2604.07815, §4.1), whose comparison this is. With all channels and 16 bits, the choice is by exact
weights.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from workbench.decoding.blocks import Shape
from workbench.decoding.channels import CalibratedPolicy, ChannelConfig, TokenIndex
from workbench.decoding.policy import policies
from workbench.decoding.selective import Selection, SelectiveConfig, Selector
from workbench.decoding.view import View
from workbench.ops.sparse_decoding import IndexReads


@policies.register
class DoubleSparsity(CalibratedPolicy):
    """The tokens whose keys score best in a few channels."""

    conformance_cases = (
        {"tokens": 9, "channels": "all", "sink": 2, "local": 3},
        {"tokens": 6, "channels": "all", "sink": 0, "local": 1, "bits": 16, "fine_scale": "dc"},
    )
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096, "channels": "all"}

    class Config(SelectiveConfig, ChannelConfig):
        """The tokens whose keys score best in a few channels."""

        kind: Literal["double_sparsity"] = "double_sparsity"

        def model_post_init(self, _context: Any) -> None:
            self.check_tokens()

    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        return DoubleSparsitySelector(self.config, view, shape, self.channels(layer, view))


class DoubleSparsitySelector(Selector):
    """Chooses tokens."""

    def __init__(self, config: Any, view: View, shape: Shape, channels_Gc: Tensor):
        super().__init__(view, shape, min(config.tokens, shape[1]))
        self.index = TokenIndex(config, view, channels_Gc, shape)

    def append(self, k_BTGK: Tensor, start_B: Tensor) -> None:
        self.index.append(k_BTGK, start_B)

    def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
        tokens_BGn = self.index.best(q_BHK, None, lengths_B)
        return Selection(tokens_BGn, tokens_BGn, IndexReads(token_bytes=self.index.token_bytes()))

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.index.tensors()]
