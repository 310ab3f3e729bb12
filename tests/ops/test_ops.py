"""Attention and experts against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.ops.attention import attention
from workbench.ops.attention.reference import attention_reference
from workbench.ops.experts import swiglu_experts
from workbench.ops.experts.reference import swiglu_experts_reference
from workbench.testing import count_flops, relative_error


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SEGMENTS = torch.tensor([[0] * 1 + [1] * 9 + [2] * 7, [0] * 16 + [1]])


@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 40])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_its_definition(window: int | None, heads: int, groups: int, packed: bool) -> None:
    tensors = [random(2, 17, n, 8).requires_grad_() for n in (heads, groups, groups)]
    segments = SEGMENTS if packed else None
    actual, expected = (op(*tensors, window=window, segments=segments) for op in (attention, attention_reference))
    assert relative_error(actual, expected) < 1e-13
    weight = torch.randn_like(actual)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (actual, expected))):
        assert (a - b).norm() < 1e-12 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("window", [None, 1, 3, 30])
@pytest.mark.parametrize("T", [1, 4])
def test_attention_decode_is_the_end_of_the_full_pass(window: int | None, T: int) -> None:
    q, k, v = random(2, 17, 4, 8), random(2, 17, 2, 8), random(2, 17, 2, 8)
    full = attention_reference(q, k, v, window=window)
    assert relative_error(attention(q[:, -T:], k, v, window=window), full[:, -T:]) < 1e-13


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 13])
def test_a_window_sees_exactly_its_keys(window: int | None) -> None:
    q, k, v = random(1, 12, 1, 4), random(1, 12, 1, 4), random(1, 12, 1, 4).requires_grad_()
    out = attention(q, k, v, window=window)
    for t in range(12):
        seen = torch.autograd.grad(out[0, t].sum(), v, retain_graph=True)[0][0, :, 0, 0] != 0
        assert seen[t]
        assert int(seen.sum()) == min(window or 12, t + 1)


def expert_inputs(counts: list[int]) -> tuple[list[Tensor], Tensor]:
    shapes: list[Any] = [(sum(counts), 16), (len(counts), 16, 48), (len(counts), 24, 16)]
    return [torch.randn(*s).requires_grad_() for s in shapes], torch.tensor(counts)


@pytest.mark.parametrize("counts", [[5, 3, 8], [0, 16, 0], [1, 0, 7], [4], [0, 0, 9, 0]])
def test_grouped_experts_are_single_experts(counts: list[int]) -> None:
    tensors, counts_E = expert_inputs(counts)
    actual, expected = (op(*tensors, counts_E) for op in (swiglu_experts, swiglu_experts_reference))
    assert torch.equal(actual, expected)
    weight = torch.randn_like(actual)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (actual, expected))):
        assert relative_error(a, b) < 1e-6  # sums over rows may be taken in another order


def test_expert_flops_are_counted() -> None:
    tensors, counts_E = expert_inputs([5, 0, 8])
    assert count_flops(lambda: swiglu_experts(*tensors, counts_E)) == 13 * 3 * 2 * 16 * 24
