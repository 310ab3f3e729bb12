"""Attention of one query per sequence over a cache, in plain torch on any device. Legend as in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths_B: Tensor,
    shared: Tensor | None,
    k_steps: Tensor | None,
    v_steps: Tensor | None,
    sink_H: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.decode_attention.decode_attention`. Sums have at least fp32."""
    if k.device.type == "cpu":  # nothing waits for it there
        longest = max(1, int(lengths_B.max()))
        k = k[:, :longest]
        v, shared, k_steps, v_steps = (None if x is None else x[:, :longest] for x in (v, shared, k_steps, v_steps))
    wide, G = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    position_S = torch.arange(k.shape[1], device=k.device)
    is_token_BS = position_S < lengths_B[:, None]
    if window:
        is_token_BS = is_token_BS & (position_S >= lengths_B[:, None] - window)

    def numbers(x: Tensor, steps: Tensor | None) -> Tensor:
        # memory without tokens may hold NaN, which a weight of zero would keep
        x = x.to(wide) if steps is None else x.to(wide) * steps[..., None].to(wide)
        return x.masked_fill(~is_token_BS[..., None, None], 0.0)

    keys = values = numbers(k, k_steps)
    if v is not None:
        values = numbers(v, v_steps)
    q_BGRK = q.to(wide).unflatten(1, (G, -1)) * scale
    q_BGRK, q_BGRr = q_BGRK.split((k.shape[-1], q.shape[-1] - k.shape[-1]), dim=-1)
    scores = torch.einsum("bgrk,bsgk->bgrs", q_BGRK, keys)
    if shared is not None:
        scores = scores + torch.einsum("bgrk,bsk->bgrs", q_BGRr, numbers(shared, None)[:, :, 0])
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~is_token_BS[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[1] else scores.new_full(scores.shape[:-1], -torch.inf)
    total = lse if sink_H is None else torch.logaddexp(lse, sink_H.to(wide).view(G, -1))
    weights = (scores - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("bgrs,bsgv->bgrv", weights, values).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
