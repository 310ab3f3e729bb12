"""The delta rule in chunks of C tokens: matrix products instead of a loop over tokens, on any device.

With β in e and v, and D(s, r] the product of the decays of the tokens after s up to r, the values that the tokens of a
chunk actually write, R, (S_r = D(0, r] S0 + Σ_{s<=r} D(s, r] k_s R_sᵀ, S0 the incoming state) solve one
unit-lower-triangular system:

    T_rs = Σ_c e_rc k_sc D_c(s, r]  (s < r)               Ê_r = e_r D(0, r],   Q̂_r = q_r D(0, r],   K̂_s = k_s D(s, C]
    A_rs = Σ_c q_rc k_sc D_c(s, r]  (s <= r)              R = (I + T)⁻¹ (V - Ê S0)
    O = Q̂ S0 + A R                                        S' = D(0, C] S0 + K̂ᵀ R

This is the WY form of arXiv 2406.06484 with the decay of 2412.06464 (a number) or 2510.26692 (a vector). For a number,
and for a vector with a strong decay, decays are only multiplied, never divided or subtracted as sums of logarithms:
every factor lies in [0, 1]. For a vector, T and A are then not one product; they are built from blocks of 1, 2, 4, …
tokens, each time from the rows of the later block, decayed since its start, and the columns of the earlier block,
decayed up to its end. Where no channel of a vector loses more than 24 nats in either half of a chunk, the middle of the
chunk is the reference of all rows and columns, and T and A are one product: twice as fast on a CPU. Documents are
separated by masks, not by an infinite decay.

Legend: B batch, T time, H heads, N chunks, X = B·H, C tokens of a chunk, M blocks of L tokens in a chunk, K key
channels, V value channels; an axis of size 2 holds (e, q) or (T, A).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from workbench.ops.dispatch import disable_autocast

SPAN = 2048
"""Tokens whose intermediate results are in memory at once: longer sequences are computed span by span, and each span
again in the backward pass (checkpointing)."""


def delta_rule_torch(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 32,
    span: int = SPAN,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`, computed in float32 (float64 for float64 input) regardless of
    autocast."""
    B, T, H, K = q_BTHK.shape
    V = value_BTHV.shape[-1]
    dtype = torch.promote_types(value_BTHV.dtype, torch.float32)
    C = min(chunk, 1 << (T - 1).bit_length())
    if g is None:
        g = value_BTHV.new_zeros(B, T, H, dtype=dtype)
    S_XKV = q_BTHK.new_zeros(B * H, K, V, dtype=dtype) if state_BHKV is None else state_BHKV.to(dtype).flatten(0, 1)
    previous_B = None if segments is None else segments[:, 0]  # the document of the state
    run: Any = _span
    if span < T and torch.is_grad_enabled():
        run = partial(checkpoint, _span, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    with disable_autocast(q_BTHK):
        parts = (q_BTHK, write_key_BTHK, value_BTHV, g, erase_key_BTHK, beta_BTH, segments)
        spans = [[None] * -(-T // span) if x is None else x.split(span, dim=1) for x in parts]
        for part in zip(*spans):
            o_BTHV, S_XKV = run(*part, previous_B, S_XKV, C, dtype)
            if segments is not None:
                previous_B = part[-1][:, -1]
            outputs.append(o_BTHV)
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.to(value_BTHV.dtype), S_XKV.unflatten(0, (B, H))


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    beta: Tensor | None,
    segments: Tensor | None,
    previous_B: Tensor | None,
    S_XKV: Tensor,
    C: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs of a span of tokens, and the state after it."""
    B, T, H, _ = q.shape
    N, pad = -(-T // C), -T % C

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, …) -> (N, B, H, C, …), a view where nothing is padded
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad)) if pad else x
        return x.to(dtype).unflatten(1, (N, C)).movedim(1, 0).movedim(3, 2)

    # a padded token edits nothing (k = v = 0) and does not decay (g = 0)
    values = chunks(v).flatten(1, 2).contiguous()
    since: Tensor | None = None
    until: Tensor | None = None
    carry: Tensor | None = None
    decay = chunks(g)
    weighs = g.dim() == 3 or _is_moderate(decay)
    around_middle = g.dim() == 4 and weighs
    if around_middle:
        erase_key = None if e is None else chunks(e)
        rows, columns, entry, passing = _AroundMiddle.apply(chunks(q), chunks(k), decay, erase_key)
        pairs = torch.ones(C, C, dtype=dtype).tril().expand(1, 1, 2, C, C)  # where s <= r
        # the state that chunks read and pass on is the one in their middle
        S_XKV = entry[0] * S_XKV
        passing = passing * torch.cat((entry[1:], torch.ones_like(entry[:1])))
    else:
        rows = torch.stack((chunks(k if e is None else e), chunks(q)), dim=3).flatten(1, 2)  # (N, X, 2, C, K)
        columns = chunks(k).flatten(1, 2).contiguous()
        by = _by_scalar if g.dim() == 3 else _by_channel
        pairs, rows, columns, since, until, passing = by(rows, columns, decay.flatten(1, 2).exp())
    if segments is not None:
        same, entering, leaving, staying = document_masks(segments, previous_B, H, N, C, dtype)
        pairs = pairs * same[:, :, None]
        if around_middle:
            carry = staying
        else:
            passing = passing * staying
        since, until = (x if y is None else x * y for x, y in ((entering, since), (leaving, until)))
    if beta is not None:  # β scales the write key: k (β v)ᵀ - k (β e)ᵀ S = (β k) (v - Sᵀ e)ᵀ
        beta = chunks(beta).flatten(1, 2)[..., None]
        pairs, until = pairs * beta.mT[:, :, None], beta if until is None else until * beta
    twice = None if since is None else torch.cat((since, since), dim=2)
    factors = (pairs, twice, until, carry, passing)
    out_NXCV, S_XKV = _Scan.apply(rows.flatten(2, 3), columns, values, *factors, S_XKV, weighs, around_middle)
    return out_NXCV.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T], S_XKV


class _Scan(torch.autograd.Function):
    """The recurrence over chunks: outputs, and the state after the last chunk.

    Args:
        rows: (N, X, 2C, K), Ê over Q̂, without the factors ``since``.
        columns: (N, X, C, K), K̂, without the factors ``until``.
        values: (N, X, C, V).
        pairs: (N, X, 2, C, C), T (its diagonal is ignored) and A; where ``weighs``, factors on the products of rows and
            columns that give these.
        since, until: (N, X, 2C, 1) and (N, X, C, 1), factors on rows and columns where they meet the state, or None.
            One number per token is cheaper here than on all channels.
        carry: (N, X, 1, 1), a mask of the incoming state where it is passed on, or None. Has no gradient.
        passing: (N, X, K or 1, 1), decay of the state over a chunk, or, with ``around_middle``, from its middle to that
            of the next one; what the chunk writes decays by it too.
        S: (X, K, V), the state.

    The backward pass is explicit: R = (I + T)⁻¹ W gives dW = (I + T)⁻ᵀ dR and dT = -dW Rᵀ, without a gradient of the
    inverse.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows, columns, values, pairs, since, until, carry, passing, S, weighs, around_middle
    ):
        N, C = values.shape[0], values.shape[2]
        products = (rows @ columns.mT).unflatten(2, (2, C)) if weighs else None
        system, scores = (pairs if products is None else products * pairs).unbind(2)
        solve = unit_inverse(system.tril(-1))
        out, written, states = torch.empty_like(values), torch.empty_like(values), S.new_empty(N + 1, *S.shape)
        states[0] = S
        each = (rows, columns, values, solve, scores, passing, written, out, states[:N], states[1:])
        # on the meta device there is nothing to compute, and an estimate of memory does not need every chunk
        steps = zip(range(0 if values.is_meta else N), *(x.unbind(0) for x in each))
        for n, row, column, value, inverse, score, keep, write, o, before, after in steps:
            read = row @ before
            if since is not None:
                read *= since[n]
            torch.bmm(inverse, value - read[:, :C], out=write)
            torch.baddbmm(read[:, C:], score, write, out=o)
            entering = write if until is None else write * until[n]
            if around_middle:
                torch.baddbmm(before if carry is None else carry[n] * before, column.mT, entering, out=after).mul_(keep)
            else:
                torch.baddbmm(keep * before, column.mT, entering, out=after)
        ctx.around_middle = around_middle
        factors = (since, until, carry, passing)
        ctx.save_for_backward(rows, columns, pairs, products, solve, scores, *factors, written, states)
        return out, states[N].clone()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_S: Tensor) -> Any:
        rows, columns, pairs, products, solve, scores, *factors, written, states = ctx.saved_tensors
        since, until, carry, passing = factors
        N, X, C, V = written.shape
        d_rows, d_columns, d_passing, d_values = (torch.empty_like(x) for x in (rows, columns, passing, written))
        of_factors: list[Any] = [None if x is None else torch.empty_like(x) for x in (since, until)]
        d_since, d_until = of_factors
        d_pairs = written.new_empty(N, X, 2 * C, C)
        d_S, d_read = d_S.clone(), written.new_empty(X, 2 * C, V)  # of -Ê S0 over Q̂ S0
        each = (rows, columns, solve, scores, passing, written, states[:N], d_out, d_rows, d_columns, d_pairs, d_values)
        steps = reversed(list(zip(range(N), *(x.unbind(0) for x in each))))
        with disable_autocast(written):  # compiled code traces this under the caller's autocast
            for n, row, column, inverse, score, keep, write, before, d_o, d_row, d_column, d_pair, d_value in steps:
                if ctx.around_middle:  # of S + K̂ᵀ R, of which the state is ``keep`` times
                    torch.div((d_S * states[n + 1]).sum(2, keepdim=True), keep, out=d_passing[n])
                    d_S *= keep
                d_write = column @ d_S
                if until is None:
                    torch.bmm(write, d_S.mT, out=d_column)
                else:
                    torch.sum(d_write * write, dim=-1, keepdim=True, out=d_until[n])
                    d_write *= until[n]
                    torch.bmm(write * until[n], d_S.mT, out=d_column)
                d_read[:, C:] = d_o
                d_write += score.mT @ d_read[:, C:]
                torch.bmm(inverse.mT, d_write, out=d_value)
                d_read[:, :C] = -d_value
                torch.bmm(d_read, write.mT, out=d_pair)
                torch.bmm(d_read, before.mT, out=d_row)
                if since is not None:
                    torch.sum(row * d_row, dim=-1, keepdim=True, out=d_since[n])
                    d_row *= since[n]
                    d_read *= since[n]
                if not ctx.around_middle:
                    torch.sum(d_S * before, dim=2 if keep.shape[1] > 1 else (1, 2), keepdim=True, out=d_passing[n])
                    d_S.mul_(keep)
                elif carry is not None:
                    d_S.mul_(carry[n])
                d_S.baddbmm_(row.mT, d_read)
            d_pairs = d_pairs.unflatten(2, (2, C))
            d_pairs[:, :, 0].tril_(-1)
            if products is not None:
                d_products = (d_pairs * pairs).flatten(0, 1).flatten(1, 2)
                d_pairs *= products
                d_rows.flatten(0, 1).baddbmm_(d_products, columns.flatten(0, 1))
                d_columns.flatten(0, 1).baddbmm_(d_products.mT, rows.flatten(0, 1))
        return d_rows, d_columns, d_values, d_pairs, d_since, d_until, None, d_passing, d_S, None, None


def document_masks(
    segments: Tensor, previous_B: Tensor | None, H: int, N: int, C: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks of ones and zeros, tokens of a chunk that share a document: with each other (N, X, C, C), with the incoming
    state (N, X, C, 1), with the last token (N, X, C, 1); and whether the last token shares it with the incoming state
    (N, X, 1, 1).

    Args:
        segments: (B, T) document numbers.
        previous_B: (B,) the document of the state before the first token.
        H, N, C: heads, chunks, tokens of a chunk.
        dtype: of the masks.
    """
    assert previous_B is not None
    B, T = segments.shape
    seg = (
        torch.cat((segments, segments[:, -1:].expand(B, N * C - T)), dim=1)
        .unflatten(1, (N, C))
        .transpose(0, 1)[..., None]
    )
    last = seg[:, :, -1:]
    previous = torch.cat((previous_B[None, :, None, None], last[:-1]))
    masks = (seg == seg.mT, seg == previous, seg == last, last == previous)
    return tuple(mask.to(dtype).repeat_interleave(H, dim=1) for mask in masks)


MODERATE_NATS = 24.0
"""Largest decay of either half of a chunk for which :class:`_AroundMiddle` is taken: its factors, at most e^±24, leave
room in fp32 for products that are masked, and their sums of logarithms are exact to 1e-6. From one middle to the next
the state decays by e^-48 at most, by which the backward pass divides."""

_always_blocks = False


@contextmanager
def by_blocks() -> Iterator[None]:
    """Decays per channel by blocks, however moderate: the form whose FLOPs :func:`delta_rule_flops` counts."""
    global _always_blocks
    before, _always_blocks = _always_blocks, True
    try:
        yield
    finally:
        _always_blocks = before


Pairs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]
"""``pairs``, ``rows`` (N, X, 2, C, K), ``columns``, ``since``, ``until`` and ``passing`` of :class:`_Scan`, without
documents."""


def scalar_decays(decay_NXC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of one decay per token, C a power of two: D(s, r] for s <= r, else 0 (N, X, C, C); D(0, r] and D(s, C]
    (N, X, C, 1)."""
    since, until = decay_NXC[..., None], torch.ones_like(decay_NXC)[..., None]  # (N, X, M, L): D(0, r], D(s, L]
    between = until[..., None]  # (N, X, M, L, L): D(s, r] for s <= r, else 0
    while since.shape[2] > 1:
        (since_a, since_b), (until_a, until_b), (a, b) = map(_two, (since, until, between))
        between = _below(a, since_b[..., :, None] * until_a[..., None, :], b)
        since, until = (
            torch.cat((since_a, since_b * since_a[..., -1:]), dim=-1),
            torch.cat((until_a * since_b[..., -1:], until_b), dim=-1),
        )
    return between[:, :, 0], since[:, :, 0, :, None], until[:, :, 0, :, None]


def _by_scalar(rows: Tensor, columns: Tensor, decay_NXC: Tensor) -> Pairs:
    """One decay per head: products of rows and columns are weighted by D(s, r]."""
    between_NXCC, since_NXC1, until_NXC1 = scalar_decays(decay_NXC)
    pairs = between_NXCC[:, :, None].expand(-1, -1, 2, -1, -1)
    return pairs, rows, columns, since_NXC1, until_NXC1, since_NXC1[:, :, -1:]


def _by_channel(rows: Tensor, columns: Tensor, decay_NXCK: Tensor) -> Pairs:
    """One decay per channel: blocks of L tokens are joined in pairs, and their rows and columns decayed."""
    diagonal = (rows[:, :, 1] * columns).sum(-1)
    pairs = torch.stack((torch.zeros_like(diagonal), diagonal), dim=-1)[..., None, None]  # (N, X, M, 2, L, L)
    rows = (rows.transpose(2, 3) * decay_NXCK[..., None, :]).contiguous()[..., None, :]  # (N, X, M, 2, L, K)
    columns, passing = columns[..., None, :], decay_NXCK[..., None, :]  # (N, X, M, L, K), (N, X, M, 1, K)
    while columns.shape[2] > 1:
        (pairs_a, pairs_b), (rows_a, rows_b), (columns_a, columns_b), (a, b) = map(
            _two, (pairs, rows, columns, passing)
        )
        across = (rows_b.flatten(-3, -2) @ columns_a.mT).unflatten(-2, (2, -1))
        pairs = _below(pairs_a, across, pairs_b)
        rows = torch.cat((rows_a, rows_b * a[..., None, :, :]), dim=-2)
        columns, passing = torch.cat((columns_a * b, columns_b), dim=-2), a * b
    return pairs[:, :, 0], rows[:, :, 0], columns[:, :, 0], None, None, passing[:, :, 0].mT


def _is_moderate(g_NBHCK: Tensor) -> bool:
    """Whether the middle of every chunk can be the reference of all its decays; never where values are not at hand, or
    would have to come from a device."""
    if _always_blocks or g_NBHCK.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    with torch.no_grad():
        early, late = (half.sum(3).abs() for half in g_NBHCK.tensor_split(2, dim=3))
        return bool(torch.maximum(early.amax(), late.amax()) <= MODERATE_NATS)


class _AroundMiddle(torch.autograd.Function):
    """Decays per channel that are moderate: rows are decayed from the middle of the chunk and columns up to it, before
    or after, so that all their products are one. The state is decayed to the middle, and from it to the end.

    Args:
        q, k, g, e: (N, B, H, C, K), views of (B, T, H, K); without ``e`` the erase key is ``k``.

    Returns:
        ``rows`` (N, X, 2, C, K) and ``columns`` (N, X, C, K); (N, X, K, 1) decay from the start to the middle, and from
        there to the end.

    The backward pass is written out to save passes over memory. The gradient with respect to the logarithm of a factor
    is the scaled tensor times its gradient. Gradients have the memory layout of the inputs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor, e: Tensor | None) -> tuple[Tensor, ...]:
        C = k.shape[3]
        # contiguous, whatever the order of the inputs: a cumulative sum is slow otherwise
        since = g.clone(memory_format=torch.contiguous_format).cumsum_(3)
        middle = since[:, :, :, (C - 1) // 2, None].clone()
        since.sub_(middle).exp_()
        rows = since.new_empty(*since.shape[:3], 2, *since.shape[3:])
        torch.mul(k if e is None else e, since, out=rows[:, :, :, 0])
        torch.mul(q, since, out=rows[:, :, :, 1])
        columns = torch.div(k, since, out=torch.empty_like(since))
        ctx.has_erase_key = e is not None
        rows, columns, entry, passing = (x.flatten(1, 2) for x in (rows, columns, middle.exp(), since[:, :, :, -1:]))
        results = rows, columns, entry.mT, passing.mT
        ctx.save_for_backward(since, *results)
        return results

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_columns: Tensor, d_entry: Tensor, d_passing: Tensor) -> Any:
        since, rows, columns, entry, passing = ctx.saved_tensors
        N, B, H, C, K = since.shape

        def heads(x: Tensor) -> Tensor:  # (N, X, …) -> (N, B, H, …)
            return x.unflatten(1, (B, H))

        def gradient() -> Tensor:  # (B, T, H, K) in memory
            return since.new_empty(B, N, C, H, K).movedim(1, 0).movedim(3, 2)

        rows, columns, d_rows, d_columns = map(heads, (rows, columns, d_rows, d_columns))
        d_e = torch.mul(d_rows[:, :, :, 0], since, out=gradient())
        d_q = torch.mul(d_rows[:, :, :, 1], since, out=gradient())
        d_log = d_rows[:, :, :, 0] * rows[:, :, :, 0]
        d_log.addcmul_(d_rows[:, :, :, 1], rows[:, :, :, 1]).addcmul_(d_columns, columns, value=-1)
        d_log[:, :, :, -1:] += heads((d_passing * passing).mT)
        d_k = torch.div(d_columns, since, out=gradient()) if ctx.has_erase_key else d_e.addcdiv_(d_columns, since)
        # of log since_r = Σ_{t ≤ r} g_t - Σ_{t ≤ m} g_t, m the middle: sums over r ≥ t are all but those before t
        before = d_log.cumsum(3)
        d_g = torch.sub(d_log, before, out=gradient())
        after = (C - 1) // 2 + 1
        d_g[:, :, :, :after] += heads((d_entry * entry).mT)
        d_g[:, :, :, after:] += before[:, :, :, -1:]
        return d_q, d_k, d_g, d_e if ctx.has_erase_key else None


def _two(x: Tensor) -> tuple[Tensor, ...]:
    """The earlier and the later block of each pair: (N, X, M, …) -> twice (N, X, M / 2, …)."""
    return x.unflatten(2, (-1, 2)).unbind(3)


def _below(a: Tensor, across: Tensor, b: Tensor) -> Tensor:
    """[[a, 0], [across, b]] in the last two axes, all of one size."""
    return torch.cat((F.pad(a, (0, a.shape[-1])), torch.cat((across, b), dim=-1)), dim=-2)


def unit_inverse(T: Tensor) -> Tensor:
    """(I + T)⁻¹ of strictly lower triangular T (…, C, C), from the inverses of its halves.

    Forward substitution by blocks. The series (I - T)(I + T²)(I + T⁴)… would overflow where keys repeat.
    """
    C = T.shape[-1]
    if C <= 2:
        return torch.eye(C, device=T.device, dtype=T.dtype) - T
    half = C // 2
    a, b = unit_inverse(torch.stack((T[..., :half, :half], T[..., half:, half:]), dim=-3)).unbind(-3)
    return _below(a, -(b @ T[..., half:, :half] @ a), b)


def delta_rule_flops(heads: int, K: int, V: int, length: int, chunk: int = 32, *, by_channel: bool = False) -> float:
    """Forward FLOPs per token in matrix products of the chunk form above, at ``length`` tokens.

    Per head: 6KV for three products with the state, 4CV for R and A R, 2 (C² - 4) / 3 for the inverse; 4CK for T and A
    with one decay per head (or none), where full squares are computed, 2 (C - 1) K with one per channel, where blocks
    below the diagonal are.
    """
    C = min(chunk, 1 << (length - 1).bit_length())
    padded = -(-length // C) * C / length
    pairs = 2 * (C - 1) * K if by_channel else 4 * C * K
    return padded * heads * (6 * K * V + pairs + 4 * C * V + max(0, 2 * (C * C - 4) / 3))
