"""What a decoding step computes when it reads a few tokens of a long cache: scores of blocks, scores of candidate
tokens, attention over chosen tokens.

Every shape is fixed by the capacity of the cache, and validity is data: a step can be captured in a CUDA graph. Scores
have at least fp32, as rounding in bf16 would change the choice.

Legend: B sequences, S cached tokens (capacity), N blocks, H query heads, G groups of heads that share keys, K key
channels, V value channels, M candidates, n chosen tokens, c channels of the token index.
"""

from __future__ import annotations

from torch import Tensor

from workbench.ops.dispatch import record
from workbench.ops.sparse_decoding import torch as by_torch

__all__ = ["channel_scores", "gathered_attention", "mean_scores", "minmax_scores", "quantised", "unpacked"]

quantised, unpacked = by_torch.quantised, by_torch.unpacked


def minmax_scores(q_BHK: Tensor, upper_BNGK: Tensor, lower_BNGK: Tensor) -> Tensor:
    """Upper bounds of q · k over the keys of each block (Quest, arXiv 2406.10774), summed over the heads of a group.

        Σ_h Σ_c max(q_hc upper_c, q_hc lower_c) = (Σ_h max(q_h, 0)) · upper + (Σ_h min(q_h, 0)) · lower

    The matrix form is that of AsyncTLS (arXiv 2604.07815, §4.1). It is linear in both factors, so that queries are
    summed before the product (ours): one product per group instead of one per head.

    Args:
        q_BHK: one query per sequence and head.
        upper_BNGK, lower_BNGK: largest and smallest number of every key channel in a block.

    Returns:
        (B, G, N).
    """
    record("minmax_scores", "torch")
    return by_torch.minmax_scores(q_BHK, upper_BNGK, lower_BNGK)


def mean_scores(q_BHK: Tensor, means_BNGK: Tensor, counts_BN: Tensor, scale: float) -> Tensor:
    """Share of the attention that falls on each block if all its keys equal their mean (ours).

        a_n = mean over heads of softmax_n(scale · q_h · mean_n + log count_n)

    Args:
        q_BHK: one query per sequence and head.
        means_BNGK: mean key of a block.
        counts_BN: tokens of a block; those with 0 score 0, whatever their mean.

    Returns:
        (B, G, N).
    """
    record("mean_scores", "torch")
    return by_torch.mean_scores(q_BHK, means_BNGK, counts_BN, scale)


def channel_scores(
    q_BHc: Tensor,
    index_BSGc: Tensor,
    steps_BSG: Tensor | None,
    tokens_BGM: Tensor | None,
    valid_BGM: Tensor,
    scale: float,
) -> Tensor:
    """Approximate attention weights of candidate tokens (AsyncTLS, arXiv 2604.07815, §4.1).

        a_j = mean over the heads of a group of softmax_j(scale · q_h · k_j), over the candidates j

    Args:
        q_BHc: queries, in the channels of the index.
        index_BSGc: keys in these channels; with ``steps_BSG`` packed as :func:`quantised` gives them, (B, S, G, c/2).
        steps_BSG: size of a quantisation step of every key. None for keys that are not quantised.
        tokens_BGM: positions of the candidates, any number where invalid. None: every token is a candidate, M = S.
        valid_BGM: (B, G or 1, M) which candidates exist.

    Returns:
        (B, G, M), 0 where invalid.
    """
    record("channel_scores", "torch")
    return by_torch.channel_scores(q_BHc, index_BSGc, steps_BSG, tokens_BGM, valid_BGM, scale)


def gathered_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    tokens_BGn: Tensor,
    *,
    shared_BS1R: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query per sequence over the chosen tokens.

    Args:
        q_BHK: queries of K channels; of K + R with ``shared_BS1R``.
        k_BSGK, v_BSGV: cached keys and values. Without values, the keys of K channels are the values.
        tokens_BGn: int64 positions without duplicates, -1 for none; of each group of keys, or of a multiple of as many
            groups of heads.
        shared_BS1R: further channels of the keys that all groups share.
        scale: factor on the scores.
        softcap, sink_H: as in :func:`workbench.ops.sparse_attention.visible_block_attention`.

    Returns:
        (B, H, V) in the type of the cache, zero where nothing is chosen.
    """
    record("gathered_attention", "torch")
    return by_torch.gathered_attention(q_BHK, k_BSGK, v_BSGV, tokens_BGn, shared_BS1R, scale, softcap, sink_H)
