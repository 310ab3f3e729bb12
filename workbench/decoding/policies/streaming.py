"""Streaming: every step reads the first tokens and the newest ones (attention sinks, arXiv 2309.17453).

The floor for policies that choose: it looks at no key. The published method forgets all other tokens and counts
positions inside the cache; here prompts are read in full, as under every other policy, and tokens keep their positions
(ours).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.decoding.blocks import Shape
from workbench.decoding.policy import policies
from workbench.decoding.selective import Selection, SelectiveConfig, SelectivePolicy, Selector
from workbench.decoding.view import View


@policies.register
class Streaming(SelectivePolicy):
    """The first tokens and the newest ones."""

    conformance_cases = ({"tokens": 7, "sink": 2}, {"tokens": 5, "sink": 0, "dense_layers": 1})
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096}

    class Config(SelectiveConfig):
        """The first tokens and the newest ones."""

        kind: Literal["streaming"] = "streaming"
        tokens: Annotated[int, Field(ge=1)] = 1024
        """Tokens that a step reads."""
        sink: Annotated[int, Field(ge=0)] = 4
        """How many of these are the first of the sequence; the paper has 4."""

        def model_post_init(self, _context: Any) -> None:
            require(self.sink < self.tokens, "sink", got=self.sink, expected=f"less than tokens={self.tokens}")

    def selector(self, layer: int, view: View, shape: Shape) -> Selector:
        return StreamingSelector(self.config, view, shape)


class StreamingSelector(Selector):
    """Chooses by position."""

    def __init__(self, config: Any, view: View, shape: Shape):
        self.sink, self.count = config.sink, min(config.tokens, config.sink + shape[1])
        super().__init__(view, shape, self.count)

    def select(self, q_BHK: Tensor, lengths_B: Tensor) -> Selection:
        first_S = torch.arange(self.sink, device=lengths_B.device)
        newest_BW = lengths_B[:, None] - 1 - torch.arange(self.count - self.sink, device=lengths_B.device)
        newest_BW = newest_BW.where(newest_BW >= self.sink, -1)  # the others are among the first, or before them
        first_BS = first_S.where(first_S < lengths_B[:, None], -1)
        tokens_BGn = torch.cat((first_BS, newest_BW), dim=1)[:, None].expand(-1, self.view.G, -1)
        return Selection(tokens_BGn, tokens_BGn)
