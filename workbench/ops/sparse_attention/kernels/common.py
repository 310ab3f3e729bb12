# mypy: allow-untyped-defs
"""Device and host code that the kernels of sparse attention share.

Naming in the kernels, as in flash-linear-attention: ``i_`` program indices, ``o_`` offsets of a tile, ``m_`` masks,
``b_`` tiles in registers; upper-case sizes. The channels of keys are read in two parts A and E (the second may be
empty), see :class:`Channels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LAUNCH: dict[str, dict[str, int]] = {
    "visible_forward": {"BT": 128, "BN": 64, "num_warps": 4, "num_stages": 3},
    "visible_queries": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "visible_keys": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "token_forward": {"BT": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "token_normalisers": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
    "token_queries": {"BT": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
    "token_keys": {"BT": 128, "BN": 64, "num_warps": 4, "num_stages": 2},
    "token_forward 128": {"BT": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    "token_normalisers 128": {"BT": 64, "BN": 64, "num_warps": 8, "num_stages": 3},
    "token_queries 128": {"BT": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "token_keys 128": {"BT": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
    "token_forward wide": {"BT": 64, "BN": 32, "num_warps": 8, "num_stages": 2},
    "token_normalisers wide": {"BT": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
    "token_queries wide": {"BT": 64, "BN": 32, "num_warps": 8, "num_stages": 1},
    "token_keys wide": {"BT": 32, "BN": 64, "num_warps": 8, "num_stages": 1},
    "block_scores": {"num_warps": 4, "num_stages": 2},
    "selected_forward": {"BN": 32, "num_warps": 1, "num_stages": 2},
    "selected_queries": {"BN": 32, "num_warps": 2, "num_stages": 2},
    "selected_queries 16": {"BN": 32, "num_warps": 1, "num_stages": 3},
    "selected_keys": {"ROWS": 64, "num_warps": 4, "num_stages": 2},
    "selected_keys 16": {"ROWS": 32, "num_warps": 1, "num_stages": 2},
}
"""Tile sizes, warps and pipeline stages of each kernel.

An entry "NAME rows" overrides NAME for tiles of that many rows (of queries; of keys for "selected_keys"). ROWS is the
approximate number of query rows multiplied with a tile of keys at once. The settings of ``selected_*`` are the best of
44 and more on an H200 (8 × 4,096 tokens, a group of 16 heads, blocks of 64 and latents in blocks of 16); the others are
not tuned. Those of ``token_*``, for heads of up to 64 and 128 channels and for wide ones, keep tiles in shared memory
and nearly all sums in registers. ``token_keys`` has 128 queries for its 128 threads: of a vector with fewer entries
than threads, Triton has every thread load the entries of all columns that it holds.
"""

Bundle = TypeVar("Bundle", bound=tuple[Any, ...])


def constants(bundle: Bundle) -> Bundle:
    """A NamedTuple whose fields are compile-time constants of a kernel."""
    return type(bundle)(*map(tl.constexpr, bundle))


class Channels(NamedTuple):
    """How the channels of keys and values are read. Sizes with P are padded to a power of two, at least 16."""

    A: int
    """Channels of the first part: the values where these are channels of the keys, else the largest power of two."""
    AP: int
    E: int
    """Channels of the second part, may be 0."""
    EP: int
    V: int
    """Channels of the values."""
    VP: int
    SEPARATE_VALUES: bool
    """Whether the values are a tensor of their own."""
    PRECISION: str
    """Input precision of products."""

    @classmethod
    def of(cls, q: Tensor, v: Tensor | None, V: int) -> Channels:
        K = q.shape[-1]
        A = V if v is None else 1 << (K.bit_length() - 1)
        E = K - A
        return cls(A, padded(A), E, padded(E) if E else 0, V, padded(V), v is not None, precision(q))


class Inputs(NamedTuple):
    """Pointers of the inputs."""

    q: Tensor
    """(B, T, H, K)"""
    k: Tensor
    """(B, N, G, K)"""
    v: Tensor
    """(B, N, G, V); the keys where the values are channels of them."""
    start: Tensor
    """(B, T) row at which the document of each query starts."""


class Upstream(NamedTuple):
    """Pointers that the backward passes read besides the inputs."""

    do: Tensor
    """(B, T, H, V)"""
    lse: Tensor
    """(B, T, H)"""
    delta: Tensor
    """(B, T, H), see :func:`output_products`."""


class Sizes(NamedTuple):
    """Run-time numbers of a call."""

    T: int
    """Queries."""
    N: int
    """Keys."""
    H: int
    """Query heads."""
    G: int
    """Key–value heads."""
    offset: int
    """Row of the first query."""
    scale: float
    """Factor on the scores."""


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def launch_settings(kernel: str, channels: Channels, rows: int = 0) -> dict[str, int]:
    """Tile sizes, warps and stages of a launch."""
    settings = dict(LAUNCH.get(f"{kernel} {rows}", LAUNCH[kernel]))
    narrow = min(channels.AP, channels.VP) < 64
    wide = max(channels.AP + channels.EP, channels.VP) > 128
    if narrow or wide:
        limits = {"BT": 64, "BN": 32}
        settings |= {name: min(settings[name], limit) for name, limit in limits.items() if name in settings}
    if narrow:
        settings["num_warps"] = min(settings["num_warps"], 2)
    return settings


@triton.jit
def load_rows(base, o_rows, stride, mask, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """(rows, PADDED) channels of the rows, zero where masked or padded."""
    o_d = tl.arange(0, PADDED)
    p = base + o_rows[:, None] * stride + o_d[None, :]
    if PADDED == SIZE:
        return tl.load(p, mask=mask[:, None], other=0.0)
    return tl.load(p, mask=mask[:, None] & (o_d[None, :] < SIZE), other=0.0)


@triton.jit
def store_rows(base, o_rows, stride, mask, b_x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Inverse of :func:`load_rows`."""
    o_d = tl.arange(0, PADDED)
    p = base + o_rows[:, None] * stride + o_d[None, :]
    tl.store(p, b_x.to(base.dtype.element_ty), mask=mask[:, None] & (o_d[None, :] < SIZE))


@triton.jit
def visible_bounds(o_row, b_start, mask, LENGTH: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """First visible slot of each query, and the end (exclusive); equal where nothing is visible."""
    left = o_row - b_start + 1 - LENGTH
    low = b_start // STRIDE
    high = low + tl.where(mask & (left >= 0), left // STRIDE + 1, 0)
    if WINDOW > 0:
        low = tl.maximum(low, high - WINDOW)
    return low, high


@triton.jit
def scores(b_xA, b_xE, b_yA, y, o_rows, stride, mask, channels):
    """x yᵀ (fp32) from both parts of the channels, and the second part of y, which is loaded here."""
    b_s = tl.dot(b_xA, tl.trans(b_yA), input_precision=channels.PRECISION)
    b_yE = b_yA
    if channels.EP > 0:
        b_yE = load_rows(y + channels.A, o_rows, stride, mask, channels.E, channels.EP)
        b_s = tl.dot(b_xE, tl.trans(b_yE), b_s, input_precision=channels.PRECISION)
    return b_s, b_yE


@triton.jit
def load_values(v, b_kA, o_rows, stride, mask, channels):
    """(rows, VP) values: from their own tensor, or the first part of the keys, which is loaded already."""
    if channels.SEPARATE_VALUES:
        return load_rows(v, o_rows, stride, mask, channels.V, channels.VP)
    else:
        return b_kA


@triton.jit
def online_softmax_step(b_s, b_m, b_l):
    """One step of the online softmax over keys.

    Args:
        b_s: scores times log2(e), -inf where masked, (rows, keys).
        b_m, b_l: maximum and normaliser of the keys before, (rows,).

    Returns:
        the weights of these keys, maximum, normaliser, and the factor on what was accumulated before.
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    b_safe = tl.where(b_m_new == -float("inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_rescale = tl.exp2(b_m - b_safe)
    b_l = b_l * b_rescale + tl.sum(b_p, axis=1)
    return b_p, b_m_new, b_l, b_rescale


@triton.jit
def store_attention(o, lse, o_query, mask, b_o, b_m, b_l, V: tl.constexpr, VP: tl.constexpr):
    """Normalised outputs and natural log-sum-exp; zero and -inf for queries without visible keys."""
    any_key = b_l > 0
    b_l = tl.where(any_key, b_l, 1.0)
    store_rows(o, o_query, V, mask, tl.where(any_key[:, None], b_o / b_l[:, None], 0.0), V, VP)
    tl.store(lse + o_query, tl.where(any_key, (b_m + tl.log2(b_l)) * LN2, -float("inf")), mask=mask)


@triton.jit
def load_lse(lse, o_query, mask):
    """Log-sum-exp of the queries, 0 where it is -inf."""
    b_lse = tl.load(lse + o_query, mask=mask, other=0.0)
    return tl.where(b_lse == -float("inf"), 0.0, b_lse)


@triton.jit
def _output_products(do, o, dlse, delta, rows, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr):
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = o_row < rows
    b_do_o = load_rows(do, o_row, V, m_row, V, VP).to(tl.float32) * load_rows(o, o_row, V, m_row, V, VP).to(tl.float32)
    tl.store(delta + o_row, tl.sum(b_do_o, axis=1) - tl.load(dlse + o_row, mask=m_row, other=0.0), mask=m_row)


def output_products(do: Tensor, o: Tensor, dlse: Tensor) -> Tensor:
    """(B, T, H) fp32: do · o - dlse, which is subtracted from the gradient of every probability."""
    delta = torch.empty(o.shape[:-1], dtype=torch.float32, device=o.device)
    rows, V = delta.numel(), o.shape[-1]
    _output_products[(triton.cdiv(rows, 32),)](do, o, dlse, delta, rows, V=V, VP=padded(V), BR=32, num_warps=4)
    return delta
