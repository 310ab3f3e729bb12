# mypy: allow-untyped-defs
"""Softmax scores of every head, their mean weights, and the choice of blocks or tokens by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.ops.sparse_decoding.kernels.choice import choose_blocks, choose_tokens, select
from workbench.ops.sparse_decoding.kernels.common import (
    LOG2E,
    TILE,
    candidate_rows,
    ends_last,
    padded,
    precision,
    settings_of,
)
from workbench.ops.sparse_decoding.layout import Forced, Searched, TokenKeys


@triton.jit
def _scores_kernel(
    q,
    channels,
    keys,
    steps,
    lengths,
    listed,
    first_listed,
    scores,
    partial,
    q_b,
    q_h,
    S,
    M,
    scale,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    CODES: tl.constexpr,
    GATHER: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    J: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """log2 of the unnormalised weight of every candidate, per head, and maximum and sum over the tile.

    Rows of ``keys`` stand for UNIT tokens each, whose number is added as its logarithm.
    """
    i_bg = tl.program_id(1).to(tl.int64)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    length = tl.load(lengths + i_b).to(tl.int32)
    o_m, o_r = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, RP)
    at_J = i_bg * J
    b_row, m_m = candidate_rows(listed + at_J, first_listed + at_J, o_m, length, M, J, BLOCK, UNIT, NEWEST, FIRST)
    b_score = tl.zeros((RP, BM), tl.float32)
    p_q = q + i_b * q_b + (i_g * R + o_r)[:, None] * q_h
    m_r = o_r < R
    for start in tl.static_range(0, C // 2 if CODES else C, CHANNELS):
        o_c = start + tl.arange(0, CHANNELS)
        m_c = o_c < (C // 2 if CODES else C)
        b_key = tl.load(
            keys + (i_bg * S + b_row)[:, None] * (C // 2 if CODES else C) + o_c[None, :],
            mask=m_m[:, None] & m_c[None, :],
            other=0,
        )
        b_channel = o_c
        if GATHER:
            b_channel = tl.load(channels + i_g * C + o_c, mask=m_c, other=0)
        b_q = tl.load(p_q + b_channel[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
        if CODES:
            b_low = ((b_key & 15).to(tl.float32) - 8.0).to(b_q.dtype)
            b_high = ((b_key >> 4).to(tl.float32) - 8.0).to(b_q.dtype)
            b_channel = o_c + C // 2
            if GATHER:
                b_channel = tl.load(channels + i_g * C + C // 2 + o_c, mask=m_c, other=0)
            b_q_high = tl.load(p_q + b_channel[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
            b_score = tl.dot(b_q, tl.trans(b_low), b_score, input_precision=PRECISION)
            b_score = tl.dot(b_q_high, tl.trans(b_high), b_score, input_precision=PRECISION)
        else:
            b_score = tl.dot(b_q, tl.trans(b_key.to(b_q.dtype)), b_score, input_precision=PRECISION)
    b_score *= scale * LOG2E
    if CODES:
        b_step = tl.load(steps + i_bg * S + b_row, mask=m_m, other=0.0).to(tl.float32)
        b_score *= b_step[None, :]
    if UNIT > 1:
        b_score += tl.log2(tl.minimum(tl.maximum(length - o_m * UNIT, 1), UNIT).to(tl.float32))[None, :]
    b_score = tl.where(m_m[None, :], b_score, -float("inf"))
    o_h = i_b * GROUPS * R + i_g * R + o_r
    tl.store(scores + o_h[:, None] * M + o_m[None, :], b_score, mask=m_r[:, None] & (o_m < M)[None, :])
    b_max = tl.max(b_score, axis=1)
    b_sum = tl.sum(tl.exp2(b_score - tl.where(b_max == -float("inf"), 0.0, b_max)[:, None]), axis=1)
    p_partial = partial + (o_h * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(p_partial, b_max, mask=m_r)
    tl.store(p_partial + 1, b_sum, mask=m_r)


@triton.jit
def _weights_kernel(
    scores,
    partial,
    lengths,
    listed,
    first_listed,
    weights,
    chosen,
    tickets,
    M,
    N,
    TILES,
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
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
    TP: tl.constexpr,
    FUSED: tl.constexpr,
    BN: tl.constexpr,
):
    """Mean over the heads of a group of their softmax weights, summed over PER candidates that follow each other.

    These are sub-blocks where BLOCKS, and blocks are chosen; otherwise tokens."""
    i_bg = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + i_bg // GROUPS).to(tl.int32)
    o_r, o_t = tl.arange(0, RP), tl.arange(0, TP)
    o_h, m_r = i_bg * R + o_r, o_r < R
    b_max, b_sum = tl.full((RP,), -float("inf"), tl.float32), tl.zeros((RP,), tl.float32)
    for start in range(0, TILES, TP):
        p_partial = partial + (o_h[:, None] * TILES + start + o_t[None, :]) * 2
        mask = m_r[:, None] & (start + o_t < TILES)[None, :]
        b_tile_max = tl.load(p_partial, mask=mask, other=-float("inf"))
        b_tile_sum = tl.load(p_partial + 1, mask=mask, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_tile_max, axis=1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(b_tile_sum * tl.exp2(b_tile_max - b_safe[:, None]), axis=1)
        b_max = b_new
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
    o_m = tl.program_id(0) * BN * PER + tl.arange(0, BN * PER)
    b_score = tl.load(
        scores + o_h[:, None] * M + o_m[None, :], mask=m_r[:, None] & (o_m < M)[None, :], other=-float("inf")
    )
    b_weight = tl.sum(tl.exp2(b_score - b_lse[:, None]), axis=0) / R
    if PER > 1:
        b_weight = tl.sum(tl.reshape(b_weight, (BN, PER)), axis=1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(weights + i_bg * N + o_n, b_weight, mask=o_n < N)
    if FUSED:  # noqa: SIM102  (one condition for the compiler)
        if ends_last(tickets + i_bg, tl.num_programs(0)):
            if BLOCKS:
                choose_blocks(weights + i_bg * N, chosen + i_bg * COUNT, length, COUNT, BLOCK, SINK, LOCAL, NP)
            else:
                choose_tokens(
                    weights + i_bg * N,
                    listed + i_bg * J,
                    first_listed + i_bg * J,
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


class Head(NamedTuple):
    """Scores (log2 units) of every candidate per head, (B, H, M), and what a tile of them adds up to."""

    scores: Tensor
    partial: Tensor
    tiles: int


def _head_scores(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    listed_BGJ: Tensor | None,
    first_BGJ: Tensor | None,
    *,
    block: int,
    newest: bool,
    unit: int,
    scale: float,
) -> Head:
    B, G, S, width = keys.keys_BGSc.shape
    H, q_BHK, settings = q_BHK.shape[1], q_BHK.contiguous(), settings_of("scores")
    J = 0 if listed_BGJ is None else listed_BGJ.shape[2]
    M = J * block + newest if J else S
    tiles = triton.cdiv(M, settings["BM"])
    scores = torch.empty(B, H, M, dtype=torch.float32, device=q_BHK.device)
    partial = torch.empty(B, H, tiles, 2, dtype=torch.float32, device=q_BHK.device)
    codes = keys.steps_BGS is not None
    _scores_kernel[(tiles, B * G)](
        q_BHK,
        keys.channels_Gc,
        keys.keys_BGSc,
        keys.steps_BGS,
        lengths_B,
        listed_BGJ if J else lengths_B,
        first_BGJ if first_BGJ is not None else lengths_B,
        scores,
        partial,
        q_BHK.stride(0),
        q_BHK.stride(1),
        S,
        M,
        scale,
        GROUPS=G,
        R=H // G,
        RP=padded(H // G),
        C=width * (2 if codes else 1),
        CHANNELS=min(128 if width % 128 == 0 else 64, padded(width)),
        CODES=codes,
        GATHER=keys.channels_Gc is not None,
        UNIT=unit,
        BLOCK=block,
        J=J,
        NEWEST=newest,
        FIRST=first_BGJ is not None,
        PRECISION=precision(q_BHK),
        **settings,
    )
    return Head(scores, partial, tiles)


def _weigh(
    heads: Head,
    lengths_B: Tensor,
    listed_BGJ: Tensor | None,
    first_BGJ: Tensor | None,
    tickets: Tensor | None,
    *,
    groups: int,
    block: int,
    newest: bool,
    per: int | None,
    count: int,
    forced: Forced,
) -> tuple[Tensor, Tensor | None]:
    """Mean weights of the candidates, or of blocks of ``per`` sub-blocks, and the choice where one program makes it."""
    B, H, M = heads.scores.shape
    J = 0 if listed_BGJ is None else listed_BGJ.shape[2]
    is_blocks, per = per is not None, per or 1
    length = J * block if J else M // per
    settings = settings_of("weights")
    fused = bool(settings.pop("fused")) and length <= TILE and tickets is not None
    N = length if fused or not J else M
    settings["BN"] = max(16, settings["BN"] // triton.next_power_of_2(per * max(1, H // groups // 4)))
    weights = torch.empty(B, groups, N, dtype=torch.float32, device=lengths_B.device)
    chosen = torch.empty(B, groups, count, dtype=torch.int64, device=lengths_B.device) if fused else None
    _weights_kernel[(triton.cdiv(N, settings["BN"]), B * groups)](
        heads.scores,
        heads.partial,
        lengths_B,
        listed_BGJ if J else lengths_B,
        first_BGJ if first_BGJ is not None else lengths_B,
        weights,
        chosen,
        tickets,
        M,
        N,
        heads.tiles,
        GROUPS=groups,
        R=H // groups,
        RP=triton.next_power_of_2(H // groups),
        PER=per,
        BLOCKS=is_blocks,
        COUNT=count,
        BLOCK=block,
        J=J,
        SINK=forced.sink,
        LOCAL=forced.local,
        NEWEST=newest,
        FIRST=first_BGJ is not None,
        NP=padded(length),
        TP=min(64, padded(heads.tiles)),
        FUSED=fused,
        **settings,
    )
    return weights, chosen


def mean_blocks(
    q_BHK: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    sub_block: int,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    keys = TokenKeys(means_BGNK, None, None)
    heads = _head_scores(q_BHK, keys, lengths_B, None, None, block=block, newest=False, unit=sub_block, scale=scale)
    weights, chosen = _weigh(
        heads,
        lengths_B,
        None,
        None,
        tickets,
        groups=means_BGNK.shape[1],
        block=block,
        newest=False,
        per=block // sub_block,
        count=count,
        forced=forced,
    )
    return select(weights, lengths_B, count, forced, block) if chosen is None else chosen


def channel_tokens(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    searched: Searched | None,
    scale: float,
    count: int,
    forced: Forced,
    tickets: Tensor | None,
) -> Tensor:
    listed, first, block, newest = (None, None, 1, False) if searched is None else searched
    same: dict[str, Any] = {"block": block, "newest": newest}
    heads = _head_scores(q_BHK, keys, lengths_B, listed, first, unit=1, scale=scale, **same)
    groups = keys.keys_BGSc.shape[1]
    weights, chosen = _weigh(
        heads, lengths_B, listed, first, tickets, groups=groups, per=None, count=count, forced=forced, **same
    )
    if chosen is not None:
        return chosen
    positions = None if searched is None else searched.tokens(lengths_B)
    return select(weights, lengths_B, count, forced, 1, positions)
