"""Log-linear attention in O(T log T) matrix products, on any device.

Positions are those of documents. A chunk of C tokens attends, by its levels, to the tokens of its own block of C
positions. For every m = C, 2C, 4C, … the tokens of an odd block of m positions read the state of the block before:

    o_t += λ_t[log2 m + 1] D(end, t] S_mᵀ q_t          S_2m = D(right block) S_m(left) + S_m(right)

Documents of a packed row begin anywhere, so that blocks are gathered by the rows at which they begin or end. Every
block that is read is complete, so that at most T / m of m positions are in a row, however it is packed: all shapes are
known in advance. Decays are only multiplied or summed from one side as logarithms: every factor lies in [0, 1].

Legend: B batch, T time, H heads, N chunks, X = B·H, C tokens of a chunk, W keys that it sees (C, or 2C where documents
are packed), E complete blocks, F odd blocks, m positions of a block, K key channels, V value channels, J levels, I
states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.delta_rule.torch import scalar_decays
from workbench.ops.dispatch import disable_autocast
from workbench.ops.running_sum import running_sum


def log_linear_attention_torch(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    scales_BTHJ: Tensor,
    *,
    states_BHIKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`workbench.ops.log_linear_attention.log_linear_attention` from empty states, computed in float32
    (float64 for float64 input) regardless of autocast."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    (B, T), J = g_BTH.shape[:2], scales_BTHJ.shape[-1]
    C = min(chunk, 1 << (T - 1).bit_length())
    operands = (q_BTHK, k_BTHK, v_BTHV, g_BTH, scales_BTHJ)
    # a padded token adds nothing and does not decay
    q, k, v, g, scales = (F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, -T % C)) for x in operands)
    row_T = torch.arange(k.shape[1], device=k.device)
    position = positions_in_documents(segments, row_T)
    batch = torch.arange(B, device=k.device)[:, None, None]
    with disable_autocast(v):
        out = _inside(q, k, v, g, scales, position, C, segments is not None)
        if T <= C and states_BHIKV is None:
            return out[:, :T].to(v_BTHV.dtype), None
        ends = rows_where((position + 1) % C == 0, len(row_T) // C)  # (B or 1, E)
        blocks = (ends[..., None] - torch.arange(C - 1, -1, -1, device=k.device)).clamp_max(len(row_T) - 1)
        g_BECH = g[batch, blocks]
        until_BECH = sums_behind(g_BECH.flatten(0, 1)).view_as(g_BECH).exp()
        S = torch.einsum("bechk,bechv->behkv", k[batch, blocks] * until_BECH[..., None], v[batch, blocks])
        states = None
        if states_BHIKV is not None:
            states = _last_states(k, v, g, position, ends, S, T, C, states_BHIKV.shape[2])
        passing, m, row_B1 = g_BECH.sum(2).exp(), C, batch[:, 0]  # (B, E, H)
        while m < T:
            # an odd block follows a complete one of the same document: at most so many of them
            most = (T + m - 1) // (2 * m) if segments is None else T // (m + 1)
            rows, is_inside, before = odd_blocks(position, ends, B, m, most)
            of_level = scales[..., min(m.bit_length(), J - 1)][batch, rows]
            weight_BFmH = (
                running_sum(g[batch, rows].flatten(0, 1)).view_as(of_level).exp() * of_level * is_inside[..., None]
            )
            read = torch.einsum("bfmhk,bfhkv->bfmhv", q[batch, rows] * weight_BFmH[..., None], S[row_B1, before])
            out = out.index_put((batch, rows), read, accumulate=True)
            m *= 2
            if m < T:
                twice = rows_where((position + 1) % m == 0, len(row_T) // m)
                right = torch.searchsorted(ends, twice).clamp_max(ends.shape[1] - 1)
                left, ends = (right - 1).clamp_min(0), twice  # the block before
                S = passing[row_B1, right][..., None, None] * S[row_B1, left] + S[row_B1, right]
                passing = passing[row_B1, left] * passing[row_B1, right]
    return out[:, :T].to(v_BTHV.dtype), states


def positions_in_documents(segments: Tensor | None, row_T: Tensor) -> Tensor:
    """(B or 1, T) positions of the rows 0 to T - 1, which may go on behind ``segments``."""
    if segments is None:
        return row_T[None]
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, len(row_T) - segments.shape[1]))
    return row_T - torch.where(begins, row_T, 0).cummax(1).values


def odd_blocks(position: Tensor, ends: Tensor, B: int, m: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of m positions behind a complete one of the same document: their rows (B or 1, F, m), whether these are
    of the document (B, F, m), and which of ``ends`` is the row before (B or 1, F).

    Args:
        position: (B or 1, T).
        ends: (B or 1, E) rows at which complete blocks of m positions end, ascending.
        B: sequences.
        most: F, at least so many as there are.
    """
    T, batch = position.shape[1], torch.arange(B, device=position.device)[:, None, None]
    firsts, offset_m = rows_where(position % (2 * m) == m, most), torch.arange(m, device=position.device)
    wanted = firsts[..., None] + offset_m
    rows = wanted.clamp_max(T - 1)
    positions = position.expand(B, -1)[batch, rows]
    is_inside = (wanted < T) & (positions - positions[..., :1] == offset_m)
    return rows, is_inside, torch.searchsorted(ends, firsts - 1).clamp_max(ends.shape[1] - 1)


def rows_where(is_wanted: Tensor, most: int) -> Tensor:
    """(B, most) the rows where ``is_wanted`` (B, T), in order, then T."""
    T = is_wanted.shape[1]
    rows_T = torch.arange(T, device=is_wanted.device)
    return torch.where(is_wanted, rows_T, T).sort(dim=1).values[:, :most].contiguous()


def sums_behind(x_BTH: Tensor) -> Tensor:
    """Sums over all later positions of the second axis."""
    return F.pad(running_sum(x_BTH[:, 1:].flip(1)).flip(1), (0, 0, 0, 1))


def levels_between(position: Tensor, other: Tensor, most: int) -> Tensor:
    """Bits of position XOR other, at most ``most``."""
    different = position ^ other
    bits = torch.zeros_like(different)
    for bit in range(most):
        bits = bits + (different >= 1 << bit)
    return bits


def _inside(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scales: Tensor, position: Tensor, C: int, packed: bool
) -> Tensor:
    """Attention to the tokens of the same block of C positions, (B, T, H, V)."""
    (B, T, H), J = g.shape, scales.shape[-1]

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, …) -> (N, X, C, …)
        return x.unflatten(1, (-1, C)).movedim(1, 0).movedim(3, 2).flatten(1, 2)

    def windows(x: Tensor) -> Tensor:  # (N, X, C, …) -> (N, X, W, …), with the chunk before where documents are packed
        return torch.cat((torch.cat((torch.zeros_like(x[:1]), x[:-1])), x), dim=2) if packed else x

    q, k, v, g, scales = map(chunks, (q, k, v, g, scales))
    own = position.expand(B, T).unflatten(1, (-1, C)).movedim(1, 0)  # (N, B, C)
    seen = windows(own)
    between_NXCW = scalar_decays(windows(g).exp())[0][:, :, -C:]
    distance_CW = (
        torch.arange(C, device=q.device)[:, None] - torch.arange(seen.shape[2], device=q.device) + (seen.shape[2] - C)
    )
    # of one document: their positions differ as their rows do
    is_seen = (own[..., None] - seen[..., None, :] == distance_CW) & (own[..., None] // C == seen[..., None, :] // C)
    levels = levels_between(own[..., None], seen[..., None, :], min(C.bit_length() - 1, J - 1)).repeat_interleave(
        H, dim=1
    )
    weight_NXCW = between_NXCW * scales.gather(3, levels) * is_seen.repeat_interleave(H, dim=1)
    out_NXCV = (q @ windows(k).mT * weight_NXCW) @ windows(v)
    return out_NXCV.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _last_states(
    k: Tensor, v: Tensor, g: Tensor, position: Tensor, ends: Tensor, S_BEHKV: Tensor, T: int, C: int, count: int
) -> Tensor:
    """States after row T - 1, (B, H, I, K, V): the complete blocks of C positions, and the tokens behind them."""
    B, last = k.shape[0], position[:, T - 1 : T]
    after_BTH = sums_behind(g).exp()  # D(row, T - 1]

    def shares(rows: Tensor) -> Tensor:  # (B, R, H, I): what is left of a row in every state
        existing, at = rows < T, rows.clamp_max(T - 1)
        positions = position.expand(B, -1).gather(1, at.expand(B, -1))
        of_document = existing & (last - positions == T - 1 - at)
        states = (
            F.one_hot((levels_between(last + 1, positions, count) - 1).clamp_min(0), count) * of_document[..., None]
        )
        return after_BTH[torch.arange(B, device=k.device)[:, None], at][..., None] * states[:, :, None]

    recent = torch.arange(max(0, T - C), T, device=k.device)[None]
    is_behind = position[:, recent[0]] // C == (last + 1) // C
    few = shares(recent) * is_behind[..., None, None]
    k, v = k[:, recent[0]], v[:, recent[0]]
    return torch.einsum("behi,behkv->bhikv", shares(ends), S_BEHKV) + torch.einsum("brhi,brhk,brhv->bhikv", few, k, v)


def log_linear_attention_flops(heads: int, K: int, V: int, length: int, chunk: int = 64) -> float:
    """Forward FLOPs per token in matrix products of the form above, at ``length`` tokens of one document: per head
    2C (K + V) inside a chunk, 2KV for its state, and 2KV for every token of an odd block of m = C, 2C, … positions."""
    C = min(chunk, 1 << (length - 1).bit_length())
    padded, m = -(-length // C) * C, C
    products = padded * C * (K + V)
    products += padded * K * V if length > C else 0
    while m < length:
        products += (length + m - 1) // (2 * m) * m * K * V
        m *= 2
    return 2 * heads * products / length
