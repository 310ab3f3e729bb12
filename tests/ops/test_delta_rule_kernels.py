"""The kernels of the delta rule against the recurrence in fp64: in Triton's interpreter, and on a GPU where there is
one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

pytestmark = pytest.mark.compile

Case = dict[str, Any]
CASES: list[Case] = [
    {"T": 130, "K": 16, "V": 32, "decay": 1.0, "packed": True, "state": True, "beta": True},
    {"T": 100, "K": 32, "V": 16, "decay": 0.1, "erase": True, "block": 16},
    {"T": 64, "K": 24, "V": 40, "channel": True, "decay": 60.0, "erase": True, "beta": True, "state": True},
    {
        "T": 130,
        "K": 32,
        "V": 16,
        "channel": True,
        "decay": 2,
        "bursts": 1e-3,
        "packed": True,
        "state": True,
        "block": 16,
    },
    {"T": 1, "K": 16, "V": 16, "decay": 0.0, "state": True},
]
"""Sizes; decay: nats per token, at most; bursts: share of tokens that lose 80 nats; block: channels of a tile."""
CASES_16_BITS: list[Case] = [
    {"T": 20, "K": 16, "V": 32, "decay": 1.0, "packed": True, "state": True, "beta": True, "block": 16},
    {"T": 20, "K": 16, "V": 16, "channel": True, "decay": 2.0, "bursts": 1e-2, "erase": True, "state": True},
]


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Leaves of a call, by keyword."""
    B, T, H, K, V = 2, case["T"], 2, case["K"], case["V"]

    def normal(*shape: int, unit: bool = False) -> Tensor:
        x = torch.randn(*shape, device=device)
        return (torch.nn.functional.normalize(x, dim=-1) if unit else x).to(dtype).requires_grad_()

    leaves = {"q_BTHK": normal(B, T, H, K), "write_key_BTHK": normal(B, T, H, K, unit=True)}
    leaves["value_BTHV"] = normal(B, T, 2 * H, V)[:, :, H:].detach().requires_grad_()  # a part of a wider tensor
    g = -case["decay"] * torch.rand(*((B, T, H, K) if case.get("channel") else (B, T, H)), device=device)
    # single channels that forget everything, among chunks in which all decays are moderate
    leaves["g"] = torch.where(torch.rand_like(g) < case.get("bursts", 0.0), -80.0, g).requires_grad_()
    if case.get("erase"):
        leaves["erase_key_BTHK"] = normal(B, T, H, K, unit=True)
    if case.get("beta"):
        leaves["beta_BTH"] = torch.rand(B, T, H, device=device).requires_grad_()
    if case.get("state"):
        leaves["state_BHKV"] = torch.randn(B, H, K, V, device=device).requires_grad_()
    return leaves


def worst_error(case: Case, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """Largest relative error of the outputs, the state and every gradient, and the name of the tensor that has it."""
    from workbench.ops.delta_rule.kernels import launch
    from workbench.ops.delta_rule.reference import delta_rule_recurrent

    if device == "cpu":
        launch.BLOCK = case.get("block", 32)
    leaves = inputs(case, dtype, device)
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    segments = None
    if case.get("packed"):
        segments = (torch.rand(2, case["T"], device=device) < 1 / 30).int().cumsum(1).int()
    actual = launch.delta_rule_triton(**leaves, segments=segments)
    expected = delta_rule_recurrent(**exact, segments=segments)
    weights = [torch.randn_like(y) for y in expected]

    def gradients(outputs: tuple[Tensor, Tensor], x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), list(x.values()))

    pairs = dict(zip(("output", "final state"), zip(actual, expected)))
    pairs |= dict(zip(leaves, zip(gradients(actual, leaves), gradients(expected, exact))))
    errors = {
        n: float((a.detach().double() - b).norm().detach() / b.norm().clamp_min(1e-30)) for n, (a, b) in pairs.items()
    }
    return max((float("inf") if error != error else error, name) for name, error in errors.items())


def test_the_kernels_in_the_interpreter_are_the_recurrence() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"beta": True, "packed": True}, {"erase": True, "state": True, "bursts": 2e-4}])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (32, 16), (96, 80), (256, 256)])
def test_on_a_gpu_they_are_the_recurrence(channel: bool, K: int, V: int, options: Case) -> None:
    case = {"T": 333, "K": K, "V": V, "channel": channel, "decay": 2.0, **options}
    error, name = worst_error(case, torch.bfloat16, "cuda")
    assert error < 1e-2, f"{name}: relative error {error:.1e} in {case}"


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]) % 2**63)
    for one in CASES:
        # differences of running sums lose digits after strong decays per head; decays per channel use none
        error, name = worst_error(one, torch.float32, "cpu")
        assert error < (1e-4 if one.get("channel") else 2e-5), f"{name}: relative error {error:.1e} in {one}"
    for one in CASES_16_BITS:
        for dtype, allowed in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
            error, name = worst_error(one, dtype, "cpu")
            assert error < allowed, f"{name}: relative error {error:.1e} in {one}, {dtype}"
    print("kernels agree")
