"""One pass over the scores of a chunk for the losses, one for their gradient, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Scores that one program looks at together."""


@triton.jit
def _kernel(scores, stride, targets, weights, losses, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    target = tl.load(targets + row)
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(scores + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    normaliser = top + tl.log(total)
    there = target >= 0
    own = tl.load(scores + tl.where(there, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(there, normaliser - own, 0.0))
    if GRADIENT:
        weight = tl.where(there, tl.load(weights + row), 0.0)
        tl.debug_barrier()  # every thread has read its target's score before it is overwritten
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(scores + at, mask=at < V, other=-float("inf")).to(tl.float32)
            slope = tl.exp(x - normaliser) - tl.where(at == target, 1.0, 0.0)
            tl.store(scores + at, (slope * weight).to(scores.dtype.element_ty), mask=at < V)


def losses_(scores_CV: Tensor, targets_C: Tensor, weights_C: Tensor, losses_C: Tensor, gradient: bool) -> None:
    """As in :mod:`workbench.ops.cross_entropy.chunked`; rows must be contiguous."""
    C, V = scores_CV.shape
    assert scores_CV.stride(1) == 1 and losses_C.dtype == torch.float32
    block = min(BLOCK, triton.next_power_of_2(V))
    _kernel[(C,)](
        scores_CV,
        scores_CV.stride(0),
        targets_C.contiguous(),
        weights_C.contiguous(),
        losses_C,
        V,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=8,
    )
