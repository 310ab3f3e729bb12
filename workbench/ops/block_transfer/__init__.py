"""Blocks of rows between memory of the host and slots on the device, at addresses that only the device knows.

On a GPU the kernels read and write pinned memory of the host through its device address: no copy is submitted by the
host, which therefore need not know what is copied, and a step can be captured in a CUDA graph.

Legend: B sequences, G groups of heads that share keys, N blocks on the host, S slots on the device, b tokens of a
block, X numbers of a token's row, m entries of a list, T new tokens.
"""

from __future__ import annotations

from torch import Tensor, uint8

from workbench.ops.block_transfer import torch as by_torch
from workbench.ops.dispatch import choose_backend, record

__all__ = ["fetch_blocks", "store_rows"]


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


def _backend(on_device: Tensor) -> str:
    # kernels copy words of 32 bits, whatever the type; nothing else reaches the host from a GPU
    return "triton" if on_device.is_cuda else choose_backend(on_device.view(uint8))
