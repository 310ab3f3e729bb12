"""The router's products and choices by the kernels, in Triton's interpreter and on a device."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreter import in_interpreter

from workbench.ops import router

pytestmark = pytest.mark.compile


def check_logits(N: int, D: int, C: int, dtype: torch.dtype, device: str, allowed: float) -> None:
    from workbench.ops.router import triton as kernels

    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in ((N, D), (C, D))]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    direction, results = torch.randn(N, C, device=device), []
    for call, (x, weight) in ((kernels.logits, tensors), (torch.nn.functional.linear, exact)):
        y = call(x, weight)
        results.append([y.detach(), *torch.autograd.grad((y * direction).sum(), (x, weight))])
    assert results[0][0].dtype == torch.float32
    assert results[0][1].dtype == dtype
    for (a, b), most in zip(zip(*results), (1e-6, allowed, allowed)):
        error = float((a.double() - b).norm() / b.norm())
        assert error < most, f"relative error {error:.1e} with N={N}, D={D}, C={C}, {dtype}"


def check_choices(N: int, C: int, K: int, device: str) -> None:
    from workbench.ops.router import triton as kernels

    score_NC = torch.randn(N, C, device=device)
    assert torch.equal(kernels.topk_indices(score_NC, K), score_NC.topk(K).indices)
    even_NC = score_NC.round() + 0.0  # of equal scores the first; no signed zeros
    assert torch.equal(
        kernels.topk_indices(even_NC, K), even_NC.sort(dim=-1, descending=True, stable=True).indices[:, :K]
    )
    score_NC[0] = float("nan")
    score_NC[1, 1:] = -float("inf")
    chosen_NK = kernels.topk_indices(score_NC, K)
    for row in chosen_NK.tolist():
        assert len(set(row)) == K
        assert set(row) <= set(range(C))


def check_gradient_of_chosen_scores(device: str) -> None:
    score_NC = torch.randn(9, 5, device=device).requires_grad_()
    chosen_NK, d_NK = score_NC.topk(3).indices, torch.randn(9, 3, device=device)
    pairs = []
    for gate_NK in (router._GatherScores.apply(score_NC, chosen_NK), score_NC.gather(1, chosen_NK)):
        pairs.append((gate_NK, *torch.autograd.grad(gate_NK, score_NC, d_NK)))
    assert all(torch.equal(a, b) for a, b in zip(*pairs))


def test_scores_of_choices_have_the_gradient_of_a_gather() -> None:
    check_gradient_of_chosen_scores("cpu")


def test_the_kernels_in_the_interpreter_are_products_and_choices() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3000, 1024, 64), (1000, 72, 12), (70, 200, 300)])
def test_on_the_device_they_are_products_and_choices(shape: tuple[int, int, int]) -> None:
    N, D, C = shape
    check_logits(N, D, C, torch.float32, "cuda", 1e-6)
    check_logits(N, D, C, torch.bfloat16, "cuda", 1e-2)
    check_choices(N, C, 8, "cuda")
    check_gradient_of_chosen_scores("cuda")


if __name__ == "__main__":
    from workbench.ops.router import triton as kernels

    torch.manual_seed(int(sys.argv[1]) % 2**63)
    torch.set_num_threads(1)
    kernels.TOKENS, kernels.SPAN, kernels.COLUMNS = 16, 32, 16
    check_logits(41, 24, 5, torch.float32, "cpu", 1e-6)
    check_logits(9, 33, 20, torch.bfloat16, "cpu", 1e-2)
    check_choices(7, 5, 5, "cpu")
    check_choices(9, 19, 4, "cpu")
    x, weight = torch.randn(3, 8).requires_grad_(), torch.randn(4, 8).requires_grad_()
    for operator, arguments in ((kernels.logits, (x, weight)), (kernels.topk_indices, (torch.randn(4, 8), 3))):
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
    print("kernels agree")
