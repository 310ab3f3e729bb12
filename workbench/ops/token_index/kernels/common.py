# mypy: allow-untyped-defs
"""What the kernels of a learned index share. Naming as in :mod:`workbench.ops.sparse_attention.kernels.common`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_attention.kernels.common import LOG2E, precision

LAUNCH: dict[str, dict[str, int]] = {
    "scores": {"BT": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "divergence": {"BT": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "gradients": {"BT": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "index_queries": {"BT": 64, "num_warps": 4, "num_stages": 2},
    "index_keys": {"BT": 128, "num_warps": 4, "num_stages": 2},
}
"""Tiles of queries and keys, warps and pipeline stages; not tuned. On the 128 queries of ``index_keys`` see those of
``token_keys`` in :data:`workbench.ops.sparse_attention.kernels.common.LAUNCH`."""

PART_HEADS = 4
"""Programs, at most, that the index heads of a tile of keys are divided among."""


class Heads(NamedTuple):
    """Compile-time constants of products summed over heads."""

    H: int
    """Heads of the queries."""
    G: int
    """Heads of the keys."""
    D: int
    """Channels."""
    DP: int
    """Channels multiplied at once, a power of two; at least 64, since narrower tiles are miscompiled (see
    :mod:`workbench.ops.sparse_attention.kernels`), and 64 where more would not fit into shared memory."""
    PRECISION: str

    @classmethod
    def of(cls, q: Tensor, G: int) -> Heads:
        D = q.shape[-1]
        at_once = 128 if 64 < D <= 128 and q.dtype != torch.float32 else 64
        return cls(q.shape[2], G, D, at_once, precision(q))


class Scored(NamedTuple):
    """Pointers of queries (B, T, H, D), keys (B, S, G, D) and a number per query and head (B, T, H)."""

    q: Tensor
    k: Tensor
    w: Tensor


def same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous, in the wider of their types."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


@triton.jit
def _with_head(b_sum, b_s, b_w, scale, RELU: tl.constexpr):
    if RELU:
        return b_sum + tl.maximum(b_s, 0.0) * b_w[:, None]
    else:
        b_w = tl.where(b_w == -float("inf"), 0.0, b_w)
        return b_sum + tl.exp2(b_s * (scale * LOG2E) - (b_w * LOG2E)[:, None])


@triton.jit
def head_sum(x, i_b, o_t, m_t, o_n, m_n, T, S, scale, heads, RELU: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """(BT, BN) of queries and keys: Σ_h w_h ReLU(q_h · k), or Σ_h exp(scale q_h · k - w_h). Masked rows are zeros of
    queries and keys."""
    CHUNKS: tl.constexpr = (heads.D + heads.DP - 1) // heads.DP
    R: tl.constexpr = heads.H // heads.G
    b_sum = tl.zeros((BT, BN), tl.float32)
    b_s = tl.zeros((BT, BN), tl.float32)
    for i in range(0, heads.H * CHUNKS):
        i_h = i // CHUNKS
        i_chunk = i - i_h * CHUNKS
        o_d = i_chunk * heads.DP + tl.arange(0, heads.DP)
        m_d = o_d < heads.D
        o_q = (i_b * T + o_t) * heads.H + i_h
        o_k = (i_b * S + o_n) * heads.G + i_h // R
        # [BT, DP], [BN, DP]
        b_q = tl.load(x.q + o_q[:, None] * heads.D + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_k = tl.load(x.k + o_k[:, None] * heads.D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_w = tl.load(x.w + o_q, mask=m_t, other=0.0).to(tl.float32)
        if CHUNKS == 1:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=heads.PRECISION)
            b_sum = _with_head(b_sum, b_s, b_w, scale, RELU)
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=heads.PRECISION)
            if i_chunk == CHUNKS - 1:
                b_sum = _with_head(b_sum, b_s, b_w, scale, RELU)
                b_s = tl.zeros((BT, BN), tl.float32)
    return b_sum
