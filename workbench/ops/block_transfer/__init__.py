"""Blocks of rows between memory of the host and slots on the device, at addresses that only the device knows.

On a GPU the kernels read and write pinned memory of the host through its device address: no copy is submitted by the
host, which therefore need not know what is copied, and a step can be captured in a CUDA graph. Which slot a block gets
is decided on the device as well.

Behind the slots for chosen blocks are :data:`TAILS` further ones, for the newest blocks: block n is in the one of
number n mod TAILS.

Legend: B sequences, G groups of heads that share keys, N blocks on the host, S slots on the device, b tokens of a
block, X numbers of a token's row, m entries of a list, T new tokens.
"""

from __future__ import annotations

from torch import Tensor, uint8

from workbench.ops.block_transfer import torch as by_torch
from workbench.ops.block_transfer.layout import TAILS, Tables
from workbench.ops.dispatch import choose_backend, record

MOST = 2**15 - 1
"""Most slots that the kernel plans: it counts them in 15 bits."""

__all__ = ["TAILS", "Tables", "fetch_blocks", "plan_copies", "slots_of_blocks", "store_rows", "store_tails"]


def fetch_blocks(host_BGNbX: Tensor, hot_BGSbX: Tensor, blocks_BGm: Tensor, slots_BGm: Tensor) -> None:
    """Copy blocks into slots: ``hot[b, g, slots[b, g, i]] = host[b, g, blocks[b, g, i]]``.

    Args:
        host_BGNbX: contiguous; pinned where the slots are on a GPU.
        hot_BGSbX: contiguous, of the same type.
        blocks_BGm: int64, -1 for entries without a copy.
        slots_BGm: int64, all different within a group; any number where there is no copy.
    """
    if record("fetch_blocks", _backend(hot_BGSbX)) == "triton":
        from workbench.ops.block_transfer.triton import fetch_blocks as by_kernel

        by_kernel(host_BGNbX, hot_BGSbX, blocks_BGm, slots_BGm)
    else:
        by_torch.fetch_blocks(host_BGNbX, hot_BGSbX, blocks_BGm, slots_BGm)


def store_rows(rows_BTGX: Tensor, host_BGNbX: Tensor, start_B: Tensor, lengths_B: Tensor) -> None:
    """Write the rows of T new tokens: ``host[b, g, t // b, t % b] = rows[b, t - start[b], g]``.

    Args:
        rows_BTGX: contiguous.
        host_BGNbX: as above.
        start_B: position of the first new token, int64 on the device of the rows.
        lengths_B: tokens that are in the cache afterwards; rows of later positions are padding and are not written.
    """
    if record("store_rows", _backend(rows_BTGX)) == "triton":
        from workbench.ops.block_transfer.triton import store_rows as by_kernel

        by_kernel(rows_BTGX, host_BGNbX, start_B, lengths_B)
    else:
        by_torch.store_rows(rows_BTGX, host_BGNbX, start_B, lengths_B)


def store_tails(rows_BTGX: Tensor, hot_BGSbX: Tensor, start_B: Tensor) -> None:
    """Write those of the rows of T new tokens that are in the newest TAILS blocks into the slots of these, the last of
    ``hot_BGSbX``. Arguments as above."""
    # words of 32 bits, whatever the type
    if record("store_tails", choose_backend(rows_BTGX.view(uint8))) == "triton":
        from workbench.ops.block_transfer.triton import store_tails as by_kernel

        by_kernel(rows_BTGX, hot_BGSbX, start_B)
    else:
        by_torch.store_tails(rows_BTGX, hot_BGSbX, start_B)


def plan_copies(
    tables: Tables, wanted_BGm: Tensor, newest_B: Tensor, *, keep: bool, reuse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Give a slot to every wanted block that has none, and update the tables.

    The slots of blocks that are not wanted are taken, least recently wanted first. In ascending order, the slots that
    are taken get the blocks in the order of the list.

    Args:
        tables: changed in place.
        wanted_BGm: int64, block numbers without duplicates, -1 for none; no more entries than there are slots.
        newest_B: number of the newest block. It and the TAILS - 1 before it need no slot.
        keep: whether blocks that are not wanted keep their slots as long as these are not taken.
        reuse: whether wanted blocks that have a slot are not copied again. Without it, ``keep`` must be False.

    Returns:
        (B, G, m) int64 blocks to copy, -1 for none, and their slots, as :func:`fetch_blocks` takes them; (2, B, G)
        int64 how many blocks are wanted, and how many are copied.

    Raises:
        ValueError: when the list has more entries than there are slots.
    """
    m, S = wanted_BGm.shape[-1], tables.block_of_BGS.shape[-1] - 1
    if m > S:
        raise ValueError(f"plan_copies: wanted_BGm: got {m} entries for {S} slots; expected no more than slots.")
    if record("plan_copies", choose_backend(tables.slot_of_BGN, supported=S <= MOST)) == "triton":
        from workbench.ops.block_transfer.triton import plan_copies as by_kernel

        return by_kernel(tables, wanted_BGm, newest_B, keep, reuse)
    return by_torch.plan_copies(tables, wanted_BGm, newest_B, keep, reuse)


def slots_of_blocks(tables: Tables, newest_B: Tensor) -> Tensor:
    """(B, G, N) int64 slot of every block, those of the newest blocks included; -1 for none."""
    if record("slots_of_blocks", choose_backend(tables.slot_of_BGN)) == "triton":
        from workbench.ops.block_transfer.triton import slots_of_blocks as by_kernel

        return by_kernel(tables, newest_B)
    return by_torch.slots_of_blocks(tables, newest_B)


def _backend(on_device: Tensor) -> str:
    # kernels copy words of 32 bits, whatever the type; nothing else reaches the host from a GPU
    return "triton" if on_device.is_cuda else choose_backend(on_device.view(uint8))
