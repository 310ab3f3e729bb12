"""LongCat sparse attention, LSA (arXiv 2608.01662): first tokens, a window, and what a learned index ranks first;
consecutive layers share one index.

    S_t   = sink_tokens first and window_tokens last tokens, and of the others those with the largest index scores,
            top_k in all
    loss  = Σ KL over the layer that has the index and those that read it

The rest is that of :mod:`workbench.mixers.families.indexed`. ``pattern: lsa reader`` with ``mixers: {reader: {kind:
lsa, shared_index: true}}`` shares an index between two layers, ``lsa reader reader reader`` between four.

Published: 2,048 tokens, of which 16 first and 1,024 last ones; one index for two layers; the sum of both layers'
losses. Ours: plain heads in the place of latent attention; the loss is over all of S_t, forced tokens included, as
DSA's is; the warm-up, as ours of DSA; sizes at the scales. The paper's hierarchical search of the index, which is for
prompts, is left out; the decoding policy ``hierarchical`` searches steps so.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from workbench.config import require
from workbench.contract import mixers
from workbench.mixers.families.indexed import IndexedAttention, IndexedConfig

INDEX_FIELDS = ("index_heads", "index_dim", "index_rotary_dim")


@mixers.register
class LSA(IndexedAttention):
    """Attention to the first tokens, a window, and the tokens that an index selects: its own, or an earlier layer's."""

    conformance_cases = (
        {"top_k": 8, "sink_tokens": 1, "window_tokens": 3},
        {"top_k": 20, "sink_tokens": 4, "window_tokens": 9, "kv_heads": 1, "index_heads": 3},
    )

    class Config(IndexedConfig):
        """LongCat sparse attention."""

        kind: Literal["lsa"] = "lsa"
        sink_tokens: Annotated[int, Field(ge=0)] = 16
        """First tokens of the document that every query attends, among the ``top_k``."""
        window_tokens: Annotated[int, Field(ge=1)] = 1024
        """Last tokens that a query attends, its own included, among the ``top_k``."""
        shared_index: bool = False
        """Whether the tokens are those that the nearest earlier layer of this kind with an index of its own selects.
        Needs such a layer in the pattern."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**fields, "sink_tokens": 4 if scale == "tiny" else 16, "window_tokens": fields["top_k"] // 2}
            for scale, fields in IndexedConfig.scales.items()
        }

        def canonical(self) -> dict[str, Any]:
            plain = super().canonical()  # a layer without an index of its own has no sizes of one
            return {name: value for name, value in plain.items() if not (self.shared_index and name in INDEX_FIELDS)}

        def resolved(self, width: int) -> Self:
            forced = self.sink_tokens + self.window_tokens
            require(
                forced < self.top_k,
                "top_k",
                got=self.top_k,
                expected=f"more than sink_tokens={self.sink_tokens} and window_tokens={self.window_tokens} together",
                do=f"Set top_k: {forced + 1} or more.",
            )
            return super().resolved(width)
