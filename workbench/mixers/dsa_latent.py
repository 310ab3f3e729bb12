"""DeepSeek sparse attention on latents, as published (arXiv 2512.02556, §2.1): :mod:`workbench.mixers.dsa` with the
keys and values of :mod:`workbench.mixers.mla`.

All heads of a query attend the latents of the tokens that the index selects. Index queries are computed from the latent
of the queries where the layer has one (``query_latent``), as in the released code.

Ours: attention to all tokens (the warm-up, and rows of at most ``top_k`` tokens) takes the expanded form, to selected
ones the absorbed form; several latents per token; the rest as of ``dsa``.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.indexed_latent import IndexedLatentAttention, IndexedLatentConfig


@mixers.register
class DSALatent(IndexedLatentAttention):
    """Attention to the latents of the tokens that the layer's index selects."""

    conformance_cases = (
        {"top_k": 5},
        {"top_k": 12, "latents": 2, "query_latent": 24, "latent_scale": True, "index_heads": 3, "index_dim": 6},
        {"top_k": 200, "rotary_dim": 0, "warm_up_trains": "index"},
    )

    class Config(IndexedLatentConfig):
        """DeepSeek sparse attention on latents."""

        kind: Literal["dsa_latent"] = "dsa_latent"
