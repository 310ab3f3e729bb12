"""The router: its bias, its precision, the gradient of its gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from feedforwards.moe_reference import WIDTH, WITH_ZERO, build, dense_mixture, scattered

from workbench.contract import AuxOutputs


def test_a_bias_that_is_equal_for_all_changes_nothing() -> None:
    router, x_ND = build(**WITH_ZERO, bias="sign").router, torch.randn(40, WIDTH).double()
    before = router(x_ND)
    router.bias += 0.7
    after = router(x_ND)
    assert torch.equal(before.topk_expert_ids_NK, after.topk_expert_ids_NK)
    assert torch.equal(before.topk_scores_NK, after.topk_scores_NK)


def test_the_bias_changes_the_selection_and_no_gate() -> None:
    router, x_ND = build(**WITH_ZERO, bias="sign").router, torch.randn(40, WIDTH).double()
    router.bias[2] = -10.0
    routing = router(x_ND)
    assert not (routing.topk_expert_ids_NK == 2).any()
    assert torch.equal(routing.topk_scores_NK, router.scores(x_ND)[1].gather(1, routing.topk_expert_ids_NK))


def test_scores_are_fp32_under_autocast() -> None:
    router, x_ND = build(dtype=torch.float32, **WITH_ZERO).router, torch.randn(7, WIDTH)
    expected = F.linear(x_ND, router.weight).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.scores(x_ND)[1], expected)


def test_the_bias_stays_fp32_when_the_layer_is_converted() -> None:
    module = build(dtype=torch.float32, **WITH_ZERO, bias="sign")
    module.router.bias.fill_(0.1234567)
    module.to(torch.bfloat16)
    assert module.router.weight.dtype == torch.bfloat16
    assert module.router.bias.dtype == torch.float32
    assert float(module.router.bias[0]) == pytest.approx(0.1234567, abs=1e-8)


def test_the_gradient_tap_receives_the_gradient_of_the_gates() -> None:
    module, x_BTD = build(**WITH_ZERO, balance_over="micro_batch"), torch.randn(2, 9, WIDTH).double()
    tap_C = module.router.gradient_tap = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    aux, weight = AuxOutputs(), torch.randn(2, 9, WIDTH).double()
    ((module(x_BTD, aux=aux) * weight).sum() + aux.losses[0]).backward()
    x_ND = x_BTD.flatten(0, 1)
    routing, scores_NC = module.router(x_ND), module.router.scores(x_ND)[1]
    chosen_NC = scattered(routing.topk_expert_ids_NK, torch.ones_like(routing.topk_scores_NK), 6)
    gates_NC = (chosen_NC * scores_NC).detach().requires_grad_()
    (dense_mixture(module, x_ND, gates_NC) * weight.flatten(0, 1)).sum().backward()
    assert gates_NC.grad is not None
    assert torch.allclose(tap_C.grad, (gates_NC.grad * chosen_NC).sum(0), rtol=1e-10)
