"""The kernels of the delta rule against the recurrence in fp64: in Triton's interpreter, and on a device where there is one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from interpreter import in_interpreter
from torch import Tensor

Case = dict[str, Any]
CASES: list[Case] = [
    {"T": 130, "K": 16, "V": 32, "decay": 1.0, "packed": True, "state": True, "strength": True},
    {"T": 100, "K": 32, "V": 16, "decay": 0.1, "address": True, "blocks": 16},
    {"T": 64, "K": 24, "V": 40, "channel": True, "decay": 60.0, "address": True, "strength": True, "state": True},
    {
        "T": 130,
        "K": 32,
        "V": 16,
        "channel": True,
        "decay": 2,
        "bursts": 1e-3,
        "packed": True,
        "state": True,
        "blocks": 16,
    },
    {"T": 1, "K": 16, "V": 16, "decay": 0.0, "state": True},
]


def worst_error(case: Case, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """Largest relative error of the outputs, the state and every gradient, and whose it is."""
    from workbench.ops.delta_rule import triton as kernels
    from workbench.ops.delta_rule.reference import delta_rule_recurrent

    if device == "cpu":
        kernels.BLOCK = case.get("blocks", 32)
    B, T, H, K, V = 2, case["T"], 2, case["K"], case["V"]

    def normal(*shape: int, unit: bool = False) -> Tensor:
        x = torch.randn(*shape, device=device)
        return (torch.nn.functional.normalize(x, dim=-1) if unit else x).to(dtype).requires_grad_()

    q, p = normal(B, T, H, K), normal(B, T, H, K, unit=True)
    z = normal(B, T, 2 * H, V)[:, :, H:].detach().requires_grad_()  # a part of something wider
    g = -case["decay"] * torch.rand(*((B, T, H, K) if case.get("channel") else (B, T, H)), device=device)
    # single channels that forget all at once, among chunks in which all decays are moderate
    g = torch.where(torch.rand_like(g) < case.get("bursts", 0.0), -80.0, g)
    named: dict[str, Tensor] = {"q": q, "p": p, "z": z, "g": g.requires_grad_()}
    if case.get("address"):
        named["erase_key_BTHK"] = normal(B, T, H, K, unit=True)
    if case.get("strength"):
        named["beta_BTH"] = torch.rand(B, T, H, device=device).requires_grad_()
    if case.get("state"):
        named["state_BHKV"] = torch.randn(B, H, K, V, device=device).requires_grad_()
    segments = (torch.rand(B, T, device=device) < 1 / 30).int().cumsum(1).int() if case.get("packed") else None
    exact = {name: x.detach().double().requires_grad_() for name, x in named.items()}

    def call(function: Any, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return function(*(x[n] for n in "qpzg"), **{n: y for n, y in x.items() if len(n) > 1}, segments=segments)

    got, wanted = call(kernels.delta_rule_triton, named), call(delta_rule_recurrent, exact)
    weights = [torch.randn_like(y) for y in wanted]

    def gradients(outputs: tuple[Tensor, Tensor], x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), list(x.values()))

    pairs = dict(zip(("o", "S"), zip(got, wanted)))
    pairs |= dict(zip(named, zip(gradients(got, named), gradients(wanted, exact))))
    errors = {
        n: float((a.detach().double() - b).norm().detach() / b.norm().clamp_min(1e-30)) for n, (a, b) in pairs.items()
    }
    return max((float("inf") if error != error else error, name) for name, error in errors.items())


def test_the_kernels_in_the_interpreter_are_the_recurrence() -> None:
    printed = in_interpreter(__file__, str(torch.initial_seed()))
    assert "kernels agree" in printed, printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (32, 16), (96, 80), (256, 256)])
def test_on_the_device_they_are_the_recurrence(channel: bool, K: int, V: int) -> None:
    for more in ({"strength": True, "packed": True}, {"address": True, "state": True, "bursts": 2e-4}):
        case = {"T": 333, "K": K, "V": V, "channel": channel, "decay": 2.0, **more}
        error, name = worst_error(case, torch.bfloat16, "cuda")
        assert error < 1e-2, f"{name}: relative error {error:.1e} in {case}"


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[1]) % 2**63)
    for one in CASES:
        # differences of running sums of a decay a head lose digits behind strong decays; decay a channel has none
        error, name = worst_error(one, torch.float32, "cpu")
        assert error < (1e-4 if one.get("channel") else 2e-5), f"{name}: relative error {error:.1e} in {one}"
    print("kernels agree")
