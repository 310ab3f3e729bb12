"""Selection of blocks, and attention to them, for one query per sequence, at positions that only the device knows.

The same choice as :func:`workbench.ops.sparse_attention.select_blocks` for sequences of one document. Every shape is
fixed by the capacity of the cache: a decoding step can be captured in a CUDA graph.

Legend: B sequences, N pooled blocks (capacity), H query heads, G groups that select, K key channels, R channels of keys
that all groups share, J selection blocks, n selected blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.sparse_attention.layout import block_overlaps
from workbench.ops.sparse_decoding import Forced, best_blocks, gathered_attention


def visible_counts(positions_B: Tensor, length: int, stride: int) -> Tensor:
    """(B,) pooled blocks that end at or before a position."""
    return torch.where(positions_B + 1 >= length, (positions_B + 1 - length) // stride + 1, 0)


def select_for_step(
    q_BHK: Tensor,
    ck_BNgK: Tensor,
    lse_BH: Tensor,
    positions_B: Tensor,
    *,
    blocks: tuple[int, int, int, int, int, int],
    capacity: int,
    groups: int,
    scale: float,
    shared_BN1R: Tensor | None = None,
) -> Tensor:
    """(B, G, n) int64 blocks, ascending, -1 behind them.

    Args:
        q_BHK: queries of K channels; of K + R with ``shared_BN1R``.
        ck_BNgK: pooled keys; memory of blocks that are not visible may hold anything. G is a multiple of g.
        lse_BH: log-sum-exp of the scores of the visible blocks.
        positions_B: of the queries.
        blocks: length, stride, block, selected, initial and local of :class:`workbench.ops.sparse_attention.Blocks`.
        capacity: most tokens of a sequence.
        groups: G.
        scale: factor on the scores.
    """
    length, stride, block, count, initial, local = blocks
    (B, N, g), wide = ck_BNgK.shape[:3], torch.promote_types(q_BHK.dtype, torch.float32)
    J = -(-capacity // block)
    score_BGJ = torch.zeros(B, groups, J, dtype=wide, device=q_BHK.device)
    if N:
        q_BgRK = q_BHK.to(ck_BNgK.dtype).unflatten(1, (g, -1))
        q_BgRK, q_BgRr = q_BgRK.split((ck_BNgK.shape[-1], q_BHK.shape[-1] - ck_BNgK.shape[-1]), dim=-1)
        # products in the type of the cache, whose copy in fp32 would be larger than what a step reads otherwise
        s_BgRN = torch.matmul(q_BgRK, ck_BNgK.permute(0, 2, 3, 1)).to(wide)
        if shared_BN1R is not None:
            s_BgRN = s_BgRN + torch.matmul(q_BgRr, shared_BN1R.permute(0, 2, 3, 1)).to(wide)
        visible_B = visible_counts(positions_B, length, stride)
        is_visible_BN = torch.arange(N, device=q_BHK.device) < visible_B[:, None]
        lse_BgR1 = lse_BH.to(wide).unflatten(1, (g, -1))[..., None]
        p_BgRN = (s_BgRN * scale - lse_BgR1).exp()
        p_BgRN = torch.where(is_visible_BN[:, None, None], p_BgRN, 0.0)  # and not a product with zero, which keeps NaN
        p_BGN = p_BgRN.flatten(1, 2).unflatten(1, (groups, -1)).sum(2)
        pairs, ratio = block_overlaps(length, stride, block), block // stride
        front = -min(m for m, _ in pairs)
        padded = F.pad(p_BGN, (front, max(0, J * ratio + ratio - N)))
        for m, weight in pairs:
            score_BGJ = score_BGJ + weight * padded[..., front + m :: ratio][..., :J]
    # the `local` blocks up to the query's own are those that overlap its newest (local - 1) · block + 1 tokens
    chosen_BGn = _best(score_BGJ, positions_B + 1, block, count, initial * block, (local - 1) * block + 1)
    return F.pad(chosen_BGn, (0, count - chosen_BGn.shape[-1]), value=-1)


@torch.library.custom_op("workbench::best_blocks", mutates_args=())
def _best(scores: Tensor, lengths: Tensor, block: int, count: int, sink: int, local: int) -> Tensor:
    # opaque to torch.compile: the implementation is chosen when it runs
    return best_blocks(scores, lengths, block=block, count=count, forced=Forced(sink, local))


@_best.register_fake
def _(scores, lengths, block, count, sink, local) -> Tensor:  # type: ignore[no-untyped-def]
    return scores.new_empty(*scores.shape[:2], min(count, scores.shape[2]), dtype=torch.int64)


def chosen_block_attention(
    q_BHK: Tensor,
    k_BSgK: Tensor,
    v_BSgV: Tensor | None,
    chosen_BGn: Tensor,
    positions_B: Tensor,
    *,
    block: int,
    scale: float,
    shared_BS1R: Tensor | None = None,
) -> Tensor:
    """Attention to the tokens of chosen blocks up to the query, as :func:`workbench.ops.sparse_decoding.
    gathered_attention`: (B, H, V) in the type of the cache."""
    return _chosen(q_BHK.to(k_BSgK.dtype), k_BSgK, v_BSgV, chosen_BGn, positions_B + 1, shared_BS1R, block, scale)


@torch.library.custom_op("workbench::chosen_block_attention", mutates_args=())
def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    chosen: Tensor,
    lengths: Tensor,
    shared: Tensor | None,
    block: int,
    scale: float,
) -> Tensor:
    # opaque to torch.compile: the implementation is chosen when it runs
    return gathered_attention(q, k, v, chosen, block=block, lengths_B=lengths, shared_BS1R=shared, scale=scale)


@_chosen.register_fake
def _(q, k, v, chosen, lengths, shared, block, scale) -> Tensor:  # type: ignore[no-untyped-def]
    return k.new_empty(*q.shape[:2], (k if v is None else v).shape[-1])
