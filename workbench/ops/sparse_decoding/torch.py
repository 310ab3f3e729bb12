"""Plain torch, any device. Legend as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 7
"""Largest code of four bits with sign; -8 is not used, so that codes are symmetric."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(q_BHK: Tensor, G: int) -> Tensor:
    """(B, G, H/G, K)"""
    return _wide(q_BHK).unflatten(1, (G, -1))


def minmax_scores(q_BHK: Tensor, upper_BNGK: Tensor, lower_BNGK: Tensor) -> Tensor:
    q_BGRK = _grouped(q_BHK, upper_BNGK.shape[2])
    positive_BGK, negative_BGK = q_BGRK.clamp_min(0).sum(2), q_BGRK.clamp_max(0).sum(2)
    return torch.einsum("bgk,bngk->bgn", positive_BGK, _wide(upper_BNGK)) + torch.einsum(
        "bgk,bngk->bgn", negative_BGK, _wide(lower_BNGK)
    )


def mean_scores(q_BHK: Tensor, means_BNGK: Tensor, counts_BN: Tensor, scale: float) -> Tensor:
    scores_BGRN = torch.einsum("bgrk,bngk->bgrn", _grouped(q_BHK, means_BNGK.shape[2]) * scale, _wide(means_BNGK))
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


def _gather(x_BSGX: Tensor, tokens_BGM: Tensor) -> Tensor:
    """Rows (B, G, M, X) of each group of choices, which are as many as groups of rows or a multiple; tokens of -1 give
    row 0."""
    B, G = tokens_BGM.shape[:2]
    sequence = torch.arange(B, device=x_BSGX.device)[:, None, None]
    group = torch.arange(G, device=x_BSGX.device)[None, :, None] // (G // x_BSGX.shape[2])
    return x_BSGX[sequence, tokens_BGM.clamp_min(0), group]


def channel_scores(
    q_BHc: Tensor,
    index_BSGc: Tensor,
    steps_BSG: Tensor | None,
    tokens_BGM: Tensor | None,
    valid_BGM: Tensor,
    scale: float,
) -> Tensor:
    if tokens_BGM is None:
        keys, steps = index_BSGc.transpose(1, 2), None if steps_BSG is None else steps_BSG.transpose(1, 2)
    else:
        tokens_BGM = tokens_BGM.where(valid_BGM, 0)
        keys = _gather(index_BSGc, tokens_BGM)
        steps = None if steps_BSG is None else _gather(steps_BSG[..., None], tokens_BGM)[..., 0]
    q_BGRc = _grouped(q_BHc, index_BSGc.shape[2]) * scale
    if steps is None:
        scores_BGRM = torch.einsum("bgrc,bgmc->bgrm", q_BGRc, keys.to(q_BGRc.dtype))
    else:
        scores_BGRM = torch.einsum("bgrc,bgmc->bgrm", q_BGRc, unpacked(keys).to(q_BGRc.dtype))
        scores_BGRM = scores_BGRM * steps[:, :, None].to(q_BGRc.dtype)
    return _mean_softmax(scores_BGRM, valid_BGM)


def gathered_attention(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    tokens_BGn: Tensor,
    shared_BS1R: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    G, chosen_BG1n = tokens_BGn.shape[1], (tokens_BGn >= 0)[:, :, None]
    values = keys = _gather(k_BSGK, tokens_BGn)
    if shared_BS1R is not None:
        keys = torch.cat((keys, _gather(shared_BS1R, tokens_BGn)), dim=-1)
    if v_BSGV is not None:
        values = _gather(v_BSGV, tokens_BGn)
    scores_BGRn = torch.einsum("bgrk,bgnk->bgrn", _grouped(q_BHK, G) * scale, _wide(keys))
    if softcap:
        scores_BGRn = softcap * (scores_BGRn / softcap).tanh()
    scores_BGRn = scores_BGRn.masked_fill(~chosen_BG1n, -torch.inf)
    lse_BGR1 = scores_BGRn.logsumexp(-1, keepdim=True)
    total_BGR1 = lse_BGR1
    if sink_H is not None:
        total_BGR1 = torch.logaddexp(lse_BGR1, sink_H.to(lse_BGR1.dtype).view(1, G, -1, 1))
    weights_BGRn = (scores_BGRn - total_BGR1).exp().masked_fill(~chosen_BG1n, 0.0)
    # a slot that is not chosen repeats row 0, which may hold anything
    values = _wide(values).masked_fill(~chosen_BG1n.transpose(2, 3), 0.0)
    return torch.einsum("bgrn,bgnv->bgrv", weights_BGRn, values).flatten(1, 2).to(k_BSGK.dtype)
