"""Softmax attention on CUDA devices through torch's FlexAttention, which skips blocks without visible keys.

Measured on an H200 (torch 2.11, 16 rows of 4,096 tokens, 8 heads of 128, documents of 530 tokens on average): 2.8 ms
forward and backward, against 4.0 ms for cuDNN's kernel without documents and 3.0 ms for torch's variable-length kernel,
whose cost also depends on the number of documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Positions along one side of a mask block."""

# uncompiled, FlexAttention computes every score
_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _by_blocks(*args: Any, **options: Any) -> Any:
    """FlexAttention for a model that is not compiled, in any number of shapes: beyond the number that torch keeps, what
    was compiled is dropped, and compiled again from the cache on disk where it is needed."""
    try:
        return _compiled(*args, **options)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        torch._dynamo.reset()
        return _compiled(*args, **options)


def block_mask(segments_BT: Tensor, window: int | None = None) -> BlockMask:
    """Which blocks of a packed row are visible in full, in part, or not at all.

    Neither evaluated position by position nor synchronising with the device.

    Args:
        segments_BT: document numbers; the fewest blocks are listed if they never decrease along a row.
        window: keys seen by a query, itself included; None for all.
    """
    T = segments_BT.shape[1]

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = (k <= q) & (segments_BT[b, q] == segments_BT[b, k])
        return visible if window is None else visible & (q - k < window)

    part, part_indices, full, full_indices, *by_key = listed_blocks(segments_BT, window or 0)
    return BlockMask(
        (T, T),
        kv_num_blocks=part,
        kv_indices=part_indices,
        full_kv_num_blocks=full,
        full_kv_indices=full_indices,
        q_num_blocks=by_key[0],
        q_indices=by_key[1],
        full_q_num_blocks=by_key[2],
        full_q_indices=by_key[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_visible,
    )


Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("workbench::listed_blocks", mutates_args=())
def listed_blocks(segments_BT: Tensor, window: int) -> Lists:
    """For every block of queries the number (B, 1, N) and the list (B, 1, N, N) of key blocks visible in part, then of
    those visible in full; the same for every block of keys. ``window`` 0 for none.

    A custom operator, since FlexAttention's kernels require these tensors to be contiguous, and the compiler may choose
    other strides when their construction is fused.
    """
    B, T = segments_BT.shape
    N = (T + BLOCK - 1) // BLOCK
    device = segments_BT.device
    # padding belongs to the row's last document: it is cut off by the length, not by the mask
    padded = torch.cat((segments_BT, segments_BT[:, -1:].expand(B, N * BLOCK - T)), dim=1)
    blocks = padded.view(B, N, BLOCK)
    low_BN, high_BN = blocks.amin(-1), blocks.amax(-1)
    i, j = torch.arange(N, device=device)[:, None], torch.arange(N, device=device)[None]
    partly_or_fully = (low_BN[:, :, None] <= high_BN[:, None]) & (high_BN[:, :, None] >= low_BN[:, None]) & (j <= i)
    full = (low_BN[:, :, None] == high_BN[:, None]) & (high_BN[:, :, None] == low_BN[:, None]) & (j < i)
    if window:
        # nearest pair of the two blocks: i·BLOCK - (j·BLOCK + BLOCK - 1) apart; farthest: BLOCK - 1 + (i - j)·BLOCK
        partly_or_fully &= (i - j) * BLOCK - (BLOCK - 1) < window
        full &= (i - j) * BLOCK + BLOCK - 1 < window
    part = partly_or_fully & ~full
    return (*_listed(part), *_listed(full), *_listed(part.mT), *_listed(full.mT))


@listed_blocks.register_fake
def _(segments_BT: Tensor, window: int) -> Lists:
    B, T = segments_BT.shape
    N = (T + BLOCK - 1) // BLOCK

    def one() -> tuple[Tensor, Tensor]:
        return (segments_BT.new_empty(B, 1, N, dtype=torch.int32), segments_BT.new_empty(B, 1, N, N, dtype=torch.int32))

    return (*one(), *one(), *one(), *one())


def _listed(blocks_BNM: Tensor) -> tuple[Tensor, Tensor]:
    """How many booleans are set in each row, and the indices, those of set ones first; contiguous."""
    counts_B1N = blocks_BNM.sum(-1, dtype=torch.int32)[:, None]
    order_BNM = blocks_BNM.to(torch.int8).contiguous().argsort(dim=-1, descending=True, stable=True)
    return counts_B1N.contiguous(), order_BNM.to(torch.int32)[:, None].contiguous()


def attention_flex(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, *, window: int | None = None, segments: Tensor | None = None
) -> Tensor:
    """As :func:`workbench.ops.attention.attention` with as many keys as queries."""
    B, T = q_BTHK.shape[:2]
    if segments is None:
        segments = torch.zeros(B, T, dtype=torch.int32, device=q_BTHK.device)
    call: Any = flex_attention if torch.compiler.is_compiling() else _by_blocks
    out = call(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        block_mask=block_mask(segments, window),
        enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
    )
    return out.transpose(1, 2)
