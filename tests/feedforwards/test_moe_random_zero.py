"""Random zero-computation experts: as many as in `moe` in the mean, no preferred one, experts still the best-scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feedforwards.moe_reference import WIDTH, build
from torch import Tensor

from workbench.config import ConfigError
from workbench.feedforwards.moe_random_zero import RandomZeroExperts, binomial_probability


@pytest.fixture
def router() -> Any:
    fields = {"experts": 8, "zero_experts": 8, "top_k": 3, "expected_experts": 2.0, "renormalise": False}
    return build("moe_random_zero", dtype=torch.float32, **fields).router


@pytest.fixture
def x_ND() -> Tensor:
    return torch.randn(4000, WIDTH)


def test_the_number_of_experts_is_binomial_with_the_expected_mean(router: Any, x_ND: Tensor) -> None:
    experts_N = (router(x_ND).topk_expert_ids_NK < 8).sum(-1).double()
    assert float(experts_N.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(experts_N.std()) == pytest.approx((2 / 3) ** 0.5, abs=0.05)


def test_a_second_pass_chooses_the_same(router: Any, x_ND: Tensor) -> None:
    assert torch.equal(router(x_ND).topk_expert_ids_NK, router(x_ND).topk_expert_ids_NK)


def test_experts_are_the_best_scored(router: Any, x_ND: Tensor) -> None:
    best_NK = router.scores(x_ND)[1][:, :8].topk(3).indices
    ids_NK = router(x_ND).topk_expert_ids_NK
    assert all(set(ids) - set(range(8, 16)) <= set(best) for ids, best in zip(ids_NK.tolist(), best_NK.tolist()))


def test_no_zero_expert_is_preferred(router: Any, x_ND: Tensor) -> None:
    counts_C = router(x_ND).topk_expert_ids_NK.flatten().bincount(minlength=16)
    assert counts_C[8:].double().std() < 40


def test_a_clamped_binomial_has_the_wanted_mean() -> None:
    p = binomial_probability(2, 1, 2, 1.5)  # at least 1: mean 1 + p²
    assert p == pytest.approx(0.5**0.5)


def test_zero_experts_are_required() -> None:
    with pytest.raises(ConfigError, match="zero_experts: got 0; expected greater than or equal to 1"):
        RandomZeroExperts.Config(zero_experts=0)
