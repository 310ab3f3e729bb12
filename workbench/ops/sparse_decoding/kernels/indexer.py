# mypy: allow-untyped-defs
"""Scores of a learned indexer, of tokens or of the mean keys of blocks, and the choice by them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.choice import choose_blocks, choose_tokens, select
from workbench.ops.sparse_decoding.kernels.common import (
    TILE,
    candidate_rows,
    ends_last,
    padded,
    precision,
    settings_of,
    warps_for,
)
from workbench.ops.sparse_decoding.layout import Forced, Searched


@triton.jit
def _indexer_kernel(
    q,
    weights,
    keys,
    lengths,
    listed,
    first_listed,
    scores,
    chosen,
    tickets,
    q_b,
    q_h,
    S,
    M,
    N,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    PER: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    NP: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    """Weighted sum over the heads of a group of ReLU(q · k), summed over PER rows that follow each other.

    These are sub-blocks of UNIT tokens where BLOCKS, and blocks are chosen; otherwise tokens."""
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    length = tl.load(lengths + i_b).to(tl.int32)
    o_m, o_r = tl.program_id(0) * BN * PER + tl.arange(0, BN * PER), tl.arange(0, RP)
    at_J = i_bg * J
    b_row, m_m = candidate_rows(listed + at_J, first_listed + at_J, o_m, length, M, J, BLOCK, UNIT, NEWEST, FIRST)
    m_r = o_r < R
    b_product = tl.zeros((RP, BN * PER), tl.float32)
    p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h
    for start in tl.static_range(0, K, CHANNELS):
        o_k = start + tl.arange(0, CHANNELS)
        m_k = o_k < K
        p_key = keys + (i_bg * S + b_row)[:, None] * K + o_k[None, :]
        b_key = tl.load(p_key, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_q = tl.load(p_q + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_product = tl.dot(b_q, tl.trans(b_key.to(b_q.dtype)), b_product, input_precision=PRECISION)
    b_weight = tl.load(weights + (i_b * GROUPS + i_g) * R + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_score = tl.sum(tl.maximum(b_product, 0.0) * b_weight[:, None], axis=0)
    if PER > 1:
        b_score = tl.sum(tl.reshape(b_score, (BN, PER)), axis=1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(scores + i_bg * N + o_n, b_score, mask=o_n < N)
    if FUSED:  # noqa: SIM102  (one condition for the compiler)
        if ends_last(tickets + i_bg, tl.num_programs(0)):
            if BLOCKS:
                choose_blocks(scores + i_bg * N, chosen + i_bg * COUNT, length, COUNT, BLOCK, SINK, LOCAL, NP)
            else:
                choose_tokens(
                    scores + i_bg * N,
                    listed + at_J,
                    first_listed + at_J,
                    chosen + i_bg * COUNT,
                    length,
                    COUNT,
                    BLOCK,
                    J,
                    SINK,
                    LOCAL,
                    NEWEST,
                    FIRST,
                    NP,
                )


def _best(
    q_BHK: Tensor,
    weights_BH: Tensor,
    keys_BGSK: Tensor,
    lengths_B: Tensor,
    searched: Searched | None,
    tickets: Tensor | None,
    *,
    block: int,
    sub_block: int | None,
    count: int,
    forced: Forced,
) -> Tensor:
    """The best blocks of rows that are means of ``sub_block`` tokens, or the best tokens, of rows that are theirs."""
    B, G, S, K = keys_BGSK.shape
    H, q_BHK, weights_BH, settings = q_BHK.shape[1], q_BHK.contiguous(), weights_BH.contiguous(), settings_of("indexer")
    listed, first, block, newest = (None, None, block, False) if searched is None else searched
    J = 0 if listed is None else listed.shape[2]
    unit, per = (1, 1) if sub_block is None else (sub_block, block // sub_block)
    M = J * block + newest if J else S
    length = J * block if J else S // per  # what one program chooses from; the newest token is beside it
    fused = bool(settings.pop("fused")) and length <= TILE and tickets is not None
    N = length if fused or not J else M
    settings["BN"] = max(1, settings.pop("rows") // per)
    if fused:
        settings["num_warps"] = warps_for(padded(length), settings["num_warps"])
    scores = torch.empty(B, G, N, dtype=torch.float32, device=q_BHK.device)
    chosen = torch.empty(B, G, count, dtype=torch.int64, device=q_BHK.device)
    _indexer_kernel[(triton.cdiv(N, settings["BN"]), B * G)](
        q_BHK,
        weights_BH,
        keys_BGSK,
        lengths_B,
        lengths_B if listed is None else listed,
        lengths_B if first is None else first,
        scores,
        chosen,
        tickets,
        q_BHK.stride(0),
        q_BHK.stride(1),
        S,
        M,
        N,
        GROUPS=G,
        R=H // G,
        RP=padded(H // G),
        K=K,
        CHANNELS=min(128 if K % 128 == 0 else 64, padded(K)),
        UNIT=unit,
        PER=per,
        BLOCKS=sub_block is not None,
        COUNT=count,
        BLOCK=block,
        J=J,
        SINK=forced.sink,
        LOCAL=forced.local,
        NEWEST=newest,
        FIRST=first is not None,
        NP=padded(length),
        FUSED=fused,
        PRECISION=precision(q_BHK),
        **settings,
    )
    if fused:
        return chosen
    positions = None if searched is None else searched.tokens(lengths_B)
    return select(scores, lengths_B, count, forced, block if sub_block else 1, positions)


def indexer_blocks(
    q_BHK: Tensor,
    weights_BH: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    sub_block: int,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    options = {"block": block, "sub_block": sub_block, "count": count, "forced": forced}
    return _best(q_BHK, weights_BH, means_BGNK, lengths_B, None, tickets, **options)  # type: ignore[arg-type]


def indexer_tokens(
    q_BHK: Tensor,
    weights_BH: Tensor,
    keys_BGSK: Tensor,
    lengths_B: Tensor,
    searched: Searched | None,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    options = {"block": 1, "sub_block": None, "count": count, "forced": forced}
    return _best(q_BHK, weights_BH, keys_BGSK, lengths_B, searched, tickets, **options)  # type: ignore[arg-type]
