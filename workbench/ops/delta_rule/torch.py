"""The gated delta rule in chunks of C tokens: matrix products instead of a loop over tokens.

Inside a chunk with incoming state S0 and G_r = Σ_{i<=r} g_i, every edit row ρ_r solves one unit-lower-triangular system

    T_rs = β_r (k_r · k_s) exp(G_r - G_s)  (s < r)        (I + T) [U | Y] = [β v | β k exp(G)],    R = U - Y S0
    O = (Q exp G) S0 + [(q_r · k_s) exp(G_r - G_s)]_{s<=r} R,    S' = exp(G_C) S0 + (K exp(G_C - G))ᵀ R

(the WY form of arXiv 2406.06484 with the decay of 2412.06464). Every exponent is <= 0 and masked before exp, so strong
decay gives zeros, not NaN. Documents are kept apart by masks, never by an infinite decay.

Legend: B batch, T time, H heads, N chunks, C tokens in a chunk, K key channels, V value channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_rule_chunked(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, *,
    state_BHKV: Tensor | None = None, segments: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same arguments and results as :func:`gated_delta_rule_recurrent`; computed in fp32 (fp64 for fp64 input).

    The output has the type of ``v``, the state is fp32 (fp64).
    """
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[-1]
    out_dtype = v_BTHV.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    C = min(chunk, T)
    pad = -T % C
    N = (T + pad) // C

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, ...) -> (B, H, N, C, ...)
        x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, pad))
        return x.unflatten(1, (N, C)).movedim(3, 1)

    # A padded token has β = 0 and g = 0: it edits nothing and the state passes through it unchanged.
    q, k, v, g, beta = map(chunks, (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    G = g.cumsum(-1)  # (B, H, N, C)
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    if segments is None:
        same: Tensor = lower
        from_before = None
    else:
        seg = torch.cat((segments, segments[:, -1:].expand(B, pad)), dim=1)
        seg = seg.unflatten(1, (N, C))[:, None]  # (B, 1, N, C)
        same = lower & (seg[..., :, None] == seg[..., None, :])
        before = torch.cat((seg[:, :, :1, 0], seg[:, :, :-1, -1]), dim=2)[..., None]  # the document carried in
        from_before = (seg == before).to(dtype)
    # Summed over s < i <= r, never a difference of two running sums: behind one strong decay that loses small ones.
    after = g[..., :, None].expand(*g.shape, C).tril(-1).cumsum(-2)
    decay = after.masked_fill(~same, -math.inf).exp()  # (B, H, N, C, C)

    k_beta = k * beta[..., None]
    system = (k_beta @ k.mT * decay).tril(-1)
    entering = G.exp() if from_before is None else G.exp() * from_before
    leaving = decay[..., -1, :]  # 0 for another document than the chunk's last
    passing = entering[..., -1, None, None]  # exp(G_C), or 0 where the chunk ends in another document
    right = torch.cat((v * beta[..., None], k_beta * entering[..., None]), dim=-1)
    # unitriangular: the diagonal is taken as ones, so `system` needs none
    U, Y = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split((V, K), dim=-1)
    scores = q @ k.mT * decay
    q_in, k_out = q * entering[..., None], k * leaving[..., None]

    S = q.new_zeros(B, H, K, V) if state_BHKV is None else state_BHKV.to(dtype)
    outputs = []
    for n in range(N):
        R = U[:, :, n] - Y[:, :, n] @ S
        outputs.append(q_in[:, :, n] @ S + scores[:, :, n] @ R)
        S = passing[:, :, n] * S + k_out[:, :, n].mT @ R
    out = torch.stack(outputs, dim=2).movedim(1, 3).flatten(1, 2)[:, :T]  # (B, H, N, C, V) -> (B, T, H, V)
    return out.to(out_dtype), S


def gated_delta_rule_flops(heads: int, K: int, V: int, length: int, chunk: int = 64) -> float:
    """Forward FLOPs per token in matrix products of the chunk form above, at ``length`` tokens.

    Per head: 6KV (three products with the state), 4CK (T and the scores), 2CV (scores times R) and C(K + V) for the
    triangular solve (one multiply-add for each of the C²/2 entries and each right-hand side).
    """
    C = min(chunk, length)
    padded = (length + C - 1) // C * C / length
    return padded * heads * (6 * K * V + 4 * C * K + 2 * C * V + C * (K + V))
