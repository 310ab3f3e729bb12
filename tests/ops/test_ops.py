"""Operators against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.attention import attention
from workbench.ops.attention.reference import attention_reference
from workbench.ops.delta_rule import gated_delta_rule_chunked, gated_delta_rule_recurrent
from workbench.ops.delta_rule.torch import gated_delta_rule_flops
from workbench.ops.experts import swiglu_experts
from workbench.ops.experts.reference import swiglu_experts_reference
from workbench.testing import count_flops


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.isfinite().all()
    return float((got - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-30))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SEGMENTS = torch.tensor([[0] * 1 + [1] * 9 + [2] * 7, [0] * 16 + [1]])


@pytest.mark.parametrize("window", [None, 1, 2, 5, 17, 40])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_its_definition(window: int | None, heads: int, groups: int, packed: bool) -> None:
    tensors = [random(2, 17, n, 8).requires_grad_() for n in (heads, groups, groups)]
    segments = SEGMENTS if packed else None
    got, wanted = (op(*tensors, window=window, segments=segments) for op in (attention, attention_reference))
    assert error(got, wanted) < 1e-13
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, wanted))):
        assert (a - b).norm() < 1e-12 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("window", [None, 1, 3, 30])
@pytest.mark.parametrize("T", [1, 4])
def test_attention_decode_is_the_end_of_the_full_pass(window: int | None, T: int) -> None:
    q, k, v = random(2, 17, 4, 8), random(2, 17, 2, 8), random(2, 17, 2, 8)
    full = attention_reference(q, k, v, window=window)
    assert error(attention(q[:, -T:], k, v, window=window), full[:, -T:]) < 1e-13


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 13])
def test_a_window_sees_exactly_its_keys(window: int | None) -> None:
    q, k, v = random(1, 12, 1, 4), random(1, 12, 1, 4), random(1, 12, 1, 4).requires_grad_()
    out = attention(q, k, v, window=window)
    for t in range(12):
        seen = torch.autograd.grad(out[0, t].sum(), v, retain_graph=True)[0][0, :, 0, 0] != 0
        assert int(seen.sum()) == min(window or 12, t + 1) and seen[t]


def delta_inputs(T: int, decay: str, *, H: int = 2, K: int = 8, V: int = 12) -> list[Tensor]:
    k = F.normalize(random(2, T, H, K), dim=-1)
    if decay == "repeated":
        k = k[:, :1].expand_as(k).contiguous()
    g = -torch.rand(2, T, H, dtype=torch.float64)
    g = {"none": g * 0, "strong": g * 0 - 60, "mixed": torch.where(torch.rand_like(g) < 0.3, -60.0, g)}.get(decay, g)
    return [random(2, T, H, K) / K**0.5, k, random(2, T, H, V), g, torch.rand(2, T, H, dtype=torch.float64)]


@pytest.mark.parametrize("decay", ["mild", "none", "strong", "mixed", "repeated"])
@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (7, 4), (33, 16), (65, 64), (31, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_delta_rule_in_chunks_is_the_recurrence(decay: str, T: int, chunk: int, packed: bool) -> None:
    tensors = [x.requires_grad_() for x in (*delta_inputs(T, decay), random(2, 2, 8, 12))]
    segments = (torch.rand(2, T) < 0.2).cumsum(1) if packed else None
    results = []
    for op, more in ((gated_delta_rule_chunked, {"chunk": chunk}), (gated_delta_rule_recurrent, {})):
        *inputs, state = tensors
        results.append(op(*inputs, state_BHKV=state, segments=segments, **more))
    (o, s), (o_wanted, s_wanted) = results
    assert error(o, o_wanted) < 1e-12 and error(s, s_wanted) < 1e-12
    a, b = torch.randn_like(o), torch.randn_like(s)
    pairs = [torch.autograd.grad((o * a).sum() + (s * b).sum(), tensors) for o, s in results]
    for got, wanted in zip(*pairs):
        assert (got - wanted).norm() < 1e-12 * max(1.0, float(wanted.norm()))


@pytest.mark.parametrize("decay", ["mild", "none", "strong", "mixed", "repeated"])
def test_delta_rule_in_single_precision(decay: str) -> None:
    single = [x.float() for x in delta_inputs(130, decay)]
    got, wanted = gated_delta_rule_chunked(*single), gated_delta_rule_recurrent(*(x.double() for x in single))
    assert error(got[0], wanted[0]) < 2e-6 and error(got[1], wanted[1]) < 2e-6
    assert got[0].dtype == got[1].dtype == torch.float32


def test_delta_rule_gradients_are_finite_at_strong_decay() -> None:
    tensors = [x.float().requires_grad_() for x in delta_inputs(130, "strong")]
    o, s = gated_delta_rule_chunked(*tensors)
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum() + s.sum(), tensors))


def test_a_full_edit_stores_its_value() -> None:
    q, k, v, g, beta = delta_inputs(20, "none")
    state = None
    for t in range(20):
        parts = [x[:, t : t + 1] for x in (q, k, v, g, torch.ones_like(beta))]
        _, state = gated_delta_rule_chunked(*parts, state_BHKV=state)
        assert error(torch.einsum("bhkv,bhk->bhv", state, k[:, t]), v[:, t]) < 1e-12


@pytest.mark.parametrize(("T", "chunk"), [(64, 16), (65, 64), (33, 64), (1, 8)])
def test_delta_rule_flops_are_counted(T: int, chunk: int) -> None:
    tensors = [x[:1] for x in delta_inputs(T, "mild")]
    assert count_flops(lambda: gated_delta_rule_chunked(*tensors, chunk=chunk)) == pytest.approx(
        gated_delta_rule_flops(2, 8, 12, T, chunk) * T, rel=1e-9)  # fmt: skip


def expert_inputs(counts: list[int]) -> tuple[list[Tensor], Tensor]:
    shapes: list[Any] = [(sum(counts), 16), (len(counts), 16, 48), (len(counts), 24, 16)]
    return [torch.randn(*s).requires_grad_() for s in shapes], torch.tensor(counts)


@pytest.mark.parametrize("counts", [[5, 3, 8], [0, 16, 0], [1, 0, 7], [4], [0, 0, 9, 0]])
def test_grouped_experts_are_single_experts(counts: list[int]) -> None:
    tensors, counts_E = expert_inputs(counts)
    got, wanted = (op(*tensors, counts_E) for op in (swiglu_experts, swiglu_experts_reference))
    assert torch.equal(got, wanted)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, wanted))):
        assert error(a, b) < 1e-6  # sums over rows may be taken in another order


def test_expert_flops_are_counted() -> None:
    tensors, counts_E = expert_inputs([5, 0, 8])
    assert count_flops(lambda: swiglu_experts(*tensors, counts_E)) == 13 * 3 * 2 * 16 * 24
