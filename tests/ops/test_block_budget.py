"""Selection with a budget that is read at run time: the best so many blocks, in every back end, exact gradients, and
time that falls with the budget; coverage against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.sparse_attention import (
    Blocks,
    block_coverage,
    document_starts,
    num_blocks,
    select_blocks,
    selected_attention,
    visible_block_attention,
)
from workbench.ops.sparse_attention.chunked import _used
from workbench.ops.sparse_attention.layout import block_starts, unfold_blocks
from workbench.ops.sparse_attention.reference import attend_reference, select_reference, selected_tokens

FORMS = [Blocks(8, 8, 8, 6, initial=0, local=1), Blocks(8, 4, 8, 6, initial=1, local=2, reuse=4)]
SEGMENTS = torch.tensor([[0] * 60 + [1] * 33 + [2] * 3])


def scored(blocks: Blocks, segments: Tensor | None = None, T: int = 96, H: int = 4, G: int = 2) -> Any:
    """Queries, keys, values, pooled keys, their log-sum-exp, starts of documents; fp64."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, T, H, 16, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(1, T, G, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    start = document_starts(segments, 1, T, q.device)
    rows = None if segments is None else block_starts(start, segments, blocks.length, blocks.stride)
    ck = unfold_blocks(3 * k, rows, blocks.length, blocks.stride).mean(-1)
    _, lse = visible_block_attention(q, ck, ck, start_BT=start, length=blocks.length, stride=blocks.stride)
    return q, k, v, ck, lse, start


@pytest.mark.parametrize("blocks", FORMS)
@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize("budget", [3, 5, 6])
def test_a_budget_selects_as_a_smaller_configured_number_does(
    blocks: Blocks, segments: Tensor | None, budget: int
) -> None:
    q, _, _, ck, lse, start = scored(blocks, segments)
    given: dict[str, Any] = {"start_BT": start, "num_keys": q.shape[1]}
    tuned = select_blocks(q, ck, lse, blocks=blocks, budget=torch.tensor(budget, dtype=torch.int32), **given)
    fixed = select_blocks(q, ck, lse, blocks=blocks._replace(selected=budget), **given)
    assert tuned.shape[-1] == blocks.selected
    assert (tuned[..., :budget] == fixed).all() and (tuned[..., budget:] == -1).all()


@pytest.mark.parametrize("budget", [3, 6])
def test_values_and_gradients_are_those_of_the_blocks_of_the_budget(budget: int) -> None:
    """Against plain loops over explicit sets of tokens."""
    blocks, T = FORMS[1], 96
    q, k, v, ck, lse, start = scored(blocks)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    count = torch.tensor(budget, dtype=torch.int32)
    indices = select_blocks(q, ck, lse, blocks=blocks, start_BT=start, num_keys=T, budget=count)
    o, _ = selected_attention(q, k, v, indices, block=blocks.block, start_BT=start, reuse=blocks.reuse)
    sizes = {"length": 8, "stride": 4, "block": 8, "initial": 1, "local": 2, "reuse": 4}
    chosen = select_reference(q[0].detach(), ck[0], count=budget, scale=1 / 4, **sizes)
    expected = attend_reference(q[0], k[0], v[0], selected_tokens(chosen, blocks.block), scale=1 / 4)
    weight = torch.randn_like(o[0])
    got, wanted = (torch.autograd.grad((y * weight).sum(), inputs) for y in (o[0], expected))
    assert (o[0] - expected).abs().max() < 1e-12
    for a, b in zip(got, wanted):
        assert (a - b).abs().max() < 1e-12


def test_equal_budgets_give_equal_bits_whatever_the_size_of_the_buffer() -> None:
    blocks = FORMS[0]
    q, k, v, ck, lse, start = (x.float().requires_grad_(x.is_floating_point()) for x in scored(blocks))
    start = start.to(torch.int32).detach()
    results = []
    for buffer in (4, 6, 12):
        indices = select_blocks(
            q,
            ck,
            lse,
            blocks=blocks._replace(selected=buffer),
            start_BT=start,
            num_keys=96,
            budget=torch.tensor(4, dtype=torch.int32),
        )
        o, _ = selected_attention(q, k, v, indices, block=8, start_BT=start)
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_attention_skips_columns_that_no_query_uses() -> None:
    starts = torch.full((1, 5, 1, 8), -1)
    starts[..., :3] = 0
    assert _used(starts).shape[-1] == 3 and _used(starts.fill_(-1)).shape[-1] == 1


@pytest.mark.parametrize("blocks", FORMS)
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_coverage_is_the_share_of_the_scores_in_the_first_blocks(blocks: Blocks, segments: Tensor | None) -> None:
    """Mean over queries and groups, from probabilities written out here."""
    q, _, _, ck, lse, start = scored(blocks, segments)
    counts = torch.tensor([3, 4, 6], dtype=torch.int32)
    valid = None if segments is None else torch.arange(96)[None] < 90
    got = block_coverage(q, ck, lse, counts, blocks=blocks, start_BT=start, queries=1000, valid_BT=valid)
    shares = []
    for t in range(96):
        if valid is not None and not valid[0, t]:
            continue
        a = int(start[0, t])
        t -= (t - a) % blocks.reuse
        p, own = t - a, (t - a) // blocks.block
        low, visible = a // blocks.stride, num_blocks(p + 1, blocks.length, blocks.stride)
        for g in range(2):
            scores = [0.0] * (own + 1)
            for h in (2 * g, 2 * g + 1):
                s = ck[0, low : low + visible, g] @ q[0, t, h] / 4
                for i, weight in enumerate((s - lse[0, t, h]).exp().tolist()):
                    for j in range(own + 1):
                        ends = min((i * blocks.stride + blocks.length), (j + 1) * blocks.block)
                        overlap = ends - max(i * blocks.stride, j * blocks.block)
                        scores[j] += weight * max(0, overlap) / blocks.stride
            forced = [j for j in range(own + 1) if j < blocks.initial or j > own - blocks.local]
            free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: -scores[j])
            total = sum(scores)
            row = [sum(scores[j] for j in (forced + free)[:n]) / total if total else 1.0 for n in counts.tolist()]
            shares.append(row)
    expected = torch.tensor(shares, dtype=torch.float64).mean(0)
    assert (got - expected).abs().max() < 1e-12
    assert (got.diff() >= 0).all() and got[-1] <= 1


def test_coverage_of_a_sample_has_the_last_query_and_even_distances() -> None:
    blocks = FORMS[0]
    q, _, _, ck, lse, start = scored(blocks)
    one = block_coverage(q, ck, lse, torch.tensor([2]), blocks=blocks, start_BT=start, queries=1)
    last = block_coverage(
        q, ck, lse, torch.tensor([2]), blocks=blocks, start_BT=start, queries=96, valid_BT=torch.arange(96)[None] == 95
    )
    assert torch.equal(one, last)


KERNELS = """
import torch
from workbench.ops.dispatch import force_backend
from workbench.ops.sparse_attention import Blocks, document_starts, select_blocks, selected_attention
from workbench.ops.sparse_attention import unfold_blocks, visible_block_attention
torch.manual_seed(0)
blocks = Blocks(16, 16, 16, 6, 0, 1)
q, k, v = (torch.randn(1, 128, h, 16).requires_grad_() for h in (2, 2, 2))
start, ck = document_starts(None, 1, 128, q.device), unfold_blocks(k, None, 16, 16).mean(-1).detach()
_, lse = visible_block_attention(q, ck, ck, start_BT=start, length=16, stride=16)
def run(n, budget=None):
    budget = None if budget is None else torch.tensor(budget, dtype=torch.int32)
    indices = select_blocks(q, ck, lse, blocks=blocks._replace(selected=n), start_BT=start, num_keys=128, budget=budget)
    o, _ = selected_attention(q, k, v, indices, block=16, start_BT=start)
    return indices[..., :3], o, *torch.autograd.grad(o.square().sum(), (q, k, v))
with force_backend("triton"):
    small, tuned = run(3), run(6, 3)
print("equal" if all(torch.equal(a, b) for a, b in zip(small, tuned)) else "different")
"""


def test_the_kernels_read_the_budget_and_give_the_bits_of_the_smaller_number() -> None:
    assert in_interpreter("-c", KERNELS).strip().endswith("equal")


def test_a_query_without_scores_is_covered() -> None:
    blocks = FORMS[0]
    q, _, _, ck, lse, start = scored(blocks, T=7)
    assert float(block_coverage(q, ck, lse, torch.tensor([1]), blocks=blocks, start_BT=start, queries=9)) == 1.0
    assert not math.isnan(float(lse.nan_to_num(neginf=0).sum()))
