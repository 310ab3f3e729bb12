"""Padding is neither routed nor counted: a layer does with padded rows what it does with their tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feedforwards.moe_reference import WIDTH, WITH_ZERO, build
from torch import Tensor

from workbench.contract import AuxOutputs

SEGMENTS_BT = torch.tensor([[0] * 16, [0] * 5 + [-1] * 11, [0] * 4 + [1] * 5 + [-1] * 7])
LOSSES = {"balance_over": "micro_batch", "z_weight": 0.1}
LAYERS: dict[str, dict[str, Any]] = {
    "moe": {**WITH_ZERO, **LOSSES, "shared": 1, "bias": "sign"},
    "moe_random_zero": {**WITH_ZERO, **LOSSES},
    "moe_capacity": {"experts": 4, "top_k": 2, "hidden": 16, "capacity": 0.6, **LOSSES},
    "moe_expert_choice": {"experts": 4, "top_k": 2, "hidden": 16},
}


@pytest.fixture(params=LAYERS)
def module(request: pytest.FixtureRequest) -> Any:
    return build(request.param, **LAYERS[request.param])


@pytest.fixture
def x_BTD() -> Tensor:
    x_BTD = torch.randn(3, 16, WIDTH).double()
    x_BTD[SEGMENTS_BT < 0] = 5 * torch.randn(WIDTH).double()  # alike, as padding is
    return x_BTD


def run(module: Any, x_BTD: Tensor, segments: Tensor | None) -> tuple[Tensor, AuxOutputs]:
    aux = AuxOutputs()
    return module(x_BTD, segments=segments, aux=aux), aux


def alone(x_BTD: Tensor) -> Tensor:
    """(1, T, D) the tokens without padding."""
    return x_BTD[SEGMENTS_BT >= 0][None]


def test_outputs_are_those_of_the_tokens_alone(module: Any, x_BTD: Tensor) -> None:
    y_BTD, (exact_BTD, _) = run(module, x_BTD, SEGMENTS_BT)[0], run(module, alone(x_BTD), None)
    assert torch.allclose(alone(y_BTD), exact_BTD, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_the_tokens_alone(module: Any, x_BTD: Tensor) -> None:
    gradients = []
    for x, segments in ((x_BTD, SEGMENTS_BT), (alone(x_BTD), None)):
        module.zero_grad()
        y_BTD, aux = run(module, x, segments)
        y_BTD = y_BTD if segments is None else alone(y_BTD)
        (y_BTD.square().sum() + sum(aux.losses)).backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for padded, exact in zip(*gradients):
        assert torch.allclose(padded, exact, rtol=1e-10, atol=1e-12)


def test_losses_and_counts_are_those_of_the_tokens_alone(module: Any, x_BTD: Tensor) -> None:
    (_, padded), (_, exact) = run(module, x_BTD, SEGMENTS_BT), run(module, alone(x_BTD), None)
    assert len(padded.losses) == len(exact.losses)
    for loss, other in zip(padded.losses, exact.losses):
        assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-12)
    for (_, counts, loss_input), (_, exact_counts, exact_input) in zip(padded.counts, exact.counts, strict=True):
        assert counts.tolist() == exact_counts.tolist()
        assert torch.allclose(loss_input, exact_input, rtol=1e-12)


def test_metrics_are_those_of_the_tokens_alone(module: Any, x_BTD: Tensor) -> None:
    (_, padded), (_, exact) = run(module, x_BTD, SEGMENTS_BT), run(module, alone(x_BTD), None)
    values, exact_values = ({name: float(m.value) for name, m in aux.metrics.items()} for aux in (padded, exact))
    assert values == pytest.approx(exact_values, rel=1e-6)


def test_padding_has_no_gradient_and_reads_no_expert() -> None:
    module, x_BTD = build(**WITH_ZERO), torch.randn(3, 16, WIDTH).double().requires_grad_()
    y_BTD, _ = run(module, x_BTD, SEGMENTS_BT)
    assert (y_BTD[SEGMENTS_BT < 0] == 0).all()
    (gradient_BTD,) = torch.autograd.grad(y_BTD.square().sum(), x_BTD)
    assert (gradient_BTD[SEGMENTS_BT < 0] == 0).all()


def test_tokens_of_the_step_divide_the_sums_of_a_micro_batch(x_BTD: Tensor) -> None:
    module, aux = build(**WITH_ZERO, **LOSSES), AuxOutputs(tokens=torch.tensor(300.0))
    module(x_BTD, segments=SEGMENTS_BT, aux=aux)
    alone_aux = run(module, x_BTD, SEGMENTS_BT)[1]
    tokens = int((SEGMENTS_BT >= 0).sum())
    for share, mean in zip(aux.losses, alone_aux.losses, strict=True):
        assert float(share.detach()) == pytest.approx(float(mean.detach()) * tokens / 300, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_the_device_padding_is_no_token(module: Any, x_BTD: Tensor, autocast: bool) -> None:
    """Outputs and gradients of the kernels, whose sums have another order with other numbers of rows."""
    module, x_BTD, segments_BT = module.to("cuda", torch.float32), x_BTD.cuda().float(), SEGMENTS_BT.cuda()
    results = []
    for x, segments in ((x_BTD, segments_BT), (x_BTD[segments_BT >= 0][None], None)):
        module.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y_BTD, aux = run(module, x, segments)
        y_BTD = y_BTD if segments is None else y_BTD[segments >= 0][None]
        (y_BTD.float().square().sum() + sum(aux.losses)).backward()
        results.append([y_BTD.detach(), *(p.grad.clone() for p in module.parameters())])
    for padded, exact in zip(*results):
        assert padded.isfinite().all()
        assert float((padded.double() - exact.double()).norm() / exact.double().norm()) < 1e-2
