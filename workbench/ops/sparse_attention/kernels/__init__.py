"""Triton kernels of sparse attention. Arguments and results as in :mod:`workbench.ops.sparse_attention.chunked`.

:mod:`.visible` is flash attention (arXiv 2307.08691) over the blocks visible to each query, with bounds per query.

:mod:`.select` recomputes the probabilities of pooled blocks from the log-sum-exp, tile by tile, and finds the n-th
largest score by bisection over the bits of its floating-point number: the cost does not grow with n.

:mod:`.selected` is attention over selected blocks:

- a program of the forward pass, and of the gradient of queries, holds the heads of one group at one position, or at
  several positions that fill a tensor-core tile of 16 rows together (4 positions of 4 heads). It streams the keys of
  every block that any of the positions selects, with one bit per position;
- gradients of keys and values are computed block by block: a byte map marks which positions select each block, its rows
  are compacted into lists, and the list of a block is cut into items of equal size, since the first block of a document
  is selected by all positions. Items write partial sums that are added in a fixed order: no atomics, so results are
  bitwise reproducible.

:mod:`.tokens` is flash attention to selected single tokens, which :mod:`.marks` has as bits of pairs.

Values that are channels of the keys are read once, together with them.

Products never take a transposed accumulator: Triton 3.4 to 3.6 miscompiles ``dot(trans(dot(a, b)), c)`` on Hopper.
Assemblers before CUDA 13.1 (Triton 3.6 has 12.8) are reported to corrupt wgmma products with an operand in registers,
up to illegal accesses (fla-org/flash-linear-attention, pull request 1262; triton-lang/triton, issues 11366 and 11781).
Heads narrower than 64 channels are therefore launched with two warps, which use other instructions.

Launch settings are fixed; nothing is autotuned at run time.
"""

from workbench.ops.sparse_attention.kernels import tokens
from workbench.ops.sparse_attention.kernels.select import select
from workbench.ops.sparse_attention.kernels.selected import selected_backward, selected_forward
from workbench.ops.sparse_attention.kernels.visible import visible_backward, visible_forward

__all__ = ["select", "selected_backward", "selected_forward", "tokens", "visible_backward", "visible_forward"]
