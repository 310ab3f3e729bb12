"""Products of quantised operands against fp64 products of the same operands; devices that cannot compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import mixers
from workbench.layers import Linear
from workbench.model import LanguageModel, ModelConfig
from workbench.ops.scaled_linear import check_device, quantised, scaled_linear
from workbench.training.fp8 import use_fp8

SCALINGS = ["row", "tensor"]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """x (32, 48), a weight (16, 48), a gradient (32, 16), whose rows differ in size."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (torch.randn(*shape, generator=generator) for shape in ((32, 48), (16, 48), (32, 16)))
    return (x * torch.logspace(-2, 2, 32)[:, None]).bfloat16(), weight.bfloat16(), gradient.bfloat16()


def exact(a: Tensor, b: Tensor, scaling: Any, a_kind: torch.dtype) -> Tensor:
    """fp64 product of quantised a and b."""
    (a8, a_scale), (b8, b_scale) = quantised(a, scaling, a_kind, 1), quantised(b, scaling, torch.float8_e4m3fn, 0)
    return (a8.double() * a_scale) @ (b8.double() * b_scale)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_three_products_are_those_of_the_quantised_operands(scaling: Any) -> None:
    x, weight, gradient = operands()
    x.requires_grad_(), weight.requires_grad_()
    y = scaled_linear(x, weight, None, scaling)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None
    kind = torch.float8_e4m3fn if scaling == "row" else torch.float8_e5m2
    wanted = {
        "y": (y, exact(x, weight.t(), scaling, torch.float8_e4m3fn)),
        "dx": (x.grad, exact(gradient, weight, scaling, kind)),
        "dW": (weight.grad, exact(gradient.t(), x, scaling, kind)),
    }
    for name, (got, right) in wanted.items():
        # bf16 rounds by at most 2^-9, relative
        error = (got.double() - right).abs().max() / right.abs().max()
        assert error < 2**-8, name


def test_the_relative_error_is_that_of_three_bits() -> None:
    x, weight, _ = operands()
    right = x.double() @ weight.double().t()
    errors = (scaled_linear(x, weight, None, "row").double() - right).norm(dim=1) / right.norm(dim=1)
    assert 0.01 < float(errors.mean()) < 0.06, "e4m3 rounds by up to 2^-4, relative"


def test_rows_are_scaled_one_by_one() -> None:
    values, scales = quantised(torch.tensor([[1.0, 2.0], [100.0, 448.0]]), "row", torch.float8_e4m3fn, axis=1)
    assert scales.flatten().tolist() == pytest.approx([2 / 448, 1.0])
    assert values.float()[:, 1].tolist() == [448.0, 448.0]


def test_a_tensor_has_one_scale() -> None:
    _, scale = quantised(torch.tensor([[1.0, 2.0], [100.0, 448.0]]), "tensor", torch.float8_e4m3fn, axis=1)
    assert float(scale) == 1.0


def test_zeros_stay_zero() -> None:
    assert torch.equal(
        scaled_linear(torch.zeros(16, 16), torch.zeros(16, 16), None, "row").float(), torch.zeros(16, 16)
    )


def test_a_bias_is_added() -> None:
    y = scaled_linear(torch.zeros(2, 8, 16), torch.zeros(32, 16), torch.ones(32), "row")
    assert y.shape == (2, 8, 32) and bool((y == 1).all())


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.fp8: got .*20 rows.*\(16, 16\)"):
        scaled_linear(torch.zeros(4, 5, 16), torch.zeros(16, 16), None, "row")


@pytest.mark.parametrize("pattern", sorted(mixers))
def test_every_mixer_trains_with_quantised_products(pattern: str) -> None:
    fields = {"nsa": {"compress": "mlp"}, "asa_global": {"compress": "mlp"}}.get(pattern, {})
    config = ModelConfig(width=64, depth=1, pattern=pattern, mixers={pattern: fields} if fields else {})
    model = LanguageModel(config, seed=0)
    assert use_fp8(model, "row")
    tokens_BT = torch.randint(2048, (1, 81), generator=torch.Generator().manual_seed(0))  # 80 = 5 · 16
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).isfinite()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_cpu_is_refused(scaling: Any) -> None:
    with pytest.raises(ConfigError, match=r"training.fp8: got .*on a cpu device.*Hopper"):
        check_device(torch.device("cpu"), scaling)


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"A100, 8.0"):
        check_device(torch.device("cuda"), "row")


def test_heads_routers_embeddings_and_gates_of_states_stay_in_bf16() -> None:
    config = ModelConfig(width=64, depth=2, pattern="gdn full", feedforward="swiglu moe", tied=False)
    model = LanguageModel(config, seed=0)
    names = set(use_fp8(model, "row"))
    assert {"blocks.0.mixer.qkv", "blocks.0.mixer.out", "blocks.0.feedforward.up", "blocks.1.mixer.qkv"} <= names
    assert not any("gates" in name or "router" in name or name == "head" for name in names)


def test_a_model_trains_with_quantised_products() -> None:
    model = LanguageModel(ModelConfig(width=64, depth=1), seed=0)
    tokens_BT = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for scaling in (None, "row"):
        if scaling:
            use_fp8(model, "row")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


def test_evaluation_keeps_the_precision_of_the_model() -> None:
    layer = Linear(32, 32)
    torch.nn.init.normal_(layer.weight)
    plain = layer(torch.ones(16, 32))
    layer.fp8 = "row"
    assert torch.equal(layer.eval()(torch.ones(16, 32)), plain)
    assert not torch.equal(layer.train()(torch.ones(16, 32)).float(), plain)


@pytest.mark.compile
@pytest.mark.parametrize("scaling", SCALINGS)
def test_compiled_products_are_one_graph_with_the_same_numbers(scaling: Any) -> None:
    results = []
    for product in (scaled_linear, torch.compile(scaled_linear, backend="aot_eager", fullgraph=True)):
        x, weight, gradient = operands()
        x.requires_grad_(), weight.requires_grad_()
        y = product(x, weight, None, scaling)
        y.backward(gradient)
        results.append((y, x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
def test_on_the_device_products_are_those_of_the_quantised_operands(scaling: Any) -> None:
    x, weight, gradient = (
        torch.randn(*shape, device="cuda").bfloat16() for shape in ((512, 256), (384, 256), (512, 384))
    )
    results = []
    for device in ("cuda", "cpu"):
        x, weight = (operand.detach().to(device).requires_grad_() for operand in (x, weight))
        product = torch.compile(scaled_linear) if device == "cuda" else scaled_linear
        y = product(x, weight, None, scaling)
        y.backward(gradient.to(device))
        results.append([part.detach().cpu().double() for part in (y, x.grad, weight.grad)])
    for ours, right in zip(*results):
        assert float((ours - right).norm() / right.norm()) < 5e-3
