"""The short convolution, in torch and by the kernels, against its definition."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops import short_convolution
from workbench.ops.short_convolution.reference import short_convolution_reference
from workbench.ops.short_convolution.torch import short_convolution_torch


def inputs(
    T: int, C: int, W: int, packed: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    x_BTC = torch.randn(2, T, C, device=device).to(dtype).requires_grad_()
    weight_CW = torch.randn(C, W, device=device, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    segments = (torch.rand(2, T, device=device) < 0.3).int().cumsum(1).int() if packed else None
    return x_BTC, weight_CW, segments


def worst_error(call, T: int, C: int, W: int, packed: bool, dtype: torch.dtype, device: str) -> float:  # type: ignore[no-untyped-def]
    """Of the output and both gradients, relative to the definition in fp64."""
    x_BTC, weight_CW, segments = inputs(T, C, W, packed, dtype, device)
    exact = [t.detach().double().requires_grad_() for t in (x_BTC, weight_CW)]
    got, wanted = call(x_BTC, weight_CW, segments), short_convolution_reference(*exact, segments=segments)
    assert got.dtype == dtype
    direction = torch.randn_like(wanted)
    grads = (torch.autograd.grad((y * direction).sum(), t) for y, t in ((got, (x_BTC, weight_CW)), (wanted, exact)))
    pairs = [(got.detach(), wanted.detach()), *zip(*grads)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (33, 4), (20, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_shifted_rows_are_the_definition(T: int, W: int, packed: bool) -> None:
    def call(x: Tensor, w: Tensor, s: Tensor | None) -> Tensor:
        return short_convolution_torch(x, w, segments=s)

    assert worst_error(call, T, 5, W, packed, torch.float64, "cpu") < 1e-13
    assert worst_error(call, T, 5, W, packed, torch.bfloat16, "cpu") < 1e-2


def test_the_kernels_are_taken_where_they_compute_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_convolution, "TRITON", True)
    path = short_convolution.path
    assert path("cuda", torch.bfloat16, tail=False) == path("cuda", torch.float32, tail=False) == "triton"
    assert path("cuda", torch.float64, tail=False) == "torch", "the kernels sum in fp32"
    assert path("cuda", torch.bfloat16, tail=True) == path("cpu", torch.float32, tail=False) == "torch"


def test_the_kernels_in_the_interpreter_are_the_definition() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_device_they_are_the_definition(packed: bool) -> None:
    from workbench.ops.short_convolution.triton import short_convolution_triton

    assert worst_error(short_convolution_triton, 300, 200, 4, packed, torch.float32, "cuda") < 1e-5
    assert worst_error(short_convolution_triton, 300, 200, 4, packed, torch.bfloat16, "cuda") < 1e-2


if __name__ == "__main__":
    from workbench.ops.short_convolution import triton as kernels

    torch.manual_seed(int(sys.argv[1]) % 2**63)
    kernels.ROWS, kernels.COLUMNS = 16, 8
    for T, C, W, packed in ((37, 12, 4, True), (16, 8, 4, False), (1, 3, 2, True)):
        error = worst_error(kernels.short_convolution_triton, T, C, W, packed, torch.float32, "cpu")
        assert error < 1e-6, f"relative error {error:.1e} with T={T}, C={C}, W={W}, packed={packed}"
    print("kernels agree")
