"""Blocks between host and slots: plain torch against a loop, the kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.block_transfer import fetch_blocks, store_rows

B, G, N, S, BLOCK, X, M = 2, 3, 7, 5, 4, 6, 4


def memories(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, G, N, BLOCK, X).to(dtype), torch.randn(B, G, S, BLOCK, X).to(dtype)


def entries() -> tuple[Tensor, Tensor]:
    """Up to four blocks, and different slots for them; some entries are empty."""
    blocks = torch.stack([torch.randperm(N)[:M] for _ in range(B * G)]).view(B, G, M)
    slots = torch.stack([torch.randperm(S)[:M] for _ in range(B * G)]).view(B, G, M)
    return blocks.masked_fill(torch.rand(B, G, M) < 0.4, -1), slots


def test_blocks_are_copied_into_their_slots() -> None:
    host, hot = memories()
    blocks, slots = entries()
    expected = hot.clone()
    for b, g, i in torch.cartesian_prod(torch.arange(B), torch.arange(G), torch.arange(M)).tolist():
        if blocks[b, g, i] >= 0:
            expected[b, g, slots[b, g, i]] = host[b, g, blocks[b, g, i]]
    fetch_blocks(host, hot, blocks, slots)
    assert torch.equal(hot, expected)


@pytest.mark.parametrize("T", [1, 9])
def test_rows_are_written_at_their_positions(T: int) -> None:
    host, _ = memories()
    rows, start, lengths = torch.randn(B, T, G, X), torch.tensor([3, 11]), torch.tensor([3 + T, 11 + T - (T > 1)])
    expected = host.clone()
    for b in range(B):
        for t in range(int(start[b]), int(lengths[b])):
            expected[b, :, t // BLOCK, t % BLOCK] = rows[b, t - start[b]]
    store_rows(rows, host, start, lengths)
    assert torch.equal(host, expected)


IN_INTERPRETER = """
import sys, torch
sys.path[:0] = ["tests", "tests/ops"]
from test_block_transfer import entries, memories, BLOCK, G, X
from workbench.ops.block_transfer import fetch_blocks, store_rows
from workbench.ops.dispatch import force_backend

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    host, hot = memories(dtype)
    by_kernel, stored, (blocks, slots) = hot.clone(), host.clone(), entries()
    rows, start, lengths = torch.randn(2, 9, G, X).to(dtype), torch.tensor([3, 11]), torch.tensor([12, 19])
    fetch_blocks(host, hot, blocks, slots)
    store_rows(rows, host, start, lengths)
    with force_backend("triton"):
        fetch_blocks(stored, by_kernel, blocks, slots)
        store_rows(rows, stored, start, lengths)
    assert torch.equal(by_kernel, hot) and torch.equal(stored, host), dtype
print("kernels agree")
"""


@pytest.mark.compile
def test_the_kernels_in_the_interpreter_are_plain_torch() -> None:
    printed = in_interpreter("-c", IN_INTERPRETER)
    assert "kernels agree" in printed, printed[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_address_pinned_memory(dtype: torch.dtype) -> None:
    host, hot = memories(dtype)
    blocks, slots = entries()
    pinned, device = host.clone().pin_memory(), hot.cuda()
    fetch_blocks(pinned, device, blocks.cuda(), slots.cuda())
    fetch_blocks(host, hot, blocks, slots)
    assert torch.equal(device.cpu(), hot)
    rows, start, lengths = torch.randn(B, 9, G, X).to(dtype), torch.tensor([3, 11]), torch.tensor([12, 19])
    store_rows(rows.cuda(), pinned, start.cuda(), lengths.cuda())
    store_rows(rows, host, start, lengths)
    torch.cuda.synchronize()
    assert torch.equal(pinned, host)
