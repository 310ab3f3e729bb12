"""The gated delta rule token by token: the definition, and the decode path.

Legend: B batch, T time, H heads, K key channels, V value channels. Source: Gated Delta Networks, arXiv 2412.06464;
restated in arXiv 2605.22791 eq. 6.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_rule_recurrent(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, *,
    state_BHKV: Tensor | None = None, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S_t = (I - β_t k_t k_tᵀ) exp(g_t) S_{t-1} + β_t k_t v_tᵀ,  o_t = S_tᵀ q_t.

    The decay acts before the edit; the output reads the state after the write.

    Args:
        q_BTHK: queries, already scaled. k_BTHK: keys, normalised by the caller. v_BTHV: values.
        g_BTH: log-decay, <= 0. beta_BTH: strength of the edit.
        state_BHKV: state before the first token (zeros if None).
        segments: (B, T) document numbers; the state is emptied where the number changes.

    Returns:
        outputs (B, T, H, V) and the final state (B, H, K, V), in the precision of the input.
    """
    B, T, H, K = q_BTHK.shape
    S = v_BTHV.new_zeros(B, H, K, v_BTHV.shape[-1]) if state_BHKV is None else state_BHKV
    outputs = []
    for t in range(T):
        if segments is not None and t > 0:
            S = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], S, 0.0)
        S = S * g_BTH[:, t].exp()[..., None, None]
        error_BHV = v_BTHV[:, t] - torch.einsum("bhkv,bhk->bhv", S, k_BTHK[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k_BTHK[:, t] * beta_BTH[:, t, :, None], error_BHV)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1), S
