"""Blocks between host and slots: plain torch against a loop, the kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.block_transfer import (
    TAILS,
    Tables,
    fetch_blocks,
    plan_copies,
    slots_of_blocks,
    store_rows,
    store_tails,
)

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


@pytest.mark.parametrize("T", [1, 3, 7, 30])
def test_rows_of_the_newest_blocks_have_slots(T: int) -> None:
    _, hot = memories()
    rows, start = torch.randn(B, T, G, X), torch.tensor([2, 11])
    expected = hot.clone()
    for b in range(B):
        newest = int(start[b] + T - 1) // BLOCK
        for position in range(max(int(start[b]), (newest - TAILS + 1) * BLOCK), int(start[b]) + T):
            slot = S - TAILS + position // BLOCK % TAILS
            expected[b, :, slot, position % BLOCK] = rows[b, position - int(start[b])]
    store_tails(rows, hot, start)
    assert torch.equal(hot, expected)


RULES = [{"keep": keep, "reuse": reuse} for keep, reuse in ((False, True), (True, True), (False, False))]


def plans(steps: int = 12) -> list[Tensor]:
    """Wanted blocks of plans, up to 4 of 20, of which few change from one plan to the next."""
    wanted = torch.stack([torch.randperm(20)[:M] for _ in range(B * G)]).view(B, G, M)
    found = []
    for _ in range(steps):
        other = torch.stack([torch.randperm(20)[:M] for _ in range(B * G)]).view(B, G, M)
        is_new = (torch.rand(B, G, M) < 0.4) & ~(other[..., None] == wanted[..., None, :]).any(-1)
        wanted = torch.where(is_new, other, wanted)
        found.append(wanted.masked_fill(torch.rand(B, G, M) < 0.2, -1))
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_plans_are_those_of_a_dictionary(rule: dict[str, bool]) -> None:
    tables, newest_B = Tables.empty(B, G, 20, S, "cpu"), torch.tensor([18, 9])
    slots: list[dict[int, int]] = [{} for _ in range(B * G)]  # slot -> block
    wanted_at: list[dict[int, int]] = [{} for _ in range(B * G)]  # block -> plan
    for number, wanted_BGm in enumerate(plans()):
        blocks_BGm, slots_BGm, counts_2BG = plan_copies(tables, wanted_BGm, newest_B, **rule)
        for i, of_slot in enumerate(slots):
            listed = wanted_BGm.view(-1, M)[i].tolist()
            wanted = [block for block in listed if 0 <= block <= int(newest_B[i // G]) - TAILS]
            if not rule["reuse"]:
                of_slot.clear()
            if not rule["keep"]:
                for slot in [slot for slot, block in of_slot.items() if block not in wanted]:
                    del of_slot[slot]
            missing = [block for block in wanted if block not in of_slot.values()]
            free = [slot for slot in range(S) if of_slot.get(slot) not in wanted]
            free.sort(key=[wanted_at[i][of_slot[slot]] if slot in of_slot else -1 for slot in range(S)].__getitem__)
            taken = sorted(free[: len(missing)])
            of_slot.update(zip(taken, missing))
            wanted_at[i].update(dict.fromkeys(wanted, number))
            copied = {
                slot: block
                for slot, block in zip(slots_BGm.view(-1, M)[i].tolist(), blocks_BGm.view(-1, M)[i].tolist())
                if block >= 0
            }
            assert copied == dict(zip(taken, missing))
            assert counts_2BG.flatten(1)[:, i].tolist() == [sum(block >= 0 for block in listed), len(missing)]
            expected = {block: slot for slot, block in of_slot.items()}
            newest = int(newest_B[i // G])
            expected |= {block: S + block % TAILS for block in range(max(0, newest - TAILS + 1), newest + 1)}
            found = slots_of_blocks(tables, newest_B).view(B * G, -1)[i].tolist()
            assert {block: slot for block, slot in enumerate(found) if slot >= 0} == expected


def test_lists_that_are_longer_than_there_are_slots_are_refused() -> None:
    tables, newest_B = Tables.empty(B, G, 20, M - 1, "cpu"), torch.tensor([18, 9])
    with pytest.raises(ValueError, match=f"got {M} entries for {M - 1} slots"):
        plan_copies(tables, plans()[0], newest_B, keep=False, reuse=True)


def assert_plans_equal(kernel: str, device: str) -> None:
    """Kernels on a device against plain torch on the CPU, over several plans."""
    from workbench.ops.dispatch import force_backend

    for rule in RULES:
        expected, newest_B = Tables.empty(B, G, 20, S, "cpu"), torch.tensor([18, 9])
        tables = Tables.empty(B, G, 20, S, device)
        for wanted_BGm in plans():
            results = plan_copies(expected, wanted_BGm, newest_B, **rule)
            with force_backend(kernel):
                found = plan_copies(tables, wanted_BGm.to(device), newest_B.to(device), **rule)
                of_blocks = slots_of_blocks(tables, newest_B.to(device))
            copied = results[0] >= 0
            assert torch.equal(found[0].cpu(), results[0]) and torch.equal(found[2].cpu(), results[2])
            assert torch.equal(found[1].cpu()[copied], results[1][copied])
            assert torch.equal(of_blocks.cpu(), slots_of_blocks(expected, newest_B))
            assert torch.equal(tables.block_of_BGS.cpu()[..., :S], expected.block_of_BGS[..., :S])
    for T in (1, 3, 7, 30):
        (_, hot), rows, start = memories(), torch.randn(B, T, G, X), torch.tensor([2, 11])
        by_kernel = hot.to(device)
        with force_backend(kernel):
            store_tails(rows.to(device), by_kernel, start.to(device))
        store_tails(rows, hot, start)
        assert torch.equal(by_kernel.cpu(), hot)


IN_INTERPRETER = """
import sys, torch
sys.path[:0] = ["tests", "tests/ops"]
from test_block_transfer import assert_plans_equal, entries, memories, BLOCK, G, X
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
assert_plans_equal("triton", "cpu")
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


@pytest.mark.gpu
def test_on_the_device_plans_are_those_of_plain_torch() -> None:
    assert_plans_equal("triton", "cuda")
