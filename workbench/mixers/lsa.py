"""LongCat sparse attention, LSA (arXiv 2608.01662): first tokens, a window, and what a learned index ranks first;
consecutive layers share one index.

    S_t   = sink_tokens first and window_tokens last tokens, and of the others those with the largest index scores,
            top_k in all
    loss  = Σ KL over the layer that has the index and those that read it

The rest is that of :mod:`workbench.mixers.families.indexed`. ``pattern: lsa reader`` with ``mixers: {reader: {kind:
lsa, shared_index: true}}`` shares an index between two layers, ``lsa reader reader reader`` between four.

Published: 2,048 tokens, of which 16 first and 1,024 last ones; one index for two layers; the sum of both layers'
losses. Ours: plain heads in the place of latent attention (:mod:`workbench.mixers.lsa_latent` has it); the loss is over
all of S_t, forced tokens included, as DSA's is; the warm-up, as ours of DSA; sizes at the scales. The paper's
hierarchical search of the index, which is for prompts, is left out; the decoding policy ``hierarchical`` searches steps
so.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from workbench.contract import mixers
from workbench.mixers.families.indexed import IndexedAttention, IndexedConfig, LSAOptions


@mixers.register
class LSA(IndexedAttention):
    """Attention to the first tokens, a window, and the tokens that an index selects: its own, or an earlier layer's."""

    conformance_cases = (
        {"top_k": 8, "sink_tokens": 1, "window_tokens": 3},
        {"top_k": 20, "sink_tokens": 4, "window_tokens": 9, "kv_heads": 1, "index_heads": 3},
    )

    class Config(LSAOptions, IndexedConfig):
        """LongCat sparse attention."""

        kind: Literal["lsa"] = "lsa"

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**IndexedConfig.scales[scale], **fields} for scale, fields in LSAOptions.scales.items()
        }
