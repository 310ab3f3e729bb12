"""Triton kernels of a learned index. Arguments and results as in :mod:`workbench.ops.token_index.chunked`.

:mod:`.selection`   index scores of a chunk of queries, whose n-th largest is found by bisection over its bits (the
                    choice of :mod:`workbench.ops.sparse_decoding.kernels`): the cost does not grow with n
:mod:`.divergence`  attention and index scores of a tile of pairs side by side, without a T × T tensor of either

Which keys are summed over, all visible ones or the selected ones, is one bit for each pair of a chunk
(:mod:`workbench.ops.sparse_attention.kernels.marks`), so that both stages of training run the same kernels; tiles
without a bit are skipped. Sums have a fixed order and no floating-point atomics: results are bitwise reproducible.

Floors, for T = 8,192, H = 16 heads of K = 64, J = 4 of X = 64, bf16, P = T²/2 visible pairs:

    index scores, once            2 J X P     17 GFLOP   (J = 64 of X = 128: 550)
    attention scores, once        2 H K P     69 GFLOP
    selection                     index scores, written and read once: 4 P = 134 MB, in chunks of 64 MiB
    divergence, forward           attention scores twice (log-sum-exp, then p), index scores once: 155 GFLOP
    divergence, backward          attention scores once, index scores three times and two products more: 155 GFLOP;
                                  the gradient of the scores in bf16, 2 P written, and read by J + J heads

At 400 TFLOP/s the warm-up's divergence would take 0.8 ms forward and backward; an H200 takes 6.7 ms (docs/speed.md).
"""

from workbench.ops.token_index.kernels.divergence import divergence, divergence_backward
from workbench.ops.token_index.kernels.selection import select

__all__ = ["divergence", "divergence_backward", "select"]
