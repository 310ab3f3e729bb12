"""Multi-head latent attention (arXiv 2405.04434, §2.1): keys and values are computed from one small latent per token.

The definitions are those of :mod:`workbench.mixers.families.latent` with one latent.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.latent import LatentAttention, LatentAttentionConfig


@mixers.register
class MLA(LatentAttention):
    """Multi-head latent attention: one small latent per token in the cache."""

    class Config(LatentAttentionConfig):
        """Multi-head latent attention."""

        kind: Literal["mla"] = "mla"
