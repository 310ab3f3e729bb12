"""Log-linear attention token by token: the states of a Fenwick tree, also used to decode one token.

State i is the bucket of 2^i tokens of level i + 1; it is zero where bit i of the position is not set. After a token at
position t, the buckets of the bits below the lowest zero of t and the token become the bucket of that bit.

Legend: B batch, T time, H heads, K key channels, V value channels, J levels, I states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_linear_attention_recurrent(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scales_BTHJ: Tensor,
    *,
    beta_BTH: Tensor | None = None,
    states_BHIKV: Tensor | None = None,
    positions_B: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`workbench.ops.log_linear_attention.log_linear_attention`, computed in float32 (float64 for float64
    input)."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v, g, scales = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, scales_BTHJ))
    (B, T, H, K), J = q.shape, scales.shape[-1]
    beta = None if beta_BTH is None else beta_BTH.to(dtype)
    v = v if beta is None else v * beta[..., None]
    if states_BHIKV is None:
        S = v.new_zeros(B, H, min(T.bit_length(), J - 1), K, v.shape[-1])
    else:
        S = states_BHIKV.to(dtype)
    ones_I = (1 << torch.arange(1, S.shape[2] + 1, device=q.device)) - 1
    position_B = torch.zeros(B, dtype=torch.int64, device=q.device) if positions_B is None else positions_B
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            goes_on_B = segments[:, t] == segments[:, t - 1]
            S, position_B = torch.where(goes_on_B[:, None, None, None, None], S, 0.0), position_B * goes_on_B
        S = S * g[:, t, :, None, None, None].exp()
        if beta is not None:
            erased_BHIV = (S * k[:, t, :, None, :, None]).sum(-2)
            S = S - (beta[:, t, :, None] * k[:, t])[:, :, None, :, None] * erased_BHIV[..., None, :]
        read = (S * scales[:, t, :, 1 : len(ones_I) + 1, None, None]).sum(2)
        itself = scales[:, t, :, :1] * (q[:, t] * k[:, t]).sum(-1, keepdim=True)
        outputs.append((read * q[:, t, ..., None]).sum(-2) + itself * v[:, t])
        merges_BI = (position_B[:, None] & ones_I) == ones_I
        merges_BI[:, -1] = False  # whatever is older stays in the last state
        grows_BI = ~merges_BI & torch.cat((torch.ones_like(merges_BI[:, :1]), merges_BI[:, :-1]), dim=1)
        merges, grows = merges_BI[:, None, :, None, None], grows_BI[:, None, :, None, None]
        bucket = torch.where(merges, S, 0.0).sum(2) + k[:, t, :, :, None] * v[:, t, :, None, :]
        S = torch.where(merges, 0.0, S) + torch.where(grows, bucket[:, :, None], 0.0)
        position_B = position_B + 1
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), None if states_BHIKV is None else S
