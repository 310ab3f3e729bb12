"""What is logged about routing."""

from __future__ import annotations

import pytest
import torch
from feedforwards.moe_reference import WIDTH, WITH_ZERO, build

from workbench.contract import AuxOutputs
from workbench.feedforwards.monitors import expected_normal_maximum, gradient_ratios, load_metrics


@pytest.mark.parametrize(("count", "maximum"), [(16, 1.77), (64, 2.34), (256, 2.83)])
def test_expected_maximum_of_normal_variables(count: int, maximum: float) -> None:
    assert round(expected_normal_maximum(count), 2) == maximum


def test_load_is_relative_to_the_mean() -> None:
    values = load_metrics(torch.tensor([4, 4, 4, 4]), torch.tensor([8, 0, 4, 4]), num_experts=4)
    assert values["load"].tolist() == [2, 0, 1, 1]
    assert float(values["max_violation_step"]) == 0
    assert float(values["max_violation_recent"]) == 1
    assert int(values["dead_experts"]) == 1


@pytest.mark.parametrize(("recent", "collapsed"), [([9, 3, 0, 0], 0), ([12, 0, 0, 0], 1)])
def test_a_router_has_collapsed_when_most_experts_are_dead(recent: list[int], collapsed: int) -> None:
    counts_C = torch.tensor(recent)
    assert float(load_metrics(counts_C, counts_C, num_experts=4)["collapsed"]) == collapsed


def test_the_share_of_zero_experts_is_that_of_all_choices() -> None:
    counts_C = torch.tensor([3, 3, 2])
    assert float(load_metrics(counts_C, counts_C, num_experts=2)["zero_share"]) == 0.25


def test_a_constant_gradient_vanishes_in_the_centred_ratio() -> None:
    p_C = torch.full((4,), 0.25, dtype=torch.float64)
    values = gradient_ratios(torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 0, 0, 0]).double(), p_C)
    assert float(values["r_g"]) == pytest.approx(2)
    assert float(values["r_g_centred"]) == pytest.approx(0)


def test_the_ratio_compares_the_balance_loss_with_the_training_loss() -> None:
    module, x_BTD, aux = build(**WITH_ZERO), torch.randn(2, 9, WIDTH).double(), AuxOutputs()
    module(x_BTD, aux=aux)
    ((_, counts_C, mean_probability_C),) = aux.counts
    gradient_C = torch.randn(6).double()
    values = module.router.diagnostics(counts_C, counts_C, mean_probability_C.detach(), gradient_C)
    balance_gradient_C = 0.01 * module.router.balance_loss.load_fractions(counts_C)
    assert float(values["r_g"]) == pytest.approx(float(balance_gradient_C.norm() / gradient_C.norm()))


def test_sigmoid_scores_have_no_gradient_ratio() -> None:
    router = build(**WITH_ZERO, score="sigmoid").router
    values = router.diagnostics(torch.ones(6), torch.ones(6), torch.ones(6), torch.ones(6))
    assert "r_g" not in values
