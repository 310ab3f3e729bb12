"""Plain torch, any device. Legend as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.ops.sparse_decoding.layout import Forced, IndexReads, Pool, Searched, TokenKeys, tokens_in, tokens_of

LEVELS = 7
"""Largest code of four bits with sign; -8 is not used, so that codes are symmetric."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(q_BHK: Tensor, G: int) -> Tensor:
    """(B, G, H/G, K)"""
    return _wide(q_BHK).unflatten(1, (G, -1))


def minmax_scores(q_BHK: Tensor, upper_BGNK: Tensor, lower_BGNK: Tensor) -> Tensor:
    """(B, G, N) bounds, see :func:`workbench.ops.sparse_decoding.minmax_blocks`."""
    q_BGRK = _grouped(q_BHK, upper_BGNK.shape[1])
    positive_BGK, negative_BGK = q_BGRK.clamp_min(0).sum(2), q_BGRK.clamp_max(0).sum(2)
    return torch.einsum("bgk,bgnk->bgn", positive_BGK, _wide(upper_BGNK)) + torch.einsum(
        "bgk,bgnk->bgn", negative_BGK, _wide(lower_BGNK)
    )


def mean_scores(q_BHK: Tensor, means_BGNK: Tensor, counts_BN: Tensor, scale: float) -> Tensor:
    """(B, G, N) masses of sub-blocks, see :func:`workbench.ops.sparse_decoding.mean_blocks`; 0 for those without
    tokens, whatever their mean."""
    scores_BGRN = torch.einsum("bgrk,bgnk->bgrn", _grouped(q_BHK, means_BGNK.shape[1]) * scale, _wide(means_BGNK))
    scores_BGRN = scores_BGRN + counts_BN.to(scores_BGRN.dtype).log()[:, None, None]
    return _mean_softmax(scores_BGRN, (counts_BN > 0)[:, None])


def _mean_softmax(scores_BGRM: Tensor, valid_BGM: Tensor) -> Tensor:
    """Mean over heads of the softmax over valid entries, 0 elsewhere."""
    masked_BGRM = scores_BGRM.masked_fill(~valid_BGM[:, :, None], -torch.inf)
    weights_BGM = masked_BGRM.softmax(-1).mean(2)
    return weights_BGM.masked_fill(~valid_BGM, 0.0)  # a row without candidates is NaN before


def quantised(x_c: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric four-bit codes (…, c/2) of (…, c), two to a byte, and the size of a step (…) in fp16 (ours).

    The step is the largest magnitude over 7, one per key and group. Channel i is the low half of byte i, channel i +
    c/2 the high half.
    """
    step = (_wide(x_c).abs().amax(-1) / LEVELS).to(torch.float16)
    codes_c = (_wide(x_c) / step[..., None].to(_wide(x_c).dtype).clamp_min(torch.finfo(torch.float16).tiny)).round()
    low, high = (codes_c.clamp(-LEVELS, LEVELS) + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4), step


def unpacked(codes_c: Tensor) -> Tensor:
    """(…, c) codes of -7 to 7, int8, from (…, c/2) bytes."""
    return torch.cat((codes_c & 15, codes_c >> 4), dim=-1).to(torch.int8) - 8


def select(
    scores_BGN: Tensor,
    lengths_B: Tensor,
    count: int,
    forced: Forced,
    unit: int = 1,
    positions_BGN: Tensor | None = None,
) -> Tensor:
    """The best units of ``unit`` tokens: (B, G, n) positions, ascending, -1 behind them.

    Args:
        scores_BGN: of every unit; those without tokens may have any.
        count: how many, at most.
        forced: those that overlap these tokens come first.
        positions_BGN: what is chosen from, ascending, -1 for none. None: all units.
    """
    every_N = torch.arange(scores_BGN.shape[-1], device=scores_BGN.device)
    position = every_N.expand(1, 1, -1) if positions_BGN is None else positions_BGN
    lengths_B11 = lengths_B[:, None, None]
    valid = (position >= 0) & (position * unit < lengths_B11)
    is_local = position >= (lengths_B11 - forced.local).clamp_min(0) // unit
    is_forced = (position * unit < forced.sink) | is_local
    ranked = scores_BGN.masked_fill(is_forced, torch.inf).masked_fill(~valid, -torch.inf)
    last = ranked.topk(count).values[..., -1:]
    above, equal = ranked > last, (ranked == last) & valid
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    slot = (chosen.cumsum(-1) - 1).where(chosen, count)
    out = torch.full((*ranked.shape[:2], count + 1), -1, device=ranked.device)
    return out.scatter_(-1, slot, position.expand_as(ranked))[..., :count].contiguous()


def minmax_blocks(
    q_BHK: Tensor, upper_BGNK: Tensor, lower_BGNK: Tensor, lengths_B: Tensor, block: int, count: int, forced: Forced
) -> Tensor:
    return select(minmax_scores(q_BHK, upper_BGNK, lower_BGNK), lengths_B, count, forced, block)


def mean_blocks(
    q_BHK: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    sub_block: int,
    scale: float,
    count: int,
    forced: Forced,
) -> Tensor:
    first_N = torch.arange(means_BGNK.shape[2], device=lengths_B.device) * sub_block
    counts_BN = (lengths_B[:, None] - first_N).clamp(0, sub_block)
    masses_BGN = mean_scores(q_BHK, means_BGNK, counts_BN, scale)
    return select(masses_BGN.unflatten(-1, (-1, block // sub_block)).sum(-1), lengths_B, count, forced, block)


def channel_scores(
    q_BHK: Tensor, keys: TokenKeys, tokens_BGM: Tensor | None, valid_BGM: Tensor, scale: float
) -> Tensor:
    """(B, G, M) weights of candidates, 0 where invalid, see :func:`workbench.ops.sparse_decoding.channel_tokens`.

    Args:
        tokens_BGM: positions of the candidates, any number where invalid. None: every token is a candidate, M = S.
        valid_BGM: (B, G or 1, M) which candidates exist.
    """
    keys_BGMc, steps_BGM = keys.keys_BGSc, keys.steps_BGS
    if tokens_BGM is not None:
        index = tokens_BGM.where(valid_BGM, 0)
        keys_BGMc = _rows(keys_BGMc, index)
        steps_BGM = None if steps_BGM is None else steps_BGM.gather(2, index)
    if keys.channels_Gc is not None:
        channels_Hc = keys.channels_Gc.repeat_interleave(q_BHK.shape[1] // keys_BGMc.shape[1], dim=0)
        q_BHK = q_BHK.gather(-1, channels_Hc.expand(len(q_BHK), -1, -1))
    q_BGRc = _grouped(q_BHK, keys_BGMc.shape[1]) * scale
    if steps_BGM is None:
        scores_BGRM = torch.einsum("bgrc,bgmc->bgrm", q_BGRc, keys_BGMc.to(q_BGRc.dtype))
    else:
        scores_BGRM = torch.einsum("bgrc,bgmc->bgrm", q_BGRc, unpacked(keys_BGMc).to(q_BGRc.dtype))
        scores_BGRM = scores_BGRM * steps_BGM[:, :, None].to(q_BGRc.dtype)
    return _mean_softmax(scores_BGRM, valid_BGM)


def _rows(x_BGSX: Tensor, index_BGM: Tensor) -> Tensor:
    """(B, G, M, X)"""
    return x_BGSX.gather(2, index_BGM[..., None].expand(-1, -1, -1, x_BGSX.shape[-1]))


def channel_tokens(
    q_BHK: Tensor,
    keys: TokenKeys,
    lengths_B: Tensor,
    searched: Searched | None,
    scale: float,
    count: int,
    forced: Forced,
) -> Tensor:
    positions, valid = _candidates(searched, keys.keys_BGSc.shape[2], lengths_B)
    return select(channel_scores(q_BHK, keys, positions, valid, scale), lengths_B, count, forced, 1, positions)


def _candidates(searched: Searched | None, S: int, lengths_B: Tensor) -> tuple[Tensor | None, Tensor]:
    """Their positions, None for all S, and which exist."""
    if searched is None:
        return None, torch.arange(S, device=lengths_B.device) < lengths_B[:, None, None]
    positions = searched.tokens(lengths_B)
    return positions, positions >= 0


def indexer_scores(q_BHK: Tensor, weights_BH: Tensor, keys_BGMK: Tensor) -> Tensor:
    """(B, G, M) Σ_h w_h ReLU(q_h · k), see :func:`workbench.ops.sparse_decoding.indexer_tokens`."""
    q_BGRK = _grouped(q_BHK, keys_BGMK.shape[1])
    products_BGRM = torch.einsum("bgrk,bgmk->bgrm", q_BGRK, keys_BGMK.to(q_BGRK.dtype)).relu_()
    return products_BGRM.mul_(weights_BH.view(*q_BGRK.shape[:3], 1)).sum(2)


def indexer_blocks(
    q_BHK: Tensor,
    weights_BH: Tensor,
    means_BGNK: Tensor,
    lengths_B: Tensor,
    block: int,
    sub_block: int,
    count: int,
    forced: Forced,
) -> Tensor:
    first_N = torch.arange(means_BGNK.shape[2], device=lengths_B.device) * sub_block
    exists_B1N = (first_N < lengths_B[:, None])[:, None]
    scores_BGN = indexer_scores(q_BHK, weights_BH, means_BGNK).masked_fill(~exists_B1N, 0.0)
    return select(scores_BGN.unflatten(-1, (-1, block // sub_block)).sum(-1), lengths_B, count, forced, block)


def indexer_tokens(
    q_BHK: Tensor,
    weights_BH: Tensor,
    keys_BGSK: Tensor,
    lengths_B: Tensor,
    searched: Searched | None,
    count: int,
    forced: Forced,
) -> Tensor:
    positions, valid = _candidates(searched, keys_BGSK.shape[2], lengths_B)
    keys_BGMK = keys_BGSK if positions is None else _rows(keys_BGSK, positions.where(valid, 0))
    scores_BGM = indexer_scores(q_BHK, weights_BH, keys_BGMK)
    return select(scores_BGM, lengths_B, count, forced, 1, positions)


def _gather(x_BSGX: Tensor, rows_BGn: Tensor) -> Tensor:
    """Rows (B, G, n, X) of each group of choices, which are as many as groups of rows or a multiple; those of -1 give
    row 0."""
    B, G = rows_BGn.shape[:2]
    sequence = torch.arange(B, device=x_BSGX.device)[:, None, None]
    group = torch.arange(G, device=x_BSGX.device)[None, :, None] // (G // x_BSGX.shape[2])
    return x_BSGX[sequence, rows_BGn.clamp_min(0), group]


def gathered_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    tokens_BGn: Tensor,
    block: int,
    lengths_B: Tensor | None,
    counts_BG: Tensor | None,
    pool: Pool | None,
    shared_BS1R: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    if block > 1:
        assert lengths_B is not None
        tokens_BGn = tokens_of(tokens_BGn, block, lengths_B)
    if counts_BG is not None:
        is_counted = torch.arange(tokens_BGn.shape[-1], device=tokens_BGn.device) < counts_BG[..., None]
        tokens_BGn = tokens_BGn.where(is_counted, -1)
    rows_BGn = tokens_BGn if pool is None else pool.rows(tokens_BGn)
    G, chosen_BG1n = rows_BGn.shape[1], (rows_BGn >= 0)[:, :, None]
    values = keys = _gather(k_BSGK, rows_BGn)
    if shared_BS1R is not None:
        keys = torch.cat((keys, _gather(shared_BS1R, rows_BGn)), dim=-1)
    if v_BSGV is not None:
        values = _gather(v_BSGV, rows_BGn)
    # what is not chosen repeats row 0, which may hold anything
    keys, values = (_wide(x).masked_fill(~chosen_BG1n.transpose(2, 3), 0.0) for x in (keys, values))
    scores_BGRn = torch.einsum("bgrk,bgnk->bgrn", _grouped(q_BHK, G) * scale, keys)
    if softcap:
        scores_BGRn = softcap * (scores_BGRn / softcap).tanh()
    scores_BGRn = scores_BGRn.masked_fill(~chosen_BG1n, -torch.inf)
    lse_BGR1 = scores_BGRn.logsumexp(-1, keepdim=True)
    total_BGR1 = lse_BGR1
    if sink_H is not None:
        total_BGR1 = torch.logaddexp(lse_BGR1, sink_H.to(lse_BGR1.dtype).view(1, G, -1, 1))
    weights_BGRn = (scores_BGRn - total_BGR1).exp().masked_fill(~chosen_BG1n, 0.0)
    return torch.einsum("bgrn,bgnv->bgrv", weights_BGRn, values).flatten(1, 2).to(k_BSGK.dtype)


def extend_minmax(upper_BGNK: Tensor, lower_BGNK: Tensor, k_BGK: Tensor, position_B: Tensor, block: int) -> None:
    number_B, sequence_B = position_B // block, torch.arange(len(position_B), device=position_B.device)
    is_first, k_BGK = (position_B % block == 0)[:, None, None], k_BGK.to(upper_BGNK.dtype)
    for table, extreme in ((upper_BGNK, torch.maximum), (lower_BGNK, torch.minimum)):
        before_BGK = table[sequence_B, :, number_B]
        table[sequence_B, :, number_B] = torch.where(is_first, k_BGK, extreme(before_BGK, k_BGK))


def extend_means(means_BGNK: Tensor, sum_BGK: Tensor, k_BGK: Tensor, position_B: Tensor, sub_block: int) -> None:
    before_B, sequence_B = position_B % sub_block, torch.arange(len(position_B), device=position_B.device)
    k_BGK = k_BGK.to(sum_BGK.dtype)
    sum_BGK.copy_(torch.where((before_B == 0)[:, None, None], k_BGK, sum_BGK + k_BGK))
    mean_BGK = sum_BGK / (before_B + 1)[:, None, None]
    means_BGNK[sequence_B, :, position_B // sub_block] = mean_BGK.to(means_BGNK.dtype)


def extend_codes(keys: TokenKeys, k_BGK: Tensor, position_B: Tensor) -> None:
    sequence_B = torch.arange(len(position_B), device=position_B.device)
    if keys.channels_Gc is not None:
        k_BGK = k_BGK.gather(-1, keys.channels_Gc.expand(len(k_BGK), -1, -1))
    if keys.steps_BGS is None:
        keys.keys_BGSc[sequence_B, :, position_B] = k_BGK.to(keys.keys_BGSc.dtype)
    else:
        codes, steps = quantised(k_BGK)
        keys.keys_BGSc[sequence_B, :, position_B] = codes
        keys.steps_BGS[sequence_B, :, position_B] = steps


def read_numbers(
    tokens_BGn: Tensor,
    units_BGm: Tensor,
    previous_BGm: Tensor,
    resident_BGr: Tensor | None,
    lengths_B: Tensor,
    block: int,
    row_bytes: float,
    index: IndexReads,
) -> Tensor:
    B, G = tokens_BGn.shape[:2]
    nothing = torch.full((), torch.nan, device=lengths_B.device, dtype=torch.float64)
    kept = ((tokens_BGn >= 0).sum() if block == 1 else tokens_in(tokens_BGn, block, lengths_B)).double()
    valid_BGm = units_BGm >= 0
    units, hit_rate = valid_BGm.sum().double(), nothing
    is_shared_BGm = _among(units_BGm, previous_BGm)
    overlap = torch.where((previous_BGm >= 0).any(), (is_shared_BGm & valid_BGm).sum() / units, nothing)
    if resident_BGr is not None:
        is_newest_BGm = units_BGm == (lengths_B[:, None, None] - 1) // index.block
        hit_rate = ((_among(units_BGm, resident_BGr) | is_newest_BGm) & valid_BGm).sum() / units
    candidates = lengths_B.sum() * G if index.searched is None else index.searched.size(lengths_B)
    blocks = ((lengths_B + index.block - 1) // index.block).sum()
    index_bytes = blocks.double() * index.block_bytes + candidates.double() * index.token_bytes
    numbers = (
        kept / (B * G),
        units / (B * G),
        overlap,
        hit_rate,
        (kept * row_bytes + index_bytes) / B,
        lengths_B.sum().double() * (G * row_bytes) / B,
        torch.zeros_like(nothing),
    )
    previous_BGm.copy_(units_BGm)
    return torch.stack(numbers)


def _among(units_BGm: Tensor, others_BGn: Tensor) -> Tensor:
    """Which are among the others of their group."""
    if not others_BGn.shape[-1]:
        return torch.zeros_like(units_BGm, dtype=torch.bool)
    others_BGn = others_BGn.sort(-1).values
    found_BGm = torch.searchsorted(others_BGn, units_BGm.contiguous()).clamp_max(others_BGn.shape[-1] - 1)
    return others_BGn.gather(-1, found_BGm) == units_BGm
