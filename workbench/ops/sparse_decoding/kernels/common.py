# mypy: allow-untyped-defs
"""What the kernels share: launch settings, counted arrivals, lists of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

LAUNCH: dict[str, dict[str, int]] = {
    "minmax": {"BN": 64, "fused": 1, "num_warps": 8},
    "minmax latents": {"BN": 32, "fused": 1, "num_warps": 4},
    "scores": {"BM": 256, "num_warps": 4},
    "indexer": {"rows": 128, "fused": 1, "num_warps": 4},
    "weights": {"BN": 4096, "fused": 1, "num_warps": 16},
    "select": {"tile": 8192, "num_warps": 16},
    "attend": {"BT": 32, "heads": 16, "programs": 528, "num_warps": 2, "num_stages": 2},
    "attend latents": {"BT": 32, "heads": 16, "programs": 132, "num_warps": 4, "num_stages": 2},
    "combine": {"BV": 128, "num_warps": 4},
    "extend": {"num_warps": 4},
    "read": {"num_warps": 4},
}
"""Tile sizes, warps and pipeline stages of each kernel, the best or close to it for 1 to 8 sequences of 32k to 128k
tokens on an H200. ``BN`` of weights: numbers of four heads in a program; ``tile``: elements that a program chooses from
where one is not enough; ``heads``: most heads of a group in one program; ``programs``: into how many programs the
chosen tokens are split, about; ``fused``: whether the program that ends last chooses, instead of another launch."""
TILE = 16_384
"""Most elements that one program chooses from."""


def padded(size: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(size))


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def settings_of(kernel: str, latents: bool = False) -> dict[str, int]:
    """Launch settings of a kernel."""
    return dict(LAUNCH[f"{kernel} latents" if latents else kernel])


def warps_for(elements: int, warps: int) -> int:
    """At least ``warps``, with at most 32 elements of a choice per thread."""
    return max(warps, min(16, elements // 1024))


@triton.jit
def ends_last(ticket, programs):
    """Whether all other of the ``programs`` have arrived; their stores are visible then."""
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if is_last:
        tl.store(ticket, 0)
    return is_last


@triton.jit
def entry(listed, first_listed, o_j, J: tl.constexpr, FIRST: tl.constexpr):
    """Blocks at positions of a list; of the second list where the first one is empty."""
    b_block = tl.load(listed + o_j, mask=o_j < J, other=-1)
    if FIRST:  # noqa: SIM102
        if tl.load(listed) < 0:
            b_block = tl.load(first_listed + o_j, mask=o_j < J, other=-1)
    return b_block


@triton.jit
def newest_is_unlisted(listed, first_listed, length, J: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    b_block = entry(listed, first_listed, tl.arange(0, triton.next_power_of_2(J)), J, FIRST)
    return tl.max((b_block == (length - 1) // BLOCK).to(tl.int32), axis=0) == 0


@triton.jit
def candidate_rows(
    listed,
    first_listed,
    o_m,
    length,
    M,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    NEWEST: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Rows of M candidates, and which exist: all rows, each of UNIT tokens, or those of the tokens of listed blocks and
    of the newest token."""
    b_row, m_m = o_m.to(tl.int64), o_m * UNIT < length
    if J > 0:
        b_block = entry(listed, first_listed, o_m // BLOCK, J, FIRST)
        b_row = b_block * BLOCK + o_m % BLOCK
        m_m = (b_block >= 0) & (b_row < length)
        if NEWEST:
            unlisted = newest_is_unlisted(listed, first_listed, length, J, BLOCK, FIRST)
            is_newest = o_m == J * BLOCK
            b_row = tl.where(is_newest, length - 1, b_row)
            m_m = tl.where(is_newest, unlisted.to(tl.int32), m_m.to(tl.int32)) > 0
    return b_row, m_m & (o_m < M)
