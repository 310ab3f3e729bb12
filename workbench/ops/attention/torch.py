"""Softmax attention through torch's fused kernels, on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from workbench.ops.attention.reference import visible


def attention_torch(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, window: int | None = None, segments: Tensor | None = None
) -> Tensor:
    """As :func:`workbench.ops.attention.attention`."""
    T, H = q_BTHK.shape[1:3]
    S, G = k_BSGK.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    grouped = H != G
    if T == 1 and segments is None:  # one-token decoding: every cached key is visible, up to the window
        k, v = (x if window is None else x[:, :, -window:] for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    elif segments is None and S == T and (window is None or window >= T):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif segments is None and (window is None or window >= S) and q.is_cuda:
        # the rest of a prompt after a first piece: flash attention without a mask in memory
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=grouped)
    else:
        mask = visible(T, S, window=window, device=q.device)[None, None]
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)
