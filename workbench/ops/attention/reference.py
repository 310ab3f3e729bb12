"""Softmax attention: the definition. Legend: B batch, T queries, S keys, H query heads, G key–value heads, K
channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible(T: int, S: int, *, window: int | None, device: torch.device) -> Tensor:
    """(T, S) booleans: whether query t sees key s. The last query is at the position of the last key.

    Causal; with a window w a query sees min(w, position + 1) keys, itself included.
    """
    query_T1 = torch.arange(S - T, S, device=device)[:, None]
    key_1S = torch.arange(S, device=device)[None]
    mask_TS = key_1S <= query_T1
    if window is not None:
        mask_TS &= key_1S > query_T1 - window
    return mask_TS


def attention_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, window: int | None = None, segments: Tensor | None = None
) -> Tensor:
    """o_t = Σ_s softmax_s(q_t · k_s / sqrt(K)) v_s over the visible keys, in the precision of the input."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    k_BSHK = k_BSGK.repeat_interleave(H // G, dim=2)
    v_BSHK = v_BSGK.repeat_interleave(H // G, dim=2)
    mask_BTS = visible(T, S, window=window, device=q_BTHK.device).expand(B, T, S)
    if segments is not None:
        mask_BTS = mask_BTS & (segments[:, :, None] == segments[:, None, :])
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(K)
    weights_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -math.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)
