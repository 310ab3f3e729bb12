"""Softmax attention over all earlier tokens: multi-head, grouped-query (arXiv 2305.13245) or multi-query."""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.softmax import AttentionConfig, SoftmaxAttention


@mixers.register
class Full(SoftmaxAttention):
    """Full causal attention: every token sees all tokens before it in its document."""

    class Config(AttentionConfig):
        """Full softmax attention."""

        kind: Literal["full"] = "full"
