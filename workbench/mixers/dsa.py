"""DeepSeek sparse attention, DSA (arXiv 2512.02556, §2.1): every query attends the k tokens that a learned index ranks
first.

The formulas are those of :mod:`workbench.mixers.families.indexed`. Published: index scores, one index key for all index
heads, the loss, and both stages of training for a model that is trained already: a dense warm-up of the index alone,
then everything on the selected tokens, with separate losses; k 2,048. From the released code: a layer norm of the index
keys, rotary positions on half of the channels, the factor 1/sqrt(J X), J 64, X 128. Ours: plain heads (MHA, GQA, MQA)
in the place of latent attention (:mod:`workbench.mixers.dsa_latent` has it); by default the warm-up trains the
whole model, with dense attention, as it starts from random weights; index scores in the precision of the model, without
a Hadamard rotation and eight bits; sizes at the scales.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import mixers
from workbench.mixers.families.indexed import IndexedAttention, IndexedConfig


@mixers.register
class DSA(IndexedAttention):
    """Attention to the tokens that the layer's index selects."""

    conformance_cases = (
        {"top_k": 5},
        {"top_k": 12, "kv_heads": 1, "qk_norm": True, "index_heads": 3, "index_dim": 6, "index_rotary_dim": 2},
        {"top_k": 20, "rotary": False, "warm_up_trains": "index"},
    )

    class Config(IndexedConfig):
        """DeepSeek sparse attention."""

        kind: Literal["dsa"] = "dsa"
