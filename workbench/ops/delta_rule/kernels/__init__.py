"""The delta rule on GPUs: chunks of 64 tokens in parallel, and one short scan over chunks for the states.

With ẽ = β e, ṽ = β v and G the running sum of g inside a chunk (the form of :mod:`..torch`; DeltaNet's WY form, arXiv
2406.06484, with the channel-wise decay of arXiv 2510.26692):

    T_rs = Σ_c ẽ_rc k_sc exp(G_rc - G_sc), s < r      M_rs = Σ_c q_rc k_sc exp(G_rc - G_sc), s <= r      A = (I + T)⁻¹
    Y = A (ẽ exp G)     U = A ṽ     R = U - Y S     o = (q exp G) S + M R     S' = exp(G_C) S + (k exp(G_C - G))ᵀ R

Three choices are our own. Channel-wise decay inside a chunk is computed in levels of halves: rows of an odd block of L
tokens are multiplied with columns of the even block before it, relative to the boundary between them, so every exponent
is a sum of non-positive terms and every level is one ordinary matrix product. Where no channel loses more than 64 nats
between the middle of a chunk and either end, the middle is the reference of all its pairs: one product instead of six.
The inverse grows from blocks of 1 to blocks of 64 by X <- X - X T_L X, T_L the part of T that joins two neighbours:
there are no powers of T, so repeated keys do no harm. The backward pass recomputes Y, U and the states; only A and M
are saved.

Triton 3.4 to 3.7.0 miscompiles some products on Hopper GPUs (fla-org/flash-linear-attention, issues 640 and 984; seen
here with tiles of 32 key channels in the last kernel: an illegal access). Transposed matrices are therefore loaded from
memory, not made from the result of a product, and only configurations that the tests have compared on a GPU are
launched.

:mod:`.chunk` computes what a chunk needs before its incoming state is known, :mod:`.scan` passes states from chunk to
chunk in both directions, :mod:`.backward` computes the gradients of the inputs, :mod:`.launch` is the operator.

Legend: B batch, T time, H heads, K key channels, V value channels, N chunks, C = 64 tokens of a chunk. Naming in the
kernels, as in flash-linear-attention: ``i_`` program indices, ``o_`` offsets of a tile, ``m_`` masks, ``b_`` tiles in
registers; k is the write key, e the erase key.
"""

from workbench.ops.delta_rule.kernels.launch import delta_rule_triton

__all__ = ["delta_rule_triton"]
