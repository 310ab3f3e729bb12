"""Log-linear attention with the gated delta rule in O(T log T) matrix products, on any device.

The blocks are those of :mod:`workbench.ops.log_linear_attention.torch`. A token erases from the states before its block
too, so that a block of m positions takes a state S to P_m S + S_m with a matrix P_m, and a query reads the state before
its block by q_t^m:

    o_t += λ_t[log2 m + 1] S_mᵀ q_t^m                q_t^2m = P_mᵀ q_t^m in an odd block, q_t^m in an even one
    S_2m = P_m(right) S_m(left) + S_m(right)         P_2m = P_m(right) P_m(left)

Inside a chunk, with D(0, r] the decay since its start, L = (I + β tril(D ∘ K Kᵀ, -1))⁻¹ β and A = (D ∘ Q Kᵀ) L (the WY
form of :mod:`workbench.ops.delta_rule.torch`):

    o = (λ ∘ A) V                q^C = D(0, r] Q - A (D(0, r] K)
    S_C = Kᵀ D(r, C] L V         P_C = D(0, C] I - Kᵀ D(r, C] L (D(0, r] K)

Legend: as of :mod:`workbench.ops.log_linear_attention.torch`, Y = V + K channels of S and P side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.delta_rule.torch import scalar_decays, unit_inverse
from workbench.ops.dispatch import disable_autocast
from workbench.ops.log_linear_attention.torch import (
    levels_between,
    odd_blocks,
    positions_in_documents,
    rows_where,
    sums_behind,
)


def log_linear_delta_rule_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scales_BTHJ: Tensor,
    beta_BTH: Tensor,
    *,
    states_BHIKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`workbench.ops.log_linear_attention.log_linear_attention` from empty states, computed in float32
    (float64 for float64 input) regardless of autocast."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    (B, T), K, V, J = g_BTH.shape[:2], q_BTHK.shape[-1], v_BTHV.shape[-1], scales_BTHJ.shape[-1]
    C = min(chunk, 1 << (T - 1).bit_length())
    operands = (q_BTHK, k_BTHK, v_BTHV, g_BTH, scales_BTHJ, beta_BTH)
    # a padded token edits nothing and does not decay
    q, k, v, g, scales, beta = (F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, -T % C)) for x in operands)
    rows_T = torch.arange(k.shape[1], device=k.device)
    position, T_pad = positions_in_documents(segments, rows_T), len(rows_T)
    batch = torch.arange(B, device=k.device)[:, None, None]
    with disable_autocast(v):
        is_alone = T <= C and states_BHIKV is None
        out, reads, written = _inside(q, k, v, g, scales, beta, position, C, segments is not None, is_alone)
        if is_alone:
            return out[:, :T].to(v_BTHV.dtype), None
        ends = rows_where((position + 1) % C == 0, T_pad // C)  # (B or 1, E)
        blocks = (ends[..., None] - torch.arange(C - 1, -1, -1, device=k.device)).clamp_max(T_pad - 1)
        g_BECH = g[batch, blocks]
        until_BECH = sums_behind(g_BECH.flatten(0, 1)).view_as(g_BECH).exp()
        X = torch.einsum("bechk,bechy->behky", k[batch, blocks] * until_BECH[..., None], written[batch, blocks])
        passing = g_BECH.sum(2).exp()[..., None, None] * torch.eye(K, device=k.device, dtype=dtype)
        X = torch.cat((X[..., :V], passing - X[..., V:]), dim=-1)  # S and P, (B, E, H, K, Y)
        # the P of a block that does not exist would grow from level to level
        X = torch.where((ends < T_pad)[..., None, None, None], X, 0.0)
        # a row behind the last one takes what belongs to no token
        out, reads = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (out, reads))
        last, m, states, behind = position[:, T - 1 :][:, :1] + 1, C, None, None  # tokens of the last document
        if states_BHIKV is not None:
            states, behind = _of_last_block(k, v, g, beta, position, last, T, C, states_BHIKV.shape[2])
        while True:
            if states is not None and behind is not None and m <= T:
                states, behind = _with_block(states, behind, X, ends, last, T, m)
            if m >= T:
                break
            # an odd block follows a complete one of the same document: at most so many of them
            most = (T + m - 1) // (2 * m) if segments is None else T // (m + 1)
            rows, is_inside, before = odd_blocks(position, ends, B, m, most)
            read_again = 2 * m < T
            read = torch.einsum(
                "bfmhk,bfhky->bfmhy", reads[batch, rows], X[batch[:, 0], before][..., : None if read_again else V]
            )
            rows = torch.where(is_inside, rows, T_pad)
            of_level = F.pad(scales[..., min(m.bit_length(), J - 1)], (0, 0, 0, 1))[batch, rows]
            out = out.index_put((batch, rows), read[..., :V] * of_level[..., None], accumulate=True)
            m *= 2
            if read_again:
                reads = reads.index_put((batch, rows), read[..., V:])
            if read_again or (states is not None and m <= T):
                twice = rows_where((position + 1) % m == 0, T_pad // m)
                right = torch.searchsorted(ends, twice).clamp_max(ends.shape[1] - 1)
                left, ends = (right - 1).clamp_min(0), twice  # the block before
                X_right = X[batch[:, 0], right]
                S_right = F.pad(X_right[..., :V], (0, K))
                X = torch.einsum("behkc,behcy->behky", X_right[..., V:], X[batch[:, 0], left]) + S_right
    return out[:, :T].to(v_BTHV.dtype), states


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scales: Tensor,
    beta: Tensor,
    position: Tensor,
    C: int,
    packed: bool,
    is_alone: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens in their block of C positions: outputs (B, T, H, V); queries of the state before it (B, T, H, K); and
    L V and L (D K), (B, T, H, Y). With ``is_alone`` the last two are empty."""
    (B, T, H), J = g.shape, scales.shape[-1]

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, …) -> (N, X, C, …)
        return x.unflatten(1, (-1, C)).movedim(1, 0).movedim(3, 2).flatten(1, 2)

    def windows(x: Tensor) -> Tensor:  # (N, X, C, …) -> (N, X, W, …), with the chunk before where documents are packed
        return torch.cat((torch.cat((torch.zeros_like(x[:1]), x[:-1])), x), dim=2) if packed else x

    def rows(x_NXCY: Tensor) -> Tensor:  # -> (B, T, H, …)
        return x_NXCY.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    q, scales = chunks(q), chunks(scales)
    k, v, g, beta = (windows(chunks(x)) for x in (k, v, g, beta))
    own = position.expand(B, T).unflatten(1, (-1, C)).movedim(1, 0)  # (N, B, C)
    seen, W = windows(own), g.shape[2]
    between_NXWW = scalar_decays(g.exp())[0]
    if packed:
        row_W = torch.arange(W, device=q.device)
        # of one document: their positions differ as their rows do
        is_near = seen[..., None] - seen[..., None, :] == row_W[:, None] - row_W
        is_near = is_near & (seen[..., None] // C == seen[..., None, :] // C)
        between_NXWW = between_NXWW * is_near.repeat_interleave(H, dim=1)
    system = ((k * beta[..., None]) @ k.mT * between_NXWW).tril(-1)
    solve_NXWW = unit_inverse(system) * beta[..., None, :]
    attention_NXCW = (q @ k.mT * between_NXWW[:, :, -C:]) @ solve_NXWW
    most = min(C.bit_length() - 1, J - 1)
    levels = levels_between(own[..., None], seen[..., None, :], most).repeat_interleave(H, dim=1)
    out = rows((attention_NXCW * scales.gather(3, levels)) @ v)
    if is_alone:
        return out, q[:0], v[:0]
    # decay since the block's first token, its own included; of blocks that begin before the window nothing is used
    first = (torch.arange(W, device=q.device) - seen % C).clamp_min(0).repeat_interleave(H, dim=1)
    since = between_NXWW.gather(3, first[..., None]) * g.exp().gather(2, first)[..., None]
    decayed = k * since
    reads = q * since[:, :, -C:] - attention_NXCW @ decayed
    written = solve_NXWW[:, :, -C:] @ torch.cat((v, decayed), dim=-1)
    return out, rows(reads), rows(written)


def _of_last_block(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, position: Tensor, last: Tensor, T: int, C: int, count: int
) -> tuple[Tensor, Tensor]:
    """What the incomplete last block of C positions adds to every state (B, H, I, K, V), and its P (B, H, K, K)."""
    B = k.shape[0]
    row_C = torch.arange(T - C, T, device=k.device)
    positions = position.expand(B, -1)[:, row_C.clamp_min(0)]
    is_inside = (row_C >= 0) & (positions // C == last // C) & (last - positions == T - row_C)  # (B, C)
    k, v, g, beta = (
        torch.where(is_inside[(..., *[None] * (x.dim() - 2))], x[:, row_C.clamp_min(0)], 0.0).movedim(2, 1)
        for x in (k, v, g, beta)
    )  # (B, H, C, …)
    between, since, until = scalar_decays(g.exp())
    system = ((k * beta[..., None]) @ k.mT * between).tril(-1)
    keys_BHCK = (unit_inverse(system) * beta[..., None, :]).mT @ (k * until)  # of every token, after all later ones
    state = F.one_hot((levels_between(last, positions, count) - 1).clamp_min(0), count).to(k.dtype)
    states = torch.einsum("bci,bhck,bhcv->bhikv", state, keys_BHCK, v)
    eye = torch.eye(k.shape[-1], device=k.device, dtype=k.dtype)
    return states, since[:, :, -1:] * eye - keys_BHCK.mT @ (k * since)


def _with_block(
    states: Tensor, behind: Tensor, X: Tensor, ends: Tensor, last: Tensor, T: int, m: int
) -> tuple[Tensor, Tensor]:
    """States with the bucket of m tokens, where there is one, after all that came behind it; and P of all from it on.

    Args:
        states: (B, H, I, K, V).
        behind: (B, H, K, K) P of the tokens behind the bucket.
        X: (B, E, H, K, Y) of the complete blocks of m positions, which end at the rows ``ends``.
        last: (B or 1, 1) tokens of the last document.
    """
    B, V, count = states.shape[0], states.shape[-1], states.shape[2]
    exists = (last & m > 0)[..., None, None]  # (B or 1, 1, 1, 1)
    block = torch.searchsorted(ends, (T - 1 - last % m).contiguous()).clamp_max(ends.shape[1] - 1)
    passed = behind @ X[torch.arange(B, device=X.device)[:, None], block][:, 0]  # (B, H, K, Y)
    bucket = torch.where(exists, passed[..., :V], 0.0)[:, :, None]
    of_state = torch.arange(count, device=X.device) == min(m.bit_length(), count) - 1
    return states + bucket * of_state[:, None, None], torch.where(exists, passed[..., V:], behind)


def log_linear_delta_rule_flops(heads: int, K: int, V: int, length: int, chunk: int = 64) -> float:
    """Forward FLOPs per token in matrix products of the form above, at ``length`` tokens of one document.

    Per head 2C (2K + V + C) + 2 (C² - 4) / 3 inside a chunk; 2C (2K + V) + 2K (K + V) for q^C, S_C and P_C; 2K (K + V)
    for every token of an odd block of m = C, 2C, … positions, 2KV in the last of these; 2K² (K + V) for every two
    blocks that are joined.
    """
    C = min(chunk, 1 << (length - 1).bit_length())
    padded, m, Y = -(-length // C) * C, C, K + V
    products = padded * (C * (2 * K + V + C) + max(0, (C * C - 4) / 3))
    products += padded * (C * (2 * K + V) + K * Y) if length > C else 0
    while m < length:
        read_again = 2 * m < length
        products += (length + m - 1) // (2 * m) * m * K * (Y if read_again else V)
        m *= 2
        products += padded // m * K * K * Y if read_again else 0
    return 2 * heads * products / length
