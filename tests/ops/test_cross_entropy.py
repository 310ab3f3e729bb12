"""Cross-entropy from hidden states, chunked and by the kernel, against its definition."""

from __future__ import annotations

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.cross_entropy import chunked, linear_cross_entropy
from workbench.ops.cross_entropy.reference import linear_cross_entropy_reference

pytestmark = pytest.mark.compile


def inputs(N: int, D: int, V: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_ND = (torch.randn(N, D, dtype=torch.float64, device=device) * 2 / D**0.5).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, dtype=dtype, device=device).requires_grad_()
    targets_N = torch.randint(V, (N,), device=device)
    targets_N[torch.rand(N, device=device) < 0.2] = -100
    return h_ND, weight_VD, targets_N, torch.rand(N, dtype=torch.float64, device=device).float()


@pytest.mark.parametrize("tokens_at_once", [1, 4, 7, 100])
def test_chunks_are_the_definition_with_gradients(tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, V = 23, 5, 37
    monkeypatch.setattr(chunked, "CHUNK_BYTES", tokens_at_once * V * 8)
    h_ND, weight_VD, targets_N, weights_N = inputs(N, D, V, torch.float64)
    total, losses_N = linear_cross_entropy(h_ND, weight_VD, targets_N, weights_N=weights_N)
    expected_N = linear_cross_entropy_reference(h_ND, weight_VD, targets_N)
    assert torch.allclose(losses_N, expected_N, rtol=0, atol=1e-12)
    assert not losses_N.requires_grad
    expected = (expected_N * weights_N).sum()
    assert torch.allclose(total, expected, rtol=1e-13)
    actual = torch.autograd.grad(3 * total, (h_ND, weight_VD))
    for a, b in zip(actual, torch.autograd.grad(3 * expected, (h_ND, weight_VD))):
        assert float((a - b).norm() / b.norm()) < 1e-13


def test_without_any_target_the_gradient_is_zero() -> None:
    h_ND, weight_VD, _, _ = inputs(4, 3, 11, torch.float32)
    total, losses_N = linear_cross_entropy(h_ND, weight_VD, torch.full((4,), -100))
    total.backward()
    assert total == 0
    assert not losses_N.any()
    assert not h_ND.grad.any()  # type: ignore[union-attr]
    assert not weight_VD.grad.any()  # type: ignore[union-attr]


def test_large_scores_stay_finite() -> None:
    h_ND, weight_VD = (
        torch.tensor([[1e4], [-1e4]], requires_grad=True),
        torch.tensor([[1.0], [-1.0]], requires_grad=True),
    )
    total, losses_N = linear_cross_entropy(h_ND, weight_VD, torch.tensor([0, 0]))
    total.backward()
    assert losses_N.tolist() == [0.0, 2e4]
    assert h_ND.grad.isfinite().all()  # type: ignore[union-attr]


KERNEL = """
import torch
from workbench.ops.cross_entropy import chunked, triton as kernels
kernels.BLOCK = 16
torch.manual_seed(int({seed}))
for C, V, dtype, allowed in ((5, 37, torch.float32, 1e-6), (3, 64, torch.float32, 1e-6), (4, 50, torch.bfloat16, 8e-3)):
    wide = torch.full((C, V + 5), float("nan"), dtype=dtype)
    scores = (3 * torch.randn(C, V)).to(dtype)
    wide[:, :V] = scores
    targets = torch.randint(V, (C,)); targets[1] = -100
    weights, losses = torch.rand(C), torch.full((C,), float("nan"))
    kernels.losses_(wide[:, :V], targets, weights, losses, False)
    assert torch.equal(wide[:, :V], scores), "without gradient the scores are unchanged"
    again = losses.clone(); losses.fill_(float("nan"))
    kernels.losses_(wide[:, :V], targets, weights, losses, True)
    assert torch.equal(again, losses)
    assert wide[:, V:].isnan().all(), "columns beyond the vocabulary were written"
    exact, expected = scores.double(), torch.empty(C, dtype=torch.float64)
    chunked._losses_(exact, targets, weights.double(), expected, True)
    assert (losses - expected).norm() / expected.norm() < 1e-6, (losses, expected)
    assert (wide[:, :V].double() - exact).norm() / exact.norm() < allowed
print("kernel agrees")
"""


def test_the_kernel_in_the_interpreter_is_the_definition() -> None:
    printed = in_interpreter("-c", KERNEL.format(seed=torch.initial_seed()))
    assert "kernel agrees" in printed, printed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_it_is_the_definition(dtype: torch.dtype) -> None:
    h_ND, weight_VD, targets_N, weights_N = inputs(1000, 128, 32_001, dtype, "cuda")
    total, losses_N = linear_cross_entropy(h_ND, weight_VD, targets_N, weights_N=weights_N)
    exact = [t.detach().double().requires_grad_() for t in (h_ND, weight_VD)]
    expected_N = linear_cross_entropy_reference(*exact, targets_N)
    allowed = 2e-3 if dtype == torch.float32 else 1e-2  # the weights' products may be made in tf32
    assert float((losses_N - expected_N).detach().norm() / expected_N.detach().norm()) < allowed
    actual = torch.autograd.grad(total, (h_ND, weight_VD))
    for a, b in zip(actual, torch.autograd.grad((expected_N * weights_N).sum(), exact)):
        assert float((a.double() - b).norm() / b.norm()) < allowed
