"""The short convolution, in torch and by the kernels, against its definition."""

from __future__ import annotations

import sys

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

from workbench.ops import dispatch, short_convolution
from workbench.ops.short_convolution import Heads
from workbench.ops.short_convolution.reference import short_convolution_reference
from workbench.ops.short_convolution.torch import short_convolution_torch

pytestmark = pytest.mark.compile


def parts(C: int) -> list[Heads]:
    """Two heads scaled to one length, one to another, and the rest unscaled."""
    return [Heads(2, C // 4, 0.3), Heads(1, C // 4, 1.0), Heads(1, C - 3 * (C // 4))]


def inputs(
    T: int, C: int, W: int, packed: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    x_BTC = torch.randn(2, T, C, device=device).to(dtype).requires_grad_()
    weight_CW = torch.randn(C, W, device=device, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    segments = (torch.rand(2, T, device=device) < 0.3).int().cumsum(1).int() if packed else None
    return x_BTC, weight_CW, segments


def worst_error(call, T: int, C: int, W: int, packed: bool, dtype: torch.dtype, device: str) -> float:  # type: ignore[no-untyped-def]
    """Of the outputs and both gradients, relative to the definition in fp64."""
    x_BTC, weight_CW, segments = inputs(T, C, W, packed, dtype, device)
    exact = [t.detach().double().requires_grad_() for t in (x_BTC, weight_CW)]
    actual, expected = (
        call(x_BTC, weight_CW, parts(C), segments),
        short_convolution_reference(*exact, parts(C), segments=segments),
    )
    assert [y.shape for y in actual] == [w.shape for w in expected]
    assert {y.dtype for y in actual} == {dtype}
    directions = [torch.randn_like(y) for y in expected]
    grads = (
        torch.autograd.grad(sum((y * d).sum() for y, d in zip(ys, directions)), t)
        for ys, t in ((actual, (x_BTC, weight_CW)), (expected, exact))
    )
    pairs = [*zip(actual, expected), *zip(*grads)]
    return max(float((a.double() - b).norm().detach() / b.norm().detach()) for a, b in pairs)


@pytest.mark.parametrize(("T", "W"), [(1, 4), (2, 4), (33, 4), (20, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_shifted_rows_are_the_definition(T: int, W: int, packed: bool) -> None:
    def call(x: Tensor, w: Tensor, p: list[Heads], s: Tensor | None) -> list[Tensor]:
        return short_convolution_torch(x, w, p, segments=s)

    assert worst_error(call, T, 9, W, packed, torch.float64, "cpu") < 1e-13
    assert worst_error(call, T, 9, W, packed, torch.bfloat16, "cpu") < 1e-2


def test_errors_name_parts_that_do_not_cover_the_channels() -> None:
    x_BTC, weight_CW, _ = inputs(5, 8, 4, False, torch.float32)
    with pytest.raises(ValueError, match="expected 8 channels together"):
        short_convolution.short_convolution(x_BTC, weight_CW, parts(9))


def test_compiled_decoding_steps_are_plain_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BTC, weight_CW, _ = inputs(5, 8, 4, False, torch.float32)
    whole = short_convolution_reference(x_BTC.double(), weight_CW.double(), parts(8))
    monkeypatch.setattr(short_convolution, "is_compiling", lambda: True)
    dispatch.reset()
    with dispatch.force_backend("triton"):
        step = short_convolution.short_convolution(x_BTC[:, 4:], weight_CW, parts(8), tail_BPC=x_BTC[:, 1:4])
    assert dispatch.recorded() == {"short_convolution": ["torch"]}
    for y, expected in zip(step, whole):
        torch.testing.assert_close(y.double(), expected[:, 4:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("T", "expected"), [(1, False), (2, True)])
def test_only_compiled_steps_go_without_kernels(T: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    supported = []

    def choose(x: Tensor, **options: bool) -> str:
        supported.append(options["supported"])
        return "torch"

    x_BTC, weight_CW, _ = inputs(3 + T, 8, 4, False, torch.float32)
    monkeypatch.setattr(short_convolution, "is_compiling", lambda: True)
    monkeypatch.setattr(short_convolution, "choose_backend", choose)
    short_convolution.short_convolution(x_BTC[:, 3:], weight_CW, parts(8), tail_BPC=x_BTC[:, :3])
    assert supported == [expected]


def test_the_kernels_in_the_interpreter_are_the_definition() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_device_they_are_the_definition(packed: bool) -> None:
    from workbench.ops.short_convolution.triton import short_convolution_triton

    assert worst_error(short_convolution_triton, 300, 200, 4, packed, torch.float32, "cuda") < 1e-5
    assert worst_error(short_convolution_triton, 300, 200, 4, packed, torch.bfloat16, "cuda") < 1e-2


if __name__ == "__main__":
    from workbench.ops.short_convolution import triton as kernels

    torch.manual_seed(int(sys.argv[1]) % 2**63)
    kernels.ROWS, kernels.COLUMNS = 16, 8
    for T, C, W, packed in ((37, 12, 4, True), (16, 8, 4, False), (1, 12, 2, True)):
        error = worst_error(kernels.short_convolution_triton, T, C, W, packed, torch.float32, "cpu")
        assert error < 1e-6, f"relative error {error:.1e} with T={T}, C={C}, W={W}, packed={packed}"
    for dtype, allowed in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        error = worst_error(kernels.short_convolution_triton, 19, 8, 4, True, dtype, "cpu")
        assert error < allowed, f"relative error {error:.1e} in {dtype}"
    print("kernels agree")
