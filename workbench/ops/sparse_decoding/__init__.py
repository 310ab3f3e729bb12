"""What a decoding step computes when it reads a few tokens of a long cache: the choice of blocks, the choice of tokens,
attention over chosen tokens; and what new tokens add to the two indices.

Every shape is fixed by the capacity of the cache, and lengths and validity are data: a step can be captured in a CUDA
graph. Scores have at least fp32, as rounding in bf16 would change the choice. What is chosen is listed in ascending
order, and of equal scores the first positions are taken, so that every form of an operator chooses the same.

Kernels may save a launch by counting the programs that have ended. ``tickets`` are their counters: int32 zeros, B · H,
zero again after every call. Calls that may run at the same time need counters of their own.

Legend: B sequences, S cached tokens (capacity), N blocks, H query heads, G groups of heads that share keys, K key
channels, V value channels, J listed blocks, m chosen blocks, n chosen tokens, c channels of the token index.
"""

from __future__ import annotations

from torch import Tensor, float32

from workbench.ops.dispatch import choose_backend, record
from workbench.ops.sparse_decoding import torch as by_torch
from workbench.ops.sparse_decoding.layout import (
    Forced,
    IndexReads,
    Pool,
    Searched,
    TokenKeys,
    new_tickets,
    tokens_in,
    tokens_of,
)

__all__ = [
    "Forced",
    "IndexReads",
    "Pool",
    "Searched",
    "TokenKeys",
    "best_blocks",
    "channel_tokens",
    "extend_codes",
    "extend_means",
    "extend_minmax",
    "gathered_attention",
    "indexer_blocks",
    "indexer_tokens",
    "mean_blocks",
    "minmax_blocks",
    "new_tickets",
    "quantised",
    "read_numbers",
    "tokens_in",
    "tokens_of",
    "unpacked",
]

quantised, unpacked = by_torch.quantised, by_torch.unpacked

MOST = 8192
"""Most tokens or blocks that kernels choose."""


def best_blocks(scores_BGN: Tensor, lengths_B: Tensor, *, block: int, count: int, forced: Forced) -> Tensor:
    """The blocks with the largest scores.

    Args:
        scores_BGN: of every block; of those without tokens, any. Kernels take fp32.
        lengths_B, block, count, forced: as of :func:`minmax_blocks`.

    Returns:
        As of :func:`minmax_blocks`.
    """
    count = min(count, scores_BGN.shape[2])
    if choose("best_blocks", scores_BGN, count, scores_BGN.dtype == float32) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.select(scores_BGN, lengths_B, count, forced, block)
    return by_torch.select(scores_BGN, lengths_B, count, forced, block)


def minmax_blocks(
    q_BHK: Tensor,
    upper_BGNK: Tensor,
    lower_BGNK: Tensor,
    lengths_B: Tensor,
    *,
    block: int,
    count: int,
    forced: Forced,
    tickets: Tensor | None = None,
) -> Tensor:
    """The blocks with the largest upper bound of q · k over their keys (Quest, arXiv 2406.10774), summed over the heads
    of a group.

        s = Σ_h Σ_c max(q_hc upper_c, q_hc lower_c) = (Σ_h max(q_h, 0)) · upper + (Σ_h min(q_h, 0)) · lower

    The matrix form is that of AsyncTLS (arXiv 2604.07815, §4.1). It is linear in both factors, so that queries are
    summed before the product (ours): one product per group instead of one per head.

    Args:
        q_BHK: one query per sequence and head.
        upper_BGNK, lower_BGNK: largest and smallest number of every key channel in a block.
        lengths_B: tokens of every sequence, at least one.
        block: tokens of a block.
        count: how many blocks are chosen.
        forced: blocks that overlap these tokens come first (ours).
        tickets: counters, see the package.

    Returns:
        (B, G, m) int64 numbers of blocks, ascending, -1 behind them; m is ``count``, N at most.
    """
    count = min(count, upper_BGNK.shape[2])
    if choose("minmax_blocks", q_BHK, count) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.minmax_blocks(q_BHK, upper_BGNK, lower_BGNK, lengths_B, block, count, forced, tickets)
    return by_torch.minmax_blocks(q_BHK, upper_BGNK, lower_BGNK, lengths_B, block, count, forced)


def mean_blocks(
    q_BHK: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    *,
    block: int,
    sub_block: int,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None = None,
) -> Tensor:
    """The blocks that get most of the attention if all keys of a sub-block equal their mean (ours).

        s = Σ over sub-blocks n of mean over heads of softmax_n(scale · q_h · mean_n + log count_n)

    Args:
        q_BHK: one query per sequence and head.
        means_BGNK: mean key of every sub-block.
        sub_block: tokens of a sub-block, a divisor of ``block``.
        scale: factor on the scores.
        lengths_B, block, count, forced, tickets: as of :func:`minmax_blocks`.

    Returns:
        as :func:`minmax_blocks`.
    """
    count, per = min(count, means_BGNK.shape[2] * sub_block // block), block // sub_block
    supported = per & (per - 1) == 0
    if choose("mean_blocks", q_BHK, count, supported) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.mean_blocks(q_BHK, means_BGNK, lengths_B, block, sub_block, scale, count, forced, tickets)
    return by_torch.mean_blocks(q_BHK, means_BGNK, lengths_B, block, sub_block, scale, count, forced)


def channel_tokens(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    *,
    searched: Searched | None = None,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None = None,
) -> Tensor:
    """The candidates with the largest approximate attention weights (AsyncTLS, arXiv 2604.07815, §4.1).

        a_j = mean over the heads of a group of softmax_j(scale · q_h · k_j) in a few channels, over the candidates j

    Args:
        q_BHK: one query per sequence and head, all channels.
        keys: of all tokens.
        searched: the candidates; they include the forced tokens. None: all tokens.
        scale: factor on the scores.
        count: how many tokens are chosen.
        forced: tokens that come first (ours).
        lengths_B, tickets: as of :func:`minmax_blocks`.

    Returns:
        (B, G, n) int64 positions, ascending, -1 behind them; n is ``count``, at most the number of candidates.
    """
    count = min(count, _most(keys.keys_BGSc, searched))
    if choose("channel_tokens", q_BHK, count) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.channel_tokens(q_BHK, keys, lengths_B, searched, scale, count, forced, tickets)
    return by_torch.channel_tokens(q_BHK, keys, lengths_B, searched, scale, count, forced)


def indexer_blocks(
    q_BHK: Tensor,
    weights_BH: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    *,
    block: int,
    sub_block: int,
    count: int,
    forced: Forced,
    tickets: Tensor | None = None,
) -> Tensor:
    """The blocks with the largest index scores of their mean keys.

        s = Σ over sub-blocks n of Σ_h w_h ReLU(q_h · mean_n)

    With one sub-block this is HISA (arXiv 2603.28458v2), with sub-blocks of 8 tokens in blocks of 128 LSA (arXiv
    2608.01662v1).

    Args:
        q_BHK, weights_BH: as of :func:`indexer_tokens`.
        means_BGNK: mean index key of every sub-block.
        sub_block: tokens of a sub-block, a divisor of ``block``.
        lengths_B, block, count, forced, tickets: as of :func:`minmax_blocks`.

    Returns:
        as :func:`minmax_blocks`.
    """
    count, per = min(count, means_BGNK.shape[2] * sub_block // block), block // sub_block
    if choose("indexer_blocks", q_BHK, count, per & (per - 1) == 0) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.indexer_blocks(
            q_BHK, weights_BH, means_BGNK, lengths_B, block, sub_block, count, forced, tickets
        )
    return by_torch.indexer_blocks(q_BHK, weights_BH, means_BGNK, lengths_B, block, sub_block, count, forced)


def indexer_tokens(
    q_BHK: Tensor,
    weights_BH: Tensor,
    keys_BGSK: Tensor,
    lengths_B: Tensor,
    *,
    searched: Searched | None = None,
    count: int,
    forced: Forced,
    tickets: Tensor | None = None,
) -> Tensor:
    """The candidates with the largest index scores of a learned indexer (DSA, arXiv 2512.02556, §2.1).

        I_j = Σ_h w_h ReLU(q_h · k_j)

    Args:
        q_BHK: queries of the index, one per sequence and index head.
        weights_BH: weights of the index heads, with every factor of the scores.
        keys_BGSK: index keys of all tokens, contiguous.
        searched, lengths_B, count, forced, tickets: as of :func:`channel_tokens`.

    Returns:
        as :func:`channel_tokens`.
    """
    count = min(count, _most(keys_BGSK, searched))
    if choose("indexer_tokens", q_BHK, count) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.indexer_tokens(q_BHK, weights_BH, keys_BGSK, lengths_B, searched, count, forced, tickets)
    return by_torch.indexer_tokens(q_BHK, weights_BH, keys_BGSK, lengths_B, searched, count, forced)


def _most(keys_BGSc: Tensor, searched: Searched | None) -> int:
    """Candidates of a group."""
    if searched is None:
        return keys_BGSc.shape[2]
    return searched.blocks_BGJ.shape[2] * searched.block + searched.newest


def gathered_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    tokens_BGn: Tensor,
    *,
    block: int = 1,
    lengths_B: Tensor | None = None,
    counts_BG: Tensor | None = None,
    pool: Pool | None = None,
    shared_BS1R: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one query per sequence over the chosen tokens, in parts that are combined.

    Args:
        q_BHK: queries of K channels; of K + R with ``shared_BS1R``.
        k_BSGK, v_BSGV: cached keys and values, with any strides but one of 1 along channels; a pool that sequences or
            groups share is expanded. Without values, the keys of K channels are the values.
        tokens_BGn: int64 positions without duplicates, -1 for none, of each group of keys, or of a multiple of as many
            groups of heads; with ``block``, numbers of blocks.
        block: attend to all tokens of blocks of so many. Default: to single tokens.
        lengths_B: tokens of every sequence, where blocks are listed.
        counts_BG: only the first of ``tokens_BGn`` are attended, this many. None: all.
        pool: where the rows of tokens are. None: row t is that of token t.
        shared_BS1R: further channels of the keys that all groups share.
        scale: factor on the scores.
        softcap, sink_H: as in :func:`workbench.ops.sparse_attention.visible_block_attention`.

    Returns:
        (B, H, V) in the type of the cache, zero where nothing is chosen.
    """
    if choose("gathered_attention", k_BSGK) == "triton":
        from workbench.ops.sparse_decoding import kernels

        return kernels.attention(
            q_BHK,
            k_BSGK,
            v_BSGV,
            tokens_BGn,
            block,
            lengths_B,
            counts_BG,
            pool,
            shared_BS1R,
            scale,
            softcap,
            sink_H,
        )
    return by_torch.gathered_attention(
        q_BHK, k_BSGK, v_BSGV, tokens_BGn, block, lengths_B, counts_BG, pool, shared_BS1R, scale, softcap, sink_H
    )


def extend_minmax(upper_BGNK: Tensor, lower_BGNK: Tensor, k_BGK: Tensor, position_B: Tensor, *, block: int) -> None:
    """Take one key per sequence and group into the largest and smallest numbers of its block, in place.

    Args:
        upper_BGNK, lower_BGNK: as of :func:`minmax_blocks`.
        k_BGK: the keys, with any strides but one of 1 along channels.
        position_B: where they are; the first key of a block replaces what is there.
        block: tokens of a block.
    """
    if choose("extend_minmax", upper_BGNK) == "triton":
        from workbench.ops.sparse_decoding import kernels

        kernels.extend_minmax(upper_BGNK, lower_BGNK, k_BGK, position_B, block)
    else:
        by_torch.extend_minmax(upper_BGNK, lower_BGNK, k_BGK, position_B, block)


def extend_means(means_BGNK: Tensor, sum_BGK: Tensor, k_BGK: Tensor, position_B: Tensor, *, sub_block: int) -> None:
    """Take one key per sequence and group into the mean of its sub-block, in place.

    Args:
        means_BGNK: as of :func:`mean_blocks`.
        sum_BGK: sum of the keys of the newest sub-block, in fp32 at least.
        k_BGK, position_B: as of :func:`extend_minmax`.
        sub_block: tokens of a sub-block.
    """
    if choose("extend_means", means_BGNK) == "triton":
        from workbench.ops.sparse_decoding import kernels

        kernels.extend_means(means_BGNK, sum_BGK, k_BGK, position_B, sub_block)
    else:
        by_torch.extend_means(means_BGNK, sum_BGK, k_BGK, position_B, sub_block)


def extend_codes(keys: TokenKeys, k_BGK: Tensor, position_B: Tensor) -> None:
    """Write one key per sequence and group into the token index, in place.

    Args:
        keys: the index; with channels, it gets these of all of ``k_BGK``.
        k_BGK, position_B: as of :func:`extend_minmax`.
    """
    supported = keys.channels_Gc is not None and keys.channels_Gc.shape[1] % 2 == 0
    if choose("extend_codes", k_BGK, supported=supported) == "triton":
        from workbench.ops.sparse_decoding import kernels

        kernels.extend_codes(keys, k_BGK, position_B)
    else:
        by_torch.extend_codes(keys, k_BGK, position_B)


def read_numbers(
    tokens_BGn: Tensor,
    units_BGm: Tensor,
    previous_BGm: Tensor,
    lengths_B: Tensor,
    *,
    resident_BGr: Tensor | None = None,
    block: int = 1,
    row_bytes: float,
    index: IndexReads,
    tickets: Tensor | None = None,
) -> Tensor:
    """What a step read, :data:`workbench.decoding.reads.FIELDS`; ``previous_BGm`` becomes ``units_BGm``.

    Args:
        tokens_BGn: what was attended, -1 for none; with ``block``, numbers of blocks of so many tokens.
        units_BGm, previous_BGm: what was chosen in this step and in the one before, without duplicates, -1 for none.
        lengths_B: tokens of every sequence.
        resident_BGr: units that were resident beside the newest block; may be ``previous_BGm``. None: there is no
            resident set.
        row_bytes: of a token and group in the cache.
        index: what was read of indices.
        tickets: counters, see the package.

    Returns:
        (7,) fp64, NaN where undefined; bytes from the host are 0.
    """
    if choose("read_numbers", units_BGm) == "triton" and tickets is not None:
        from workbench.ops.sparse_decoding import kernels

        return kernels.read_numbers(
            tokens_BGn, units_BGm, previous_BGm, resident_BGr, lengths_B, block, row_bytes, index, tickets
        )
    return by_torch.read_numbers(tokens_BGn, units_BGm, previous_BGm, resident_BGr, lengths_B, block, row_bytes, index)


def choose(operation: str, x: Tensor, count: int = 0, supported: bool = True) -> str:
    """The recorded backend of an operation that chooses ``count`` units."""
    return record(operation, choose_backend(x, supported=supported and count <= MOST))
