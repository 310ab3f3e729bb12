"""Attention of one query over the first tokens of a cache, one sequence and head at a time: the definition.

Legend as in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_reference(
    q_BHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor | None,
    lengths: list[int],
    *,
    scale: float,
    window: int | None = None,
    shared_BS1R: Tensor | None = None,
    k_steps_BSG: Tensor | None = None,
    v_steps_BSG: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """(B, H, V) as :func:`workbench.ops.decode_attention.decode_attention`, in the type of the queries."""
    (B, H), G = q_BHK.shape[:2], k_BSGK.shape[2]
    outputs = []
    for b in range(B):
        for h in range(H):
            tokens, g = slice(max(0, lengths[b] - (window or lengths[b])), lengths[b]), h // (H // G)
            k = k_BSGK[b, tokens, g].to(q_BHK.dtype)
            if k_steps_BSG is not None:
                k = k * k_steps_BSG[b, tokens, g, None].to(q_BHK.dtype)
            v = k
            if v_BSGV is not None:
                v = v_BSGV[b, tokens, g].to(q_BHK.dtype)
                if v_steps_BSG is not None:
                    v = v * v_steps_BSG[b, tokens, g, None].to(q_BHK.dtype)
            if shared_BS1R is not None:
                k = torch.cat((k, shared_BS1R[b, tokens, 0].to(q_BHK.dtype)), dim=-1)
            scores = k @ q_BHK[b, h] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sink_H is not None:  # a token of its own with the value zero
                scores = torch.cat((scores, sink_H[h, None].to(scores.dtype)))
                v = torch.cat((v, v.new_zeros(1, v.shape[-1])))
            outputs.append(scores.softmax(0) @ v if len(scores) else v.sum(0))
    return torch.stack(outputs).view(B, H, -1)
