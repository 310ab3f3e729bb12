"""LongCat sparse attention on latents, as published (arXiv 2608.01662): :mod:`workbench.mixers.lsa` with the keys and
values of :mod:`workbench.mixers.mla`.

``pattern: lsa_latent reader`` with ``mixers: {reader: {kind: lsa_latent, shared_index: true}}`` shares an index between
two layers. Ours: what :mod:`workbench.mixers.dsa_latent` and ``lsa`` say of theirs.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.indexed import LSAOptions
from workbench.mixers.families.indexed_latent import IndexedLatentAttention, IndexedLatentConfig


@mixers.register
class LSALatent(IndexedLatentAttention):
    """Attention to the latents of the first tokens, of a window, and of the tokens that an index selects: its own, or
    an earlier layer's."""

    conformance_cases = (
        {"top_k": 8, "sink_tokens": 1, "window_tokens": 3},
        {"top_k": 20, "sink_tokens": 4, "window_tokens": 9, "latents": 2, "query_latent": 24, "index_heads": 3},
    )

    class Config(LSAOptions, IndexedLatentConfig):
        """LongCat sparse attention on latents."""

        kind: Literal["lsa_latent"] = "lsa_latent"
