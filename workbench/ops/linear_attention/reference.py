"""Gated linear attention token by token: the definition, also used to decode one token.

Legend: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_recurrent(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    *,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.linear_attention.linear_attention`, computed in float32 (float64 for float64 input)."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v, g = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH))
    B, T, H = g.shape
    q, k, v = (x.unflatten(1, (T, -1)) for x in (q, k, v))  # (B, T, rows of a token, H, …)
    K = q.shape[-1]
    S = v.new_zeros(B, H, K, v.shape[-1]) if state_BHKV is None else state_BHKV.to(dtype)
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            S = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], S, 0.0)
        S = S * g[:, t].exp()[..., None, None] + (k[:, t, ..., None] * v[:, t, ..., None, :]).sum(1)
        outputs.append((S[:, None] * q[:, t, ..., None]).sum(-2))
    return torch.cat(outputs, dim=1).to(v_BTHV.dtype), S
