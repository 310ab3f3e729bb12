"""The mixture of experts against dense mathematics, its FLOPs, its output scale, and settings it refuses.

Legend: B batch, T time, N tokens, D width, E experts, C candidates, K choices.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from feedforwards.moe_reference import WIDTH, WITH_ZERO, build, dense_mixture, scattered
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.config import ConfigError
from workbench.contract import AuxOutputs
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.layers import INIT_SCALE
from workbench.ops.experts import routed_experts, sort_choices
from workbench.testing import count_flops

# -- mathematics -------------------------------------------------------------------------------------------------------


def test_all_experts_together_are_a_dense_mixture() -> None:
    module, x_BTD = build(experts=4, top_k=4, renormalise=False, gamma=1.5), torch.randn(2, 9, WIDTH).double()
    x_ND = x_BTD.flatten(0, 1)
    gates_NC = F.linear(x_ND, module.router.weight).softmax(-1) * 1.5
    assert torch.allclose(module(x_BTD).flatten(0, 1), dense_mixture(module, x_ND, gates_NC), rtol=1e-12)


CHOICES = [
    pytest.param("moe", {"renormalise": True}, id="renormalised"),
    pytest.param("moe", {"score": "sigmoid", "renormalise": True}, id="sigmoid"),
    pytest.param("moe", {"score": "sigmoid", "bias": "sign"}, id="bias"),
    pytest.param("moe", {"shared": 1}, id="shared"),
    pytest.param("moe_random_zero", {"zero_experts": 4}, id="random zero"),
]


@pytest.mark.parametrize(("name", "settings"), CHOICES)
def test_chosen_experts_are_a_dense_mixture_with_gradients(name: str, settings: dict[str, Any]) -> None:
    module = build(name, **{**WITH_ZERO, "gamma": 2.0, **settings})
    x_BTD = torch.randn(2, 33, WIDTH).double().requires_grad_()
    x_ND = x_BTD.flatten(0, 1)
    routing = module.router(x_ND)
    gates_NC = scattered(routing.topk_expert_ids_NK, 2 * routing.topk_scores_NK, module.router.num_candidates)
    expected = dense_mixture(module, x_ND, gates_NC).view_as(x_BTD)
    expected = expected + (module.shared(x_BTD) if module.shared else 0)
    got, tensors, weight = module(x_BTD), [x_BTD, *module.parameters()], torch.randn_like(x_BTD)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, expected))):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "settings"), CHOICES)
def test_a_token_chooses_k_different_candidates(name: str, settings: dict[str, Any]) -> None:
    router = build(name, **{**WITH_ZERO, **settings}).router
    ids_NK = router(torch.randn(66, WIDTH).double()).topk_expert_ids_NK
    assert all(len(set(row)) == 3 for row in ids_NK.tolist())


def _zero_experts_alone() -> Any:
    """A layer whose tokens choose zero-computation experts only."""
    module = build(**{**WITH_ZERO, "top_k": 2, "gamma": 3.0, "bias": "proportional"})
    module.router.bias[4:] = 10.0
    return module


def test_tokens_that_choose_zero_experts_alone_are_scaled() -> None:
    module, x_BTD = _zero_experts_alone(), torch.randn(2, 9, WIDTH).double()
    probability_BTC = F.linear(x_BTD, module.router.weight).softmax(-1)
    assert torch.allclose(module(x_BTD), 3 * probability_BTC[..., 4:].sum(-1, keepdim=True) * x_BTD, rtol=1e-12)


def test_experts_without_tokens_have_zero_gradients() -> None:
    module = _zero_experts_alone()
    module(torch.randn(2, 9, WIDTH).double().requires_grad_()).sum().backward()
    assert (module.up.grad == 0).all()
    assert (module.down.grad == 0).all()


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", ["mixed", "an empty expert and one of a single token", "no expert at all"])
def test_grouped_and_loop_agree_bit_for_bit(dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the last expert, whatever they contain, never reach an output or a gradient."""
    grouped = F.grouped_mm

    def poisoned(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        y = grouped(x, w, offs=offs)
        if w.dim() == 3:
            y[int(offs[-1]) :] = float("nan")
        return y

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    ids_NK = torch.stack([torch.randperm(7)[:3] for _ in range(31)])
    if chosen.startswith("an"):
        ids_NK[ids_NK < 2] = 6
        ids_NK[5, 0] = 1
    elif chosen.startswith("no"):
        ids_NK = ids_NK % 2 + 5
    shapes = ((31, 16), (31, 3), (5, 16, 48), (5, 24, 16))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    x, gates, up, down = tensors
    weight, results = torch.randn(31, 16), []
    for backend in ("grouped_mm", "loop"):
        y = routed_experts(x, ids_NK, gates, sort_choices(ids_NK, 7), up, down, backend)
        results.append((y, *torch.autograd.grad((y * weight).sum(), tensors)))
    for got, expected in zip(*results):
        assert torch.equal(got, expected)
        assert got.isfinite().all()


def test_cost_counts_the_expected_experts() -> None:
    cost = MixtureOfExperts.cost(MixtureOfExperts.Config(**WITH_ZERO).resolved(WIDTH), WIDTH, 64)
    assert cost.flops == 2 * (WIDTH * 6 + 2.0 * 3 * WIDTH * 16)


def test_measured_flops_are_those_of_the_realised_experts() -> None:
    module, x_BTD, aux = build(dtype=torch.float32, **WITH_ZERO), torch.randn(1, 64, WIDTH), AuxOutputs()
    flops = count_flops(lambda: module(x_BTD, aux=aux))
    assert flops == pytest.approx(64 * float(aux.metrics["forward_flops"].value), rel=1e-6)
    realised, cost = float(aux.metrics["ffn_experts"].value), MixtureOfExperts.cost(module.config, WIDTH, 64)
    assert flops == pytest.approx(64 * (cost.flops + (realised - 2.0) * 6 * WIDTH * 16), rel=1e-6)


def test_backward_takes_twice_the_flops_of_forward() -> None:
    module, x_BTD = build(dtype=torch.float32, **WITH_ZERO), torch.randn(1, 64, WIDTH)
    forward = count_flops(lambda: module(x_BTD))
    with FlopCounterMode(display=False) as counter:
        module(x_BTD.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * forward


# -- output scale ------------------------------------------------------------------------------------------------------


def _initialised(config: Any, width: int) -> Any:
    module = MixtureOfExperts(config.resolved(width), width)
    with torch.no_grad():
        for owner, name in ((module, "up"), (module, "down"), (module.router, "weight")):
            owner.init_parameter(name, getattr(owner, name), torch.Generator().manual_seed(len(name)))
    return module.requires_grad_(False)


@pytest.mark.parametrize(("score", "renormalise"), [("softmax", False), ("softmax", True), ("sigmoid", False)])
def test_measured_gamma_starts_outputs_as_large_as_a_dense_layer(score: str, renormalise: bool) -> None:
    x_BTD = F.normalize(torch.randn(1, 512, 64), dim=-1) * 8
    dense = INIT_SCALE * (F.silu(INIT_SCALE * torch.randn(10**6)) * INIT_SCALE * torch.randn(10**6)).std()
    config = MixtureOfExperts.Config(experts=16, top_k=4, score=score, renormalise=renormalise, gamma="measured")
    assert float(_initialised(config, 64)(x_BTD).std()) == pytest.approx(float(dense), rel=0.1)


@pytest.mark.parametrize("m", [2, 4])
def test_the_root_of_the_split_undoes_finer_gates(m: int) -> None:
    """γ = √m for experts cut into m; narrower experts need nothing, since matrices start by their fan-in."""
    x_BTD = F.normalize(torch.randn(1, 512, 64), dim=-1) * 8

    def size(m: int) -> float:
        fields = {"experts": 8 * m, "top_k": 2 * m, "hidden": 128 // m, "renormalise": False, "gamma": m**0.5}
        return float(_initialised(MixtureOfExperts.Config(**fields), 64)(x_BTD).std())

    assert size(m) == pytest.approx(size(1), rel=0.1)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, r"experts: got 0; expected greater than or equal to 1"),
        ({"top_k": 0}, r"top_k: got 0; expected greater than or equal to 1"),
        (
            {"experts": 4, "zero_experts": 2, "top_k": 7},
            r"top_k: got 7; expected between 1 and experts=4 \+ zero_experts=2",
        ),
        (
            {"experts": 4, "zero_experts": 2, "top_k": 3, "expected_experts": 3},
            r"expected_experts: got 3.0; expected more than 1, less than",
        ),
        ({"expected_experts": 1}, r"expected_experts: got 1.0; expected top_k=2 where there are no zero_experts"),
        ({"hidden": 12}, r"hidden: got 12; expected a multiple of 8.* pieces of 16 bytes"),
        ({"hidden": 0}, r"hidden: got 0; expected greater than or equal to 8"),
        ({"balance_groups": 3}, r"balance_groups: got 3; expected a divisor of experts=8"),
        ({"balance_groups": 0}, r"balance_groups: got 0; expected greater than or equal to 1"),
        ({"bias": "proportional", "bias_step": -0.2}, r"bias_step: got -0.2; expected greater than 0"),
        ({"gamma": 0.0}, r"gamma: got 0.0; expected a number greater than 0"),
        ({"experts": 40_000}, r"experts: got 40000; expected at most 32766"),
        ({"bias_step": 0.1}, r"bias_step: got 0.1; expected nothing where bias=none"),
        ({"z_weight": -1.0}, r"z_weight: got -1.0; expected greater than or equal to 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureOfExperts.Config.parse(settings).resolved(WIDTH)


def test_a_width_without_whole_16_byte_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"width: got 250; .*16 bytes. Nearest: 248"):
        MixtureOfExperts.Config().resolved(250)
