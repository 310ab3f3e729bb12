"""The delta rule in chunks of C tokens: matrix products instead of a loop over tokens, on any device.

In a chunk with incoming state S0, and D(s, r] the product of the decays of the tokens after s up to r, the rows ρ_r that the
chunk's tokens write (S_r = D(0, r] S0 + Σ_{s<=r} D(s, r] p_s ρ_sᵀ) solve one unit-lower-triangular system:

    T_rs = Σ_c ẽ_rc p_sc D_c(s, r]  (s < r)               Ê_r = ẽ_r D(0, r],   Q̂_r = q_r D(0, r],   P̂_s = p_s D(s, C]
    A_rs = Σ_c q_rc p_sc D_c(s, r]  (s <= r)              R = (I + T)⁻¹ (Z̃ - Ê S0)
    O = Q̂ S0 + A R                                        S' = D(0, C] S0 + P̂ᵀ R

This is the WY form of arXiv 2406.06484 with the decay of 2412.06464 (a number) or 2510.26692 (a vector). Decays are
only ever multiplied, never divided or subtracted as sums of logarithms: every factor lies in [0, 1], whatever the
strength. For a vector T and A cannot be had from one product; they are built from blocks of 1, 2, 4, … tokens, each time
from the later block's rows, decayed since its start, and the earlier block's columns, decayed up to its end. Documents
are kept apart by masks, never by an infinite decay.

Legend: B batch, T time, H heads, N chunks, X = B·H, C tokens in a chunk, M blocks of L tokens in a chunk, K key channels,
V value channels; an axis of 2 holds (ẽ, q) or (T, A).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SPAN = 2048
"""Tokens whose intermediate results are held at once: a longer sequence is taken span by span, each computed again in the
backward pass."""


def delta_rule_torch(
    q_BTHK: Tensor, p_BTHK: Tensor, z_BTHV: Tensor, g: Tensor | None = None, *, e_BTHK: Tensor | None = None,
    strength_BTH: Tensor | None = None, state_BHKV: Tensor | None = None, segments: Tensor | None = None,
    chunk: int = 64, span: int = SPAN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`workbench.ops.delta_rule.delta_rule`; computed in fp32 (fp64 for fp64 input), autocast or not."""
    B, T, H, K = q_BTHK.shape
    V = z_BTHV.shape[-1]
    dtype = torch.promote_types(z_BTHV.dtype, torch.float32)
    C = min(chunk, 1 << (T - 1).bit_length())
    if g is None:
        g = z_BTHV.new_zeros(B, T, H, dtype=dtype)
    S_XKV = q_BTHK.new_zeros(B * H, K, V, dtype=dtype) if state_BHKV is None else state_BHKV.to(dtype).flatten(0, 1)
    before_B = None if segments is None else segments[:, 0]  # the document that the state belongs to
    run: Any = _span
    if span < T and torch.is_grad_enabled():
        run = partial(checkpoint, _span, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    device = "cpu" if q_BTHK.device.type == "meta" else q_BTHK.device.type  # autocast knows no meta device
    with torch.autocast(device, enabled=False):
        for start in range(0, T, span):
            at = slice(start, start + span)
            parts = [
                None if x is None else x[:, at] for x in (q_BTHK, p_BTHK, z_BTHV, g, e_BTHK, strength_BTH, segments)
            ]
            o_BTHV, S_XKV = run(*parts, before_B, S_XKV, C, dtype)
            if segments is not None:
                before_B = segments[:, at][:, -1]
            outputs.append(o_BTHV)
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.to(z_BTHV.dtype), S_XKV.unflatten(0, (B, H))


def _span(
    q: Tensor, p: Tensor, z: Tensor, g: Tensor, e: Tensor | None, strength: Tensor | None, segments: Tensor | None,
    before_B: Tensor | None, S_XKV: Tensor, C: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of a stretch of tokens, and the state behind it."""
    B, T, H, _ = q.shape
    N, pad = -(-T // C), -T % C

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, …) -> (N, B, H, C, …), a view where nothing is padded
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x
        return x.unflatten(1, (N, C)).movedim(1, 0).movedim(3, 2)

    # a padded token edits nothing (p = z = 0) and does not decay (g = 0)
    e, z = (p if e is None else e).to(dtype), z.to(dtype)
    if strength is not None:
        e, z = (x * strength.to(dtype)[..., None] for x in (e, z))
    rows_NX2CK = torch.stack((chunks(e), chunks(q.to(dtype))), dim=3).flatten(1, 2)
    p_NXCK, z_NXCV = (chunks(x.to(dtype)).flatten(1, 2).contiguous() for x in (p, z))
    decay = chunks(g.to(dtype)).exp()
    masks = None if segments is None else _masks(segments, before_B, H, N, C, dtype)
    pairs = _pairs_by_scalar if decay.dim() == 4 else _pairs_by_channel
    system, scores, rows, columns, passing = pairs(rows_NX2CK, p_NXCK, decay.flatten(1, 2), masks)

    outputs = []
    for row, column, value, solve, score, keep in zip(
        *(x.unbind(0) for x in (rows.flatten(2, 3), columns, z_NXCV, _inverse(system), scores, passing))
    ):
        read_XCV, o_XCV = (row @ S_XKV).split(C, dim=1)
        written_XCV = solve @ (value - read_XCV)
        outputs.append(torch.baddbmm(o_XCV, score, written_XCV))
        S_XKV = torch.baddbmm(keep * S_XKV, column.mT, written_XCV)
    out = torch.stack(outputs, dim=1).unflatten(0, (B, H))  # (B, H, N, C, V)
    return out.flatten(2, 3).transpose(1, 2)[:, :T], S_XKV


class Masks(NamedTuple):
    """Which tokens of a chunk share a document, as ones and zeros."""

    same_NXCC: Tensor
    """With each other."""
    entering_NXC: Tensor
    """With the state that comes in."""
    leaving_NXC: Tensor
    """With the chunk's last token."""
    passing_NX: Tensor
    """Whether the last token shares it with the state that comes in."""


def _masks(segments: Tensor, before_B: Tensor | None, H: int, N: int, C: int, dtype: torch.dtype) -> Masks:
    assert before_B is not None
    B, T = segments.shape
    seg = torch.cat((segments, segments[:, -1:].expand(B, N * C - T)), dim=1).unflatten(1, (N, C)).transpose(0, 1)
    last = seg[..., -1]
    before = torch.cat((before_B[None], last[:-1]))[..., None]
    masks = (
        seg[..., :, None] == seg[..., None, :],
        seg == before,
        seg == last[..., None],
        (last[..., None] == before)[..., 0],
    )
    return Masks(*(mask.to(dtype).repeat_interleave(H, dim=1) for mask in masks))


Pairs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""T and A (N, X, C, C), the decayed rows Ê and Q̂ (N, X, 2, C, K), the columns P̂ (N, X, C, K), and D(0, C] (N, X, K or 1, 1)."""


def _pairs_by_scalar(rows_NX2CK: Tensor, p_NXCK: Tensor, decay_NXC: Tensor, masks: Masks | None) -> Pairs:
    """One decay a head and token: the products without decay, times the (C, C) matrix of D(s, r]."""
    since, until = decay_NXC[..., None], torch.ones_like(decay_NXC)[..., None]  # (N, X, M, L): D(0, r], D(s, L]
    between = until[..., None]  # (N, X, M, L, L): D(s, r] for s <= r, else 0
    while since.shape[2] > 1:
        (since_a, since_b), (until_a, until_b), (a, b) = map(_two, (since, until, between))
        between = _below(a, since_b[..., :, None] * until_a[..., None, :], b)
        since, until = (
            torch.cat((since_a, since_b * since_a[..., -1:]), dim=-1),
            torch.cat((until_a * since_b[..., -1:], until_b), dim=-1),
        )
    since_NXC, until_NXC, between_NXCC = since[:, :, 0], until[:, :, 0], between[:, :, 0]
    passing_NX = since_NXC[..., -1]
    if masks is not None:
        since_NXC, until_NXC = since_NXC * masks.entering_NXC, until_NXC * masks.leaving_NXC
        between_NXCC, passing_NX = between_NXCC * masks.same_NXCC, passing_NX * masks.passing_NX
    products = (rows_NX2CK.flatten(2, 3) @ p_NXCK.mT).unflatten(2, (2, -1)) * between_NXCC[:, :, None]
    system, scores = products.unbind(2)
    return (
        system.tril(-1), scores, rows_NX2CK * since_NXC[:, :, None, :, None], p_NXCK * until_NXC[..., None],
        passing_NX[..., None, None],
    )  # fmt: skip


def _pairs_by_channel(rows_NX2CK: Tensor, p_NXCK: Tensor, decay_NXCK: Tensor, masks: Masks | None) -> Pairs:
    """One decay a channel: blocks of L tokens are joined two by two, their rows and columns decaying on the way."""
    own = (rows_NX2CK[:, :, 1] * p_NXCK).sum(-1)
    pairs = torch.stack((torch.zeros_like(own), own), dim=-1)[..., None, None]  # (N, X, M, 2, L, L)
    rows = (rows_NX2CK.transpose(2, 3) * decay_NXCK[..., None, :]).contiguous()[..., None, :]  # (N, X, M, 2, L, K)
    columns, whole = p_NXCK[..., None, :], decay_NXCK[..., None, :]  # (N, X, M, L, K), (N, X, M, 1, K)
    while columns.shape[2] > 1:
        (pairs_a, pairs_b), (rows_a, rows_b), (columns_a, columns_b), (a, b) = map(_two, (pairs, rows, columns, whole))
        across = (rows_b.flatten(-3, -2) @ columns_a.mT).unflatten(-2, (2, -1))
        pairs = _below(pairs_a, across, pairs_b)
        rows = torch.cat((rows_a, rows_b * a[..., None, :, :]), dim=-2)
        columns, whole = torch.cat((columns_a * b, columns_b), dim=-2), a * b
    pairs, rows, columns, passing = pairs[:, :, 0], rows[:, :, 0], columns[:, :, 0], whole[:, :, 0].mT
    if masks is not None:
        pairs, rows = pairs * masks.same_NXCC[:, :, None], rows * masks.entering_NXC[:, :, None, :, None]
        columns, passing = columns * masks.leaving_NXC[..., None], passing * masks.passing_NX[..., None, None]
    system, scores = pairs.unbind(2)
    return system, scores, rows, columns, passing


def _two(x: Tensor) -> tuple[Tensor, ...]:
    """The earlier and the later block of each pair: (N, X, M, …) -> twice (N, X, M / 2, …)."""
    return x.unflatten(2, (-1, 2)).unbind(3)


def _below(a: Tensor, across: Tensor, b: Tensor) -> Tensor:
    """[[a, 0], [across, b]] in the last two axes, all of one size."""
    return torch.cat((F.pad(a, (0, a.shape[-1])), torch.cat((across, b), dim=-1)), dim=-2)


def _inverse(T: Tensor) -> Tensor:
    """(I + T)⁻¹ of strictly lower triangular T (…, C, C), from the inverses of its halves.

    Forward substitution by blocks. The series (I - T)(I + T²)(I + T⁴)… would overflow where keys repeat.
    """
    C = T.shape[-1]
    if C <= 2:
        return torch.eye(C, device=T.device, dtype=T.dtype) - T
    half = C // 2
    a, b = _inverse(torch.stack((T[..., :half, :half], T[..., half:, half:]), dim=-3)).unbind(-3)
    return _below(a, -(b @ T[..., half:, :half] @ a), b)


def delta_rule_flops(heads: int, K: int, V: int, length: int, chunk: int = 64, *, by_channel: bool = False) -> float:
    """Forward FLOPs per token in matrix products of the chunk form above, at ``length`` tokens.

    Per head: 6KV for three products with the state, 4CV for R and A R, 2 (C² - 4) / 3 for the inverse; 4CK for T and A
    with one decay a head (or none), where whole squares are computed, 2 (C - 1) K with one a channel, where only what
    lies below the diagonal is.
    """
    C = min(chunk, 1 << (length - 1).bit_length())
    padded = -(-length // C) * C / length
    pairs = 2 * (C - 1) * K if by_channel else 4 * C * K
    return padded * heads * (6 * K * V + pairs + 4 * C * V + max(0, 2 * (C * C - 4) / 3))
