"""Limited expert capacity: what is dropped, when, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feedforwards.moe_reference import WIDTH, build, dense_mixture, scattered
from torch import Tensor

from workbench.contract import AuxOutputs
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.testing import count_flops

CAPACITY = 8  # half of 32 tokens · 2 choices / 4 experts


@pytest.fixture
def module() -> Any:
    return build("moe_capacity", experts=4, top_k=2, capacity=0.5, renormalise=False, hidden=16)


@pytest.fixture
def x_BTD() -> Tensor:
    return torch.randn(2, 16, WIDTH).double()


def test_training_drops_choices_beyond_the_capacity(module: Any, x_BTD: Tensor) -> None:
    routing = module.router(x_BTD.flatten(0, 1))
    gates_NC = scattered(routing.topk_expert_ids_NK, routing.topk_scores_NK, 4).detach()
    gates_NC = gates_NC * ((gates_NC > 0).cumsum(0) <= CAPACITY)
    expected = dense_mixture(module, x_BTD.flatten(0, 1), gates_NC)
    assert torch.allclose(module(x_BTD).flatten(0, 1), expected, rtol=1e-10, atol=1e-12)


def test_metrics_count_what_is_left(module: Any, x_BTD: Tensor) -> None:
    aux = AuxOutputs()
    module(x_BTD, aux=aux)
    ids_NK = module.router(x_BTD.flatten(0, 1)).topk_expert_ids_NK
    dropped = int((ids_NK.flatten().bincount(minlength=4) - CAPACITY).clamp_min(0).sum())
    assert float(aux.metrics["dropped_share"].value) == pytest.approx(dropped / 64)
    assert float(aux.metrics["ffn_experts"].value) == pytest.approx((64 - dropped) / 32)


def test_cost_is_an_upper_bound_of_measured_flops(module: Any, x_BTD: Tensor) -> None:
    aux, cost = AuxOutputs(), module.cost(module.config, WIDTH, 16)
    flops = count_flops(lambda: module(x_BTD, aux=aux))
    assert cost.flops == 2 * (WIDTH * 4 + 1.0 * 3 * WIDTH * 16), "half of two experts per token"
    assert flops == pytest.approx(32 * float(aux.metrics["forward_flops"].value))
    assert flops <= 32 * cost.flops


def test_evaluation_drops_nothing(module: Any, x_BTD: Tensor) -> None:
    x_ND = x_BTD.flatten(0, 1)
    undropped = MixtureOfExperts.mix(module, x_ND, module.router(x_ND), None)
    assert torch.equal(module.eval()(x_BTD).flatten(0, 1), undropped)
