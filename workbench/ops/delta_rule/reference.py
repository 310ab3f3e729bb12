"""The delta rule token by token: the definition, and the way one token is decoded.

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
    """As :func:`workbench.ops.delta_rule.delta_rule`, line by line; computed in fp32 (fp64 for fp64 input)."""
    dtype = torch.promote_types(value_BTHV.dtype, torch.float32)
    q, p, z, e = (
        x.to(dtype)
        for x in (q_BTHK, write_key_BTHK, value_BTHV, write_key_BTHK if erase_key_BTHK is None else erase_key_BTHK)
    )
    if beta_BTH is not None:
        e, z = (x * beta_BTH.to(dtype)[..., None] for x in (e, z))
    if g is not None:  # (B, T, H, K) or (B, T, H, 1)
        g = (g if g.dim() == 4 else g[..., None]).to(dtype)
    B, T, H, K = q.shape
    S = z.new_zeros(B, H, K, z.shape[-1]) if state_BHKV is None else state_BHKV.to(dtype)
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            S = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], S, 0.0)
        if g is not None:
            S = S * g[:, t].exp()[..., None]
        read_BHV = (S * e[:, t, :, :, None]).sum(-2)
        S = S + p[:, t, :, :, None] * (z[:, t] - read_BHV)[..., None, :]
        outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, dim=1).to(value_BTHV.dtype), S
