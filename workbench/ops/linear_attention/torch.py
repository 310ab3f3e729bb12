"""Gated linear attention in chunks of C tokens: matrix products instead of a loop over tokens, on any device.

With D(s, r] the product of the decays of the tokens after s up to r, and S0 the state before the chunk:

    O_r = D(0, r] S0ᵀ q_r + Σ_{s<=r} D(s, r] (q_r · k_s) v_s          S' = D(0, C] S0 + Σ_s D(s, C] k_s v_sᵀ

(the block decomposition of arXiv 2405.21060, section 6). Decays are only multiplied, as in
:mod:`workbench.ops.delta_rule.torch`: every factor lies in [0, 1]. Documents are separated by masks.

Legend: B batch, T time, H heads, N chunks, X = B·H, C tokens of a chunk (n C rows), K key channels, V value channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.delta_rule.torch import document_masks, scalar_decays
from workbench.ops.dispatch import disable_autocast


def linear_attention_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    *,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.linear_attention.linear_attention`, computed in float32 (float64 for float64 input)
    regardless of autocast."""
    (B, T, H), K, V = g_BTH.shape, q_BTHK.shape[-1], v_BTHV.shape[-1]
    n, C = q_BTHK.shape[1] // T, min(chunk, 1 << (T - 1).bit_length())
    N, pad = -(-T // C), -T % C
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, …) -> (N, X, C, …); a padded token adds nothing and does not decay
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad * x.shape[1] // T)) if pad else x
        return x.to(dtype).unflatten(1, (N, -1)).movedim(1, 0).movedim(3, 2).flatten(1, 2)

    q_NXCK, k_NXCK, v_NXCV, g_NXC = map(chunks, (q_BTHK, k_BTHK, v_BTHV, g_BTH))
    S_XKV = v_NXCV.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.to(dtype).flatten(0, 1)
    between_NXCC, from_start, to_end = scalar_decays(g_NXC.exp())
    passing = from_start[:, :, -1:]  # (N, X, 1, 1)
    if segments is not None:
        same, entering, leaving, staying = document_masks(segments, segments[:, 0], H, N, C, dtype)
        between_NXCC, from_start = between_NXCC * same, from_start * entering
        to_end, passing = to_end * leaving, passing * staying
    if n > 1:  # rows of a token share its decay and see one another
        between_NXCC, from_start, to_end = (x.repeat_interleave(n, dim=2) for x in (between_NXCC, from_start, to_end))
        between_NXCC = between_NXCC.repeat_interleave(n, dim=3)
    with disable_autocast(v_NXCV):
        inside_NXCV = (q_NXCK @ k_NXCK.mT * between_NXCC) @ v_NXCV
        added_NXKV = (k_NXCK * to_end).mT @ v_NXCV
        states = []
        for keep, added in zip(passing.unbind(0), added_NXKV.unbind(0)):
            states.append(S_XKV)
            S_XKV = keep * S_XKV + added
        out_NXCV = inside_NXCV + (q_NXCK * from_start) @ torch.stack(states)
    out_BTHV = out_NXCV.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : n * T]
    return out_BTHV.to(v_BTHV.dtype), S_XKV.unflatten(0, (B, H))


def linear_attention_flops(heads: int, K: int, V: int, length: int, chunk: int = 64, rows: int = 1) -> float:
    """Forward FLOPs per token in matrix products of the chunk form above, at ``length`` tokens: per head and row of a
    token 4KV for two products with states, 2C (K + V) times the rows inside a chunk, whose full square is computed."""
    C = min(chunk, 1 << (length - 1).bit_length())
    padded = -(-length // C) * C / length
    return padded * heads * rows * (4 * K * V + 2 * C * rows * (K + V))
