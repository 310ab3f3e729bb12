"""The kernels beside the grouped product, in Triton's interpreter and on a device, against single experts in fp64.

Legend: N tokens, K choices, C categories of which E are experts, D width, F hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops.dispatch import force_backend
from workbench.ops.experts import routed_experts, sort_choices
from workbench.ops.experts.torch import grouped_mm, masked_products

pytestmark = pytest.mark.compile

CASES = {
    "mixed": (13, 3, 6, 6),
    "one choice": (9, 1, 4, 4),
    "one expert": (2, 1, 1, 1),
    "all to one": (8, 2, 5, 7),
    "no expert": (3, 2, 3, 5),
    "zero experts": (11, 4, 5, 9),
    "dropped": (9, 3, 4, 5),
}
"""N, K, E, C."""


def size(case: str, device: str) -> tuple[int, int, int, int]:
    N, *others = CASES[case]
    return (N if device == "cpu" else 100 * N, *others)  # type: ignore[return-value]


def choices(case: str, device: str) -> Tensor:
    N, K, _, C = size(case, device)
    chosen_NK = torch.stack([torch.randperm(C)[:K] for _ in range(N)])
    if case == "all to one":
        chosen_NK = torch.cat((torch.full((N, 1), 3), torch.full((N, 1), 6)), dim=1)
    elif case == "no expert":
        chosen_NK = chosen_NK % 2 + 3
    elif case == "zero experts":
        chosen_NK[:3] = torch.arange(5, 9)  # tokens of zero experts alone
        chosen_NK[chosen_NK == 2] = 7  # and an expert without a token
    elif case == "dropped":
        chosen_NK[torch.rand(N, K) < 0.4] = 4  # what several choices of a token may be
    return chosen_NK.to(device)


def poisoned(product):  # type: ignore[no-untyped-def]
    def call(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        y = product(x, w, offs=offs)
        if w.dim() == 3:
            y[int(offs[-1]) :] = float("nan")
        return y

    return call


def worst_error(case: str, D: int, H: int, dtype: torch.dtype, device: str) -> float:
    """Of the output and all gradients, relative to single experts in fp64; also checks that two runs give the same
    bits."""
    N, K, E, C = size(case, device)
    chosen_NK = choices(case, device)
    shapes = ((N, D), (N, K), (E, D, 2 * H), (E, H, D))
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    tensors[1] = torch.rand(N, K, device=device).requires_grad_()  # gates stay in fp32
    exact = [t.detach().double().requires_grad_() for t in tensors]
    direction, results = torch.randn(N, D, device=device), []
    calls = [(tensors, "grouped_mm")] * (1 if device == "cpu" and case != "mixed" else 2)
    for (x, gate, up, down), backend in (*calls, (exact, "loop")):
        y = routed_experts(x, chosen_NK, gate, sort_choices(chosen_NK, C), up, down, backend)
        assert y.dtype == x.dtype
        results.append([y.detach(), *torch.autograd.grad((y * direction).sum(), (x, gate, up, down))])
    actual, again, expected = results[0], results[-2], results[-1]
    assert all(torch.equal(a, b) for a, b in zip(actual, again)), "not bitwise reproducible"
    assert all(a.isfinite().all() for a in actual), "a row of no expert affects the result"
    if case == "no expert":
        assert not any(a.any() for a in actual)
        return 0.0
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, expected))


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 4, 0), (0, 0, 0, 0)])
def test_masked_products_are_grouped_products(counts: tuple[int, ...]) -> None:
    x_RD, w_EDF = torch.randn(11, 8), torch.randn(4, 8, 16)
    ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    expected, found = grouped_mm(x_RD, w_EDF, ends_E), masked_products(x_RD, w_EDF, ends_E)
    torch.testing.assert_close(found[: sum(counts)], expected[: sum(counts)])
    assert not found[sum(counts) :].any()


def test_the_kernels_in_the_interpreter_are_single_experts() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    poison_new_memory()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_the_device_they_are_single_experts(case: str, poisoned_memory: None) -> None:
    assert worst_error(case, 1000, 136, torch.bfloat16, "cuda") < 1e-2
    assert worst_error(case, 72, 24, torch.float32, "cuda") < 2e-3  # the products may be made in tf32


@pytest.mark.gpu
def test_on_the_device_choices_are_sorted() -> None:
    check_routes("cuda", ((1, 1, 1), (5000, 7, 3), (70_000, 8, 96), (300, 2, 900)))


def check_routes(device: str, sizes: tuple[tuple[int, int, int], ...]) -> None:
    for tokens, K, C in sizes:
        chosen_NK = torch.randint(C + 2, (tokens, K), device=device)  # some beyond the end, some twice
        routes = sort_choices(chosen_NK, C)
        order_R = chosen_NK.flatten().clamp_max(C).sort(stable=True).indices
        assert torch.equal(routes.order_R, order_R)
        assert torch.equal(routes.row_NK.flatten()[order_R], torch.arange(tokens * K, device=device))
        assert torch.equal(routes.counts, chosen_NK.flatten().bincount(minlength=C)[:C])


def check_registrations() -> None:
    """Fake shapes and types, and the graph of gradients."""
    from workbench.ops.experts import triton as kernels

    x_ND, chosen_NK, end = torch.randn(4, 8), torch.randint(3, (4, 2)), torch.tensor(6)
    both, weight_R = torch.randn(8, 16).requires_grad_(), torch.rand(8).requires_grad_()
    row_NK = sort_choices(chosen_NK, 3).row_NK
    for operator, arguments in (
        (kernels.sort_choices_triton, (chosen_NK, 3)),
        (kernels.dispatch, (x_ND.requires_grad_(), row_NK, end)),
        (kernels.combine, (torch.randn(8, 8).requires_grad_(), row_NK, end)),
        (kernels.swiglu_grouped, (both, weight_R, end)),
    ):
        # not "test_aot_dispatch_dynamic": it compares every number, and rows of no expert hold anything
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def poison_new_memory() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


if __name__ == "__main__":
    from workbench.ops.experts import triton as kernels

    torch.manual_seed(int(sys.argv[1]) % 2**63)
    torch.set_num_threads(1)
    kernels.CHOICES, kernels.STEP, kernels.COLUMNS, kernels.TILE = 32, 16, 16, 64
    kernels.LAUNCH = {size: {"ROWS": 4, "LEFT": 16, "RIGHT": 16} for size in (2, 4)}
    F.grouped_mm = poisoned(F.grouped_mm)
    poison_new_memory()
    with force_backend("triton"):
        check_routes("cpu", ((1, 1, 1), (20, 7, 3), (40, 2, 40)))
        check_registrations()
        for case in CASES:
            error = worst_error(case, 24 if case == "mixed" else 16, 8, torch.float32, "cpu")
            assert error < 1e-6, f"relative error {error:.1e}: {case}"
        kernels.MAX_RANKED = 2
        assert worst_error("zero experts", 16, 8, torch.float32, "cpu") < 1e-6, "experts as they come"
        assert worst_error("zero experts", 16, 24, torch.bfloat16, "cpu") < 1e-2
    print("kernels agree")
