"""The delta rule token by token: the definition, also used to decode one token.

Legend: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_rule_recurrent(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`, computed in float32 (float64 for float64 input)."""
    dtype = torch.promote_types(value_BTHV.dtype, torch.float32)
    e_BTHK = write_key_BTHK if erase_key_BTHK is None else erase_key_BTHK
    q, k, v, e = (x.to(dtype) for x in (q_BTHK, write_key_BTHK, value_BTHV, e_BTHK))
    if beta_BTH is not None:
        e, v = (x * beta_BTH.to(dtype)[..., None] for x in (e, v))
    if g is not None:  # (B, T, H, K) or (B, T, H, 1)
        g = (g if g.dim() == 4 else g[..., None]).to(dtype)
    B, T, H, K = q.shape
    S = v.new_zeros(B, H, K, v.shape[-1]) if state_BHKV is None else state_BHKV.to(dtype)
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            S = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], S, 0.0)
        if g is not None:
            S = S * g[:, t].exp()[..., None]
        read_BHV = (S * e[:, t, :, :, None]).sum(-2)
        S = S + k[:, t, :, :, None] * (v[:, t] - read_BHV)[..., None, :]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, dim=1).to(value_BTHV.dtype), S
