"""Cross-entropy of one chunk on GPUs: one pass over the scores for the losses, and one for their gradient, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Scores that one program loads at once."""


@triton.jit
def _kernel(scores, stride, targets, weights, losses, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i_row = tl.program_id(0).to(tl.int64)
    scores += i_row * stride
    target = tl.load(targets + i_row)
    # 1. log-sum-exp, online
    b_max = -float("inf")
    b_sum = 0.0
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_x = tl.load(scores + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
        b_max_new = tl.maximum(b_max, tl.max(b_x, axis=0))
        b_sum = b_sum * tl.exp(b_max - b_max_new) + tl.sum(tl.exp(b_x - b_max_new), axis=0)
        b_max = b_max_new
    b_lse = b_max + tl.log(b_sum)
    # 2. loss
    has_target = target >= 0
    b_score = tl.load(scores + tl.where(has_target, target, 0)).to(tl.float32)
    tl.store(losses + i_row, tl.where(has_target, b_lse - b_score, 0.0))
    # 3. gradient
    if GRADIENT:
        weight = tl.where(has_target, tl.load(weights + i_row), 0.0)
        tl.debug_barrier()  # every thread has read its target's score before it is overwritten
        for start in range(0, V, BLOCK):
            o_v = start + tl.arange(0, BLOCK)
            b_x = tl.load(scores + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
            b_dx = tl.exp(b_x - b_lse) - tl.where(o_v == target, 1.0, 0.0)
            tl.store(scores + o_v, (b_dx * weight).to(scores.dtype.element_ty), mask=o_v < V)


def losses_(scores_CV: Tensor, targets_C: Tensor, weights_C: Tensor, losses_C: Tensor, gradient: bool) -> None:
    """As in :mod:`workbench.ops.cross_entropy.chunked`; rows must be contiguous."""
    C, V = scores_CV.shape
    assert scores_CV.stride(1) == 1 and losses_C.dtype == torch.float32
    block = min(BLOCK, triton.next_power_of_2(V))
    tensors = (targets_C.contiguous(), weights_C.contiguous(), losses_C)
    _kernel[(C,)](scores_CV, scores_CV.stride(0), *tensors, V, GRADIENT=gradient, BLOCK=block, num_warps=8)
