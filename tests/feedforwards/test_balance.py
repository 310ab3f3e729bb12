"""Balance: the loss and its gradient, the controller of the selection bias.

Legend: N tokens, C candidates, E experts, K choices.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from feedforwards.moe_reference import WIDTH, WITH_ZERO, build
from torch import Tensor

from workbench.contract import AuxOutputs
from workbench.feedforwards.balance import BalanceLoss
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.monitors import expected_normal_maximum
from workbench.feedforwards.router import Router

# -- loss --------------------------------------------------------------------------------------------------------------

ALPHA = 0.02
EVEN_C = torch.full((12,), 50)
"""Counts of a balanced load: of 3 choices, 2 go to 8 experts and 1 to 4 zero-computation experts."""


@pytest.fixture
def grouped_loss() -> BalanceLoss:
    fields = {"experts": 8, "zero_experts": 4, "top_k": 3, "balance_groups": 4, "balance_weight": ALPHA}
    return BalanceLoss(MixtureOfExperts.Config(**fields).resolved(WIDTH))


def test_load_fractions_of_a_balanced_load_are_one(grouped_loss: BalanceLoss) -> None:
    assert torch.allclose(grouped_loss.load_fractions(EVEN_C), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("counts_C", [EVEN_C, torch.arange(1, 13)], ids=["balanced", "unbalanced"])
def test_the_gradient_of_the_loss_is_the_weighted_load(grouped_loss: BalanceLoss, counts_C: Tensor) -> None:
    mean_probability_C = torch.rand(12).double().requires_grad_()
    (gradient,) = torch.autograd.grad(grouped_loss(counts_C, mean_probability_C), mean_probability_C)
    assert torch.allclose(gradient, ALPHA * grouped_loss.load_fractions(counts_C))


def test_single_experts_as_groups_are_the_usual_loss() -> None:
    module = build(experts=6, top_k=2, balance_weight=0.1, balance_over="micro_batch")
    x_BTD, aux = torch.randn(2, 9, WIDTH).double(), AuxOutputs()
    module(x_BTD, aux=aux)
    p_NC = module.router.scores(x_BTD.flatten(0, 1))[1]
    f_C = F.one_hot(p_NC.topk(2).indices, 6).sum((0, 1)).double() / 36
    assert torch.allclose(aux.losses[0], 0.1 * 6 * (f_C * p_NC.mean(0)).sum(), rtol=1e-12)


# -- controller --------------------------------------------------------------------------------------------------------


class Simulation:
    """A router with random logits and a fixed preference, under control for some steps."""

    E, Z, K, N = 64, 32, 12, 4096

    def __init__(self, rule: str, score: str, steps: int):
        fields = {"experts": self.E, "zero_experts": self.Z, "top_k": self.K, "bias": rule, "score": score}
        self.router = Router(MixtureOfExperts.Config(**fields, renormalise=False).resolved(1024), 8)
        preference_C = 0.5 * torch.randn(self.E + self.Z)
        pool_C = torch.randn(4 * self.N, self.E + self.Z)
        self.experts_per_token: list[float] = []
        self.max_violations: list[float] = []
        for _ in range(steps):
            logits_NC = pool_C[torch.randint(4 * self.N, (self.N,))] + preference_C
            scores_NC = logits_NC.softmax(-1) if score == "softmax" else logits_NC.sigmoid()
            counts_C = self.router.select(scores_NC, logits_NC).flatten().bincount(minlength=self.E + self.Z)
            experts_E = counts_C[: self.E].double()
            self.experts_per_token.append(float(experts_E.sum() / self.N))
            self.max_violations.append(float(experts_E.max() / experts_E.mean() - 1))
            self.router.update_state(counts_C, 1.0, 0.5, torch.ones(()))


@pytest.mark.parametrize(("score", "step"), [("softmax", 0.2), ("sigmoid", 2.0)])
def test_the_default_step_depends_on_the_score(score: str, step: float) -> None:
    assert MixtureOfExperts.Config(bias="proportional", score=score).resolved(WIDTH).bias_step == step


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_proportional_controller_reaches_the_expected_experts(score: str) -> None:
    simulation = Simulation("proportional", score, steps=200)
    assert abs(sum(simulation.experts_per_token[-20:]) / 20 - 8) < 0.08
    assert (simulation.router.bias[64:] == 0).all()


def test_the_proportional_controller_balances_experts() -> None:
    simulation = Simulation("proportional", "softmax", steps=200)
    floor = expected_normal_maximum(64) * (64 / (8 * 4096)) ** 0.5
    assert sum(simulation.max_violations[-20:]) / 20 < 1.5 * floor


def test_the_sign_controller_approaches_the_expected_experts() -> None:
    simulation = Simulation("sign", "softmax", steps=40)
    assert abs(simulation.experts_per_token[-1] - 8) < abs(simulation.experts_per_token[0] - 8)
    assert (simulation.router.bias[64:] == 0).all()


COUNTS_C = torch.tensor([9, 5, 1, 1, 4, 4])


@pytest.mark.parametrize(
    ("lr_factor", "remaining", "applied"),
    [
        pytest.param(1.0, 0.5, 0.0, id="skipped step"),
        pytest.param(1.0, 0.02, 1.0, id="end of the run"),
        pytest.param(0.0, 0.5, 1.0, id="learning rate zero"),
    ],
)
def test_the_bias_stays_constant(lr_factor: float, remaining: float, applied: float) -> None:
    router = build(**WITH_ZERO, bias="proportional").router
    router.update_state(COUNTS_C, lr_factor, remaining, torch.tensor(applied))
    assert (router.bias == 0).all()


def test_a_proportional_update_is_the_deficit_times_step_and_learning_rate() -> None:
    router = build(**WITH_ZERO, bias="proportional").router
    router.update_state(COUNTS_C, 0.5, 0.5, torch.ones(()))
    assert torch.allclose(router.bias[:4], 0.1 * (2 / 12 - COUNTS_C[:4].double() / 24))
    assert (router.bias[4:] == 0).all()
