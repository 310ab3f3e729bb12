"""Softmax attention of one query per sequence over a cache of which every sequence fills another length.

Lengths are read on the device and every shape is fixed by the capacity of the cache: a step can be captured in a CUDA
graph, and replayed while the sequences grow. The kernels read no token behind a length.

Legend: B sequences, S cached tokens (capacity), H query heads, G groups of heads that share keys, K key channels, V
value channels, R channels of keys that all groups share.
"""

from __future__ import annotations

from torch import Tensor

from workbench.ops.decode_attention.operators import _decode_attention

__all__ = ["decode_attention"]


def decode_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    lengths_B: Tensor,
    *,
    scale: float,
    window: int | None = None,
    shared_BS1R: Tensor | None = None,
    k_steps_BSG: Tensor | None = None,
    v_steps_BSG: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_h = Σ_s softmax_s(scale · q_h · k_s) v_s over the first ``lengths_B`` tokens of each sequence.

    Args:
        q_BHK: queries of K channels; of K + R with ``shared_BS1R``. Their type is that of the products.
        k_BSGK, v_BSGV: cached keys and values. Without values, the keys of K channels are the values. Memory behind the
            lengths may hold anything.
        lengths_B: tokens of each sequence, integers of at most S.
        scale: factor on the scores.
        window: only the last so many of these tokens; None for all.
        shared_BS1R: further channels of the keys that all groups share.
        k_steps_BSG, v_steps_BSG: what the stored numbers of a key or a value are multiplied by, for caches in eight
            bits; default 1. Without values, ``k_steps_BSG`` applies to both.
        softcap, sink_H: as in :func:`workbench.ops.sparse_attention.visible_block_attention`.

    Returns:
        (B, H, V) in the type of the queries, zero for a sequence without tokens; and (B, H), the natural log-sum-exp of
        the scores (without the sink), at least fp32, -inf there.
    """
    return _decode_attention(
        q_BHK,
        k_BSGK,
        v_BSGV,
        lengths_B,
        shared_BS1R,
        k_steps_BSG,
        v_steps_BSG,
        sink_H,
        scale,
        softcap or 0.0,
        window or 0,
    )
