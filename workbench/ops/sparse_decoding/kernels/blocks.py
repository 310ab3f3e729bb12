# mypy: allow-untyped-defs
"""The choice of blocks by bounds of their scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.choice import choose_blocks, select
from workbench.ops.sparse_decoding.kernels.common import TILE, ends_last, padded, settings_of, warps_for
from workbench.ops.sparse_decoding.layout import Forced


@triton.jit
def _minmax_kernel(
    q,
    upper,
    lower,
    lengths,
    scores,
    chosen,
    tickets,
    q_b,
    q_h,
    N,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BN: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NP: tl.constexpr,
    FUSED: tl.constexpr,
):
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    length = tl.load(lengths + i_b).to(tl.int32)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < (length + BLOCK - 1) // BLOCK
    if tl.program_id(0) * BN * BLOCK < length:
        o_r = tl.arange(0, RP)
        b_score = tl.zeros((BN,), tl.float32)
        for start in tl.static_range(0, K, CHANNELS):
            o_k = start + tl.arange(0, CHANNELS)
            m_k = o_k < K
            p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h + o_k[None, :]
            b_q = tl.load(p_q, mask=(o_r < R)[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            b_positive, b_negative = tl.sum(tl.maximum(b_q, 0.0), axis=0), tl.sum(tl.minimum(b_q, 0.0), axis=0)
            at = (i_bg * N + o_n)[:, None] * K + o_k[None, :]
            mask = m_n[:, None] & m_k[None, :]
            b_upper = tl.load(upper + at, mask=mask, other=0.0).to(tl.float32)
            b_lower = tl.load(lower + at, mask=mask, other=0.0).to(tl.float32)
            b_score += tl.sum(b_upper * b_positive[None, :] + b_lower * b_negative[None, :], axis=1)
        tl.store(scores + i_bg * N + o_n, b_score, mask=m_n)
    if FUSED:  # noqa: SIM102  (one condition for the compiler)
        if ends_last(tickets + i_bg, tl.num_programs(0)):
            choose_blocks(scores + i_bg * N, chosen + i_bg * COUNT, length, COUNT, BLOCK, SINK, LOCAL, NP)


def minmax_blocks(
    q_BHK: Tensor,
    upper_BGNK: Tensor,
    lower_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    B, G, N, K = upper_BGNK.shape
    H, settings, q_BHK = q_BHK.shape[1], settings_of("minmax", K > 256), q_BHK.contiguous()
    fused = bool(settings.pop("fused")) and N <= TILE and tickets is not None
    if fused:
        settings["num_warps"] = warps_for(padded(N), settings["num_warps"])
    scores = torch.empty(B, G, N, dtype=torch.float32, device=q_BHK.device)
    chosen = torch.empty(B, G, count, dtype=torch.int64, device=q_BHK.device)
    _minmax_kernel[(triton.cdiv(N, settings["BN"]), B * G)](
        q_BHK,
        upper_BGNK,
        lower_BGNK,
        lengths_B,
        scores,
        chosen,
        tickets,
        q_BHK.stride(0),
        q_BHK.stride(1),
        N,
        GROUPS=G,
        R=H // G,
        RP=triton.next_power_of_2(H // G),
        K=K,
        CHANNELS=min(128 if K % 128 == 0 else 64, padded(K)),
        COUNT=count,
        BLOCK=block,
        SINK=forced.sink,
        LOCAL=forced.local,
        NP=padded(N),
        FUSED=fused,
        **settings,
    )
    return chosen if fused else select(scores, lengths_B, count, forced, block)
