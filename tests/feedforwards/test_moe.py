"""The mixture of experts against dense mathematics; its balance, its monitors, and what it refuses.

Legend: B batch, T time, N tokens, D width, E experts, C categories, K choices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_run, run_fields, write_corpus
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from workbench.ablation.matching.cost_card import cost_table
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, feedforwards
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.router import Router, _largest_normal
from workbench.layers import INIT_SCALE
from workbench.model import LanguageModel, ModelConfig
from workbench.ops.experts import routed_experts, sort_choices
from workbench.pretrained.tensors import read_tensors
from workbench.testing import FeedForwardConformance, count_flops
from workbench.training.export import export
from workbench.training.trial import train
from workbench.transforms import initialise_from

WIDTH = 32
ZERO = {"experts": 4, "zero_experts": 2, "top_k": 3, "renormalise": False, "hidden": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def build(name: str = "moe", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    suite = type("Suite", (FeedForwardConformance,), {"name": name, "width": WIDTH})()
    return suite.build(settings, dtype, seed=int(torch.randint(1000, ())))


def dense(module: Any, x_ND: Tensor, gate_NC: Tensor) -> Tensor:
    """Every expert on every token, weighted."""
    both = torch.einsum("nd,edf->enf", x_ND, module.up)
    gate, value = both.chunk(2, dim=-1)
    y_END = torch.einsum("enf,efd->end", F.silu(gate) * value, module.down)
    E = len(y_END)
    return torch.einsum("end,ne->nd", y_END, gate_NC[:, :E]) + gate_NC[:, E:].sum(-1, keepdim=True) * x_ND


def mixture(chosen_NK: Tensor, gate_NK: Tensor, categories: int) -> Tensor:
    return torch.zeros(len(chosen_NK), categories, dtype=gate_NK.dtype).scatter_(1, chosen_NK, gate_NK)


# -- mathematics ---------------------------------------------------------------------------------------------------------


def test_all_experts_together_are_a_dense_mixture() -> None:
    module, x_BTD = build(experts=4, top_k=4, renormalise=False, gamma=1.5), torch.randn(2, 9, WIDTH).double()
    gate_NC = F.linear(x_BTD.flatten(0, 1), module.router.weight).softmax(-1) * 1.5
    assert torch.allclose(module(x_BTD).flatten(0, 1), dense(module, x_BTD.flatten(0, 1), gate_NC), rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"renormalise": True},
        {"score": "sigmoid", "renormalise": True},
        {"score": "sigmoid", "bias": "sign"},
        {"shared": 1},
        {"random_zero": True, "zero_experts": 4},
    ],
)
def test_chosen_experts_are_a_dense_mixture_with_gradients(settings: dict[str, Any]) -> None:
    module, x_BTD = build(**{**ZERO, "gamma": 2.0, **settings}), torch.randn(2, 33, WIDTH).double().requires_grad_()
    routing, x_ND = module.router(x_BTD.flatten(0, 1)), x_BTD.flatten(0, 1)
    assert all(len(set(row)) == 3 for row in routing.chosen_NK.tolist())
    wanted = dense(module, x_ND, mixture(routing.chosen_NK, 2 * routing.gate_NK, module.router.categories))
    wanted = wanted.view_as(x_BTD) + (module.shared(x_BTD) if module.shared else 0)
    got, tensors, weight = module(x_BTD), [x_BTD, *module.parameters()], torch.randn_like(x_BTD)
    assert torch.allclose(got, wanted, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, wanted))):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_tokens_that_choose_zero_experts_alone_are_scaled() -> None:
    module, x_BTD = (
        build(**{**ZERO, "top_k": 2, "gamma": 3.0, "bias": "proportional"}),
        torch.randn(2, 9, WIDTH).double(),
    )
    module.router.bias[4:] = 10.0
    probability_NC = F.linear(x_BTD, module.router.weight).softmax(-1)
    assert torch.allclose(module(x_BTD), 3 * probability_NC[..., 4:].sum(-1, keepdim=True) * x_BTD, rtol=1e-12)
    y = module(x_BTD.requires_grad_())
    y.sum().backward()
    assert (module.up.grad == 0).all() and (module.down.grad == 0).all()


def test_bias_moves_the_selection_and_no_gate() -> None:
    module, x_ND = build(**{**ZERO, "bias": "sign"}), torch.randn(40, WIDTH).double()
    before = module.router(x_ND)
    module.router.bias += 0.7  # the same for all: the same selection
    after = module.router(x_ND)
    assert torch.equal(before.chosen_NK, after.chosen_NK) and torch.equal(before.gate_NK, after.gate_NK)
    module.router.bias[2] = -10.0
    moved = module.router(x_ND)
    assert not (moved.chosen_NK == 2).any()
    scores_NC = module.router.scores(x_ND)[1]
    assert torch.equal(moved.gate_NK, scores_NC.gather(1, moved.chosen_NK))


def test_scores_are_fp32_under_autocast_and_the_bias_never_loses_bits() -> None:
    module, x_ND = build(dtype=torch.float32, **ZERO, bias="sign"), torch.randn(7, WIDTH)
    wanted = F.linear(x_ND, module.router.weight).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.router.scores(x_ND)[1], wanted)
    module.router.bias.fill_(0.1234567)
    module.to(torch.bfloat16)
    assert module.router.weight.dtype == torch.bfloat16
    assert module.router.bias.dtype == torch.float32 and float(module.router.bias[0]) == pytest.approx(
        0.1234567, abs=1e-8
    )


# -- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", ["mixed", "an empty expert and one of a single token", "no expert at all"])
def test_grouped_and_loop_agree_bit_for_bit(dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rows behind the last expert, whatever they hold, never show."""
    grouped = F.grouped_mm

    def poisoned(x: Tensor, w: Tensor, *, offs: Tensor) -> Tensor:
        y = grouped(x, w, offs=offs)
        if w.dim() == 3:
            y[int(offs[-1]) :] = float("nan")
        return y

    monkeypatch.setattr(F, "grouped_mm", poisoned)
    chosen_NK = torch.stack([torch.randperm(7)[:3] for _ in range(31)])
    if chosen.startswith("an"):
        chosen_NK[chosen_NK < 2] = 6
        chosen_NK[5, 0] = 1
    elif chosen.startswith("no"):
        chosen_NK = chosen_NK % 2 + 5
    shapes = ((31, 16), (31, 3), (5, 16, 48), (5, 24, 16))
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    x, gate, up, down = tensors
    weight, results = torch.randn(31, 16), []
    for backend in ("grouped_mm", "loop"):
        y = routed_experts(x, chosen_NK, gate, sort_choices(chosen_NK, 7), up, down, backend)
        results.append((y, *torch.autograd.grad((y * weight).sum(), tensors)))
    for got, wanted in zip(*results):
        assert torch.equal(got, wanted) and got.isfinite().all()


def test_flops_are_those_of_the_rows_that_enter_a_product() -> None:
    module, x_BTD = build(dtype=torch.float32, **ZERO), torch.randn(1, 64, WIDTH)
    aux = AuxOutputs()
    counted = count_flops(lambda: module(x_BTD, aux=aux))
    assert counted == pytest.approx(64 * float(aux.metrics["forward_flops"]), rel=1e-6)
    config = MixtureOfExperts.Config(**ZERO).resolved(WIDTH)
    cost, realised = MixtureOfExperts.cost(config, WIDTH, 64), float(aux.metrics["ffn_experts"])
    assert cost.flops == 2 * (WIDTH * 6 + 2.0 * 3 * WIDTH * 16)  # two of three choices are expected to be experts
    assert counted == pytest.approx(64 * (cost.flops + (realised - 2.0) * 6 * WIDTH * 16), rel=1e-6)
    with FlopCounterMode(display=False) as counter:
        module(x_BTD.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * counted  # nothing but products: twice as much backward


# -- balance -------------------------------------------------------------------------------------------------------------


def test_balance_loss_has_the_gradient_of_its_identity() -> None:
    alpha, N, Z, K = 0.02, 8, 4, 3
    router = build(
        experts=N, zero_experts=Z, top_k=K, renormalise=False, groups=4, balance_weight=alpha, hidden=16
    ).router
    even = torch.full((N + Z,), 50)  # two real experts of three choices
    assert torch.allclose(router.forces(even), torch.ones(N + Z, dtype=torch.float64))
    mean_C = torch.rand(N + Z).double().requires_grad_()
    counts = torch.randint(1, 100, (N + Z,))
    for c in (even, counts):
        (gradient,) = torch.autograd.grad(router.balance_loss(c, mean_C), mean_C)
        assert torch.allclose(gradient, alpha * router.forces(c))
    (gradient,) = torch.autograd.grad(router.balance_loss(even, mean_C), mean_C)
    assert float(gradient.norm()) == pytest.approx(alpha * (N + Z) ** 0.5)


def test_single_experts_as_groups_are_the_usual_loss() -> None:
    module, x_BTD = (
        build(experts=6, top_k=2, balance_weight=0.1, balance_over="micro_batch"),
        torch.randn(2, 9, WIDTH).double(),
    )
    aux = AuxOutputs()
    module(x_BTD, aux=aux)
    p_NC = module.router.scores(x_BTD.flatten(0, 1))[1]
    f_C = F.one_hot(p_NC.topk(2).indices, 6).sum((0, 1)).double() / 36
    assert torch.allclose(aux.losses[0], 0.1 * 6 * (f_C * p_NC.mean(0)).sum(), rtol=1e-12)


def test_an_indicator_counts_a_token_once_a_group() -> None:
    module, x_BTD = build(**ZERO, count="indicator", groups=2), torch.randn(2, 9, WIDTH).double()
    aux = AuxOutputs()
    module(x_BTD, aux=aux)
    ((_, counts, _),) = aux.counts
    group_NK = torch.tensor([0, 0, 1, 1, 2, 2])[module.router(x_BTD.flatten(0, 1)).chosen_NK]
    assert counts[6:].tolist() == [int((group_NK == j).any(-1).sum()) for j in range(3)]
    assert float(module.router.forces(counts)[5]) == pytest.approx(int(counts[8]) / 18)  # one zero expert is expected


@pytest.mark.parametrize(
    ("rule", "score"), [("proportional", "softmax"), ("sign", "softmax"), ("proportional", "sigmoid")]
)
def test_the_controller_reaches_its_budget(rule: str, score: str) -> None:
    """A router with random logits and a fixed preference: proportional steps of μ = 0.2 are the default for softmax."""
    N, Z, K, T = 64, 32, 12, 4096
    config = MixtureOfExperts.Config(experts=N, zero_experts=Z, top_k=K, bias=rule, score=score, renormalise=False)
    router = Router(config.resolved(1024), 8)
    assert router.target == 8 and (
        rule == "sign" or config.resolved(8).bias_step == {"softmax": 0.2, "sigmoid": 2.0}[score]
    )
    skew, means, violations = 0.5 * torch.randn(N + Z), [], []
    steps = 200 if rule == "proportional" else 40
    pool = torch.randn(4 * T, N + Z)
    for _ in range(steps):
        logits = pool[torch.randint(4 * T, (T,))] + skew
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        counts = router.select(scores, logits).flatten().bincount(minlength=N + Z)
        means.append(float(counts[:N].sum() / T))
        violations.append(float(counts[:N].max() / counts[:N].double().mean() - 1))
        router.update_state(counts, 1.0, 0.5, torch.ones(()))
    if rule == "sign":
        assert abs(means[-1] - 8) < abs(means[0] - 8) and (router.bias[N:] == 0).all()
        return
    assert abs(sum(means[-20:]) / 20 - 8) < 0.08
    if score == "softmax":
        assert sum(violations[-20:]) / 20 < 1.5 * _largest_normal(N) * (N / (8 * T)) ** 0.5
    assert (router.bias[N:] == 0).all()


def test_the_controller_rests_when_a_step_is_skipped_and_at_the_end() -> None:
    router = build(**ZERO, bias="proportional").router
    counts = torch.tensor([9, 5, 1, 1, 4, 4])
    for rate, left, applied in ((1.0, 0.5, 0.0), (1.0, 0.02, 1.0), (0.0, 0.5, 1.0)):
        router.update_state(counts, rate, left, torch.tensor(applied))
        assert (router.bias == 0).all()
    router.update_state(counts, 0.5, 0.5, torch.ones(()))
    assert torch.allclose(router.bias[:4], 0.1 * (2 / 12 - counts[:4].double() / 24)) and (router.bias[4:] == 0).all()


def test_largest_of_normal_numbers() -> None:
    assert [round(_largest_normal(n), 2) for n in (16, 64, 256)] == [1.77, 2.34, 2.83]


def test_gamma_makes_outputs_as_large_as_they_were() -> None:
    """√m undoes finer gates; narrower experts need nothing, since matrices start by their fan-in."""
    x_BTD, sizes = F.normalize(torch.randn(1, 512, 64), dim=-1) * 8, []
    for m in (1, 2, 4):
        config = MixtureOfExperts.Config(
            experts=8 * m, top_k=2 * m, hidden=128 // m, renormalise=False, gamma="closed", split=m
        )
        sizes.append(float(_started(config, 64)(x_BTD).std()))
    assert all(size == pytest.approx(sizes[0], rel=0.1) for size in sizes)
    wanted = INIT_SCALE * (F.silu(INIT_SCALE * torch.randn(10**6)) * INIT_SCALE * torch.randn(10**6)).std()
    for score, renormalise in (("softmax", False), ("softmax", True), ("sigmoid", False)):
        config = MixtureOfExperts.Config(experts=16, top_k=4, score=score, renormalise=renormalise, gamma="measured")
        assert float(_started(config, 64)(x_BTD).std()) == pytest.approx(float(wanted), rel=0.1)


def _started(config: Any, width: int) -> Any:
    module = MixtureOfExperts(config.resolved(width), width)
    with torch.no_grad():
        for owner, name in ((module, "up"), (module, "down"), (module.router, "weight")):
            owner.init_parameter(name, getattr(owner, name), torch.Generator().manual_seed(len(name)))
    return module.requires_grad_(False)


def test_zero_experts_by_chance_are_as_many() -> None:
    router = build(
        dtype=torch.float32, **{**ZERO, "zero_experts": 8, "experts": 8, "expected": 2.0}, random_zero=True
    ).router
    x_ND = torch.randn(4000, WIDTH)
    chosen_NK = router(x_ND).chosen_NK
    real_N = (chosen_NK < 8).sum(-1).double()
    assert float(real_N.mean()) == pytest.approx(2.0, abs=0.05) and float(real_N.std()) == pytest.approx(
        (2 / 3) ** 0.5, abs=0.05
    )
    assert torch.equal(chosen_NK, router(x_ND).chosen_NK)
    real = router.scores(x_ND)[1][:, :8].topk(3).indices
    assert all(set(c) - set(range(8, 16)) <= set(r) for c, r in zip(chosen_NK.tolist(), real.tolist()))
    assert chosen_NK[chosen_NK >= 8].bincount(minlength=16)[8:].double().std() < 40  # none is preferred


def test_the_gradient_at_the_probe_is_that_of_the_mean_probability() -> None:
    module, x_BTD = build(**ZERO, balance_over="micro_batch"), torch.randn(2, 9, WIDTH).double()
    module.router.gradient_tap = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    aux, weight = AuxOutputs(), torch.randn(2, 9, WIDTH).double()
    ((module(x_BTD, aux=aux) * weight).sum() + aux.losses[0]).backward()
    routing = module.router(x_BTD.flatten(0, 1))
    p_NC = (
        mixture(routing.chosen_NK, torch.ones_like(routing.gate_NK), 6) * module.router.scores(x_BTD.flatten(0, 1))[1]
    )
    p_NC = p_NC.detach().requires_grad_()
    (dense(module, x_BTD.flatten(0, 1), p_NC) * weight.flatten(0, 1)).sum().backward()
    wanted = (p_NC.grad * (p_NC > 0)).sum(0)
    assert torch.allclose(module.router.gradient_tap.grad, wanted, rtol=1e-10)
    ((_, counts, own),) = aux.counts
    said = module.router.diagnostics(counts, counts, own, wanted)
    alpha_f = 0.01 * module.router.forces(counts)
    assert float(said["r_g"]) == pytest.approx(float(alpha_f.norm() / wanted.norm()))
    assert float(said["r_g_centred"]) < float(said["r_g"]) and said["load"].shape == (4,)


# -- arms with a label ---------------------------------------------------------------------------------------------------


def test_what_exceeds_the_capacity_is_dropped_in_training_alone() -> None:
    module, x_BTD = (
        build("moe_capacity", experts=4, top_k=2, capacity=0.5, renormalise=False, hidden=16),
        torch.randn(2, 16, WIDTH).double(),
    )
    aux = AuxOutputs()
    got, routing = module(x_BTD, aux=aux), module.router(x_BTD.flatten(0, 1))
    gate_NC, seen = mixture(routing.chosen_NK, routing.gate_NK, 4).detach(), [0] * 4
    for row in gate_NC:
        for expert in row.nonzero().flatten().tolist():
            seen[expert] += 1
            row[expert] *= seen[expert] <= 8  # half of 32 · 2 / 4
    assert torch.allclose(got.flatten(0, 1), dense(module, x_BTD.flatten(0, 1), gate_NC), rtol=1e-10, atol=1e-12)
    lost = sum(max(0, n - 8) for n in seen)
    assert float(aux.metrics["dropped_share"]) == pytest.approx(lost / 64)
    assert float(aux.metrics["ffn_experts"]) == pytest.approx((64 - lost) / 32)
    counted, cost = count_flops(lambda: module(x_BTD)), module.cost(module.config, WIDTH, 16)
    assert cost.flops == 2 * (WIDTH * 4 + 1.0 * 3 * WIDTH * 16), "half of two experts a token, which nothing exceeds"
    assert counted == pytest.approx(32 * float(aux.metrics["forward_flops"])) and counted <= 32 * cost.flops
    plain = MixtureOfExperts.mix(module, x_BTD.flatten(0, 1), routing, None)
    assert torch.equal(module.eval()(x_BTD).flatten(0, 1), plain)


def test_experts_that_choose_tokens_are_not_causal_and_say_so_everywhere(corpus: Path, tmp_path: Path) -> None:
    module, x_BTD = build("moe_expert_choice", experts=4, top_k=2, hidden=16), torch.randn(1, 16, WIDTH).double()
    score_NC = module.router.scores(x_BTD[0])[1]
    gate_NC = torch.zeros_like(score_NC).scatter(0, score_NC.topk(8, dim=0).indices, 1.0) * score_NC
    assert torch.allclose(module(x_BTD)[0], dense(module, x_BTD[0], gate_NC), rtol=1e-10, atol=1e-12)
    changed = x_BTD.clone()
    changed[:, 8:] *= -3
    assert not torch.equal(module(changed)[:, :8], module(x_BTD)[:, :8])
    assert not feedforwards["moe_expert_choice"].capabilities.causal
    fields = run_fields(
        corpus, model={"feedforward": "moe_expert_choice"}, training={"tokens": 4 * 64}, allow_document_leaks=True
    )
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    assert train(folder.path, tmp_path / "cache")["reason"] == (
        "not causal: moe_expert_choice sees later tokens; moe_expert_choice sees the other documents of a row"
    )
    choice = {"model.feedforward": "moe_expert_choice", "allow_document_leaks": True}
    arms = {"moe": {"model.feedforward": "moe"}, "choice": choice}
    ablation = AblationConfig.parse(
        {
            "name": "leak",
            "base": run_fields(corpus),
            "arms": arms,
            "baseline": "moe",
            "tuning": {"trials": 0, "space": {}},
        }
    )
    mismatch = dict(cost_table(ablation).select("arm", "mismatch").iter_rows())
    assert mismatch == {"moe": "", "choice": "not causal, sees later tokens: moe_expert_choice"}


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_counts_every_choice_once(
    accumulate: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under accumulation, and where blocks are computed again in the backward pass; the loss sees the step so far."""
    steps: list[list[int]] = []
    late: list[int] = []
    monkeypatch.setattr(Router, "update_state", lambda self, counts, *rest: steps.append(counts.tolist()))
    monkeypatch.setattr(Router, "step_loss", lambda self, counts, own: late.append(int(counts.sum())))
    fields = run_fields(
        corpus,
        model={"feedforward": "moe", "depth": 1, "feedforwards": {"moe": {**ZERO, "bias": "sign"}}},
        training={"accumulate": accumulate, "recompute": True, "tokens": 6 * 64 * accumulate},
    )
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    train(folder.path, tmp_path / "cache")
    assert [sum(counts) for counts in steps] == [64 * accumulate * 3] * 6
    assert late == [64 * 3 * (i + 1) for _ in range(6) for i in range(accumulate)]
    said = folder.diagnostics()[-1]["values"]
    assert said["zero_share"] == pytest.approx(sum(steps[-1][4:]) / sum(steps[-1]))
    assert {
        "r_g",
        "r_g_centred",
        "router_cosine",
        "load",
        "max_violation_step",
        "max_violation_floor_recent",
        "dead_experts",
        "ffn_experts",
        "ffn_experts_sd",
        "routing_entropy",
        "top_k_mass",
        "zero_share",
        "bias_low",
    } <= said.keys()


def test_a_collapsed_router_is_told_and_ends_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Router, "select", lambda self, score_NC, _: torch.zeros_like(score_NC[:, :1], dtype=torch.int64)
    )
    model = {"feedforward": "swiglu moe", "feedforwards": {"moe": {"experts": 4, "top_k": 1}}}
    folder = make_run(tmp_path / "run", tmp_path / "cache", run_fields(corpus, model=model))
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "done" and result["reason"] == "router collapsed in layer 1: most experts get no token"
    said = folder.diagnostics()[-1]["values"]
    assert said["dead_experts"] == 3 and said["max_violation_recent"] == 3 and said["load"] == [4, 0, 0, 0]


def test_the_bias_goes_with_the_weights_in_full_precision(corpus: Path, tmp_path: Path) -> None:
    model = {"feedforward": "moe", "depth": 1, "feedforwards": {"moe": {**ZERO, "bias": "proportional"}}}
    fields = run_fields(corpus, model=model, training={"tokens": 8 * 64})
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    train(folder.path, tmp_path / "cache")
    weights = export(folder.path, tmp_path / "weights", cache=tmp_path / "cache", dtype="bf16")
    name = "blocks.0.feedforward.router.bias"
    trained = read_tensors(folder.path / "checkpoint" / "step-8")[f"model.{name}"]
    assert trained.dtype == torch.float32 and 0 < float(trained.abs().max()) < 1 and (trained[4:] == 0).all()
    assert torch.equal(read_tensors(weights)[name], trained)
    again = LanguageModel(ModelConfig.parse(fields["model"]), seed=1)
    assert initialise_from(again, weights) == [] and torch.equal(again.state_dict()[name], trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, r"experts: got 0; expected at least 1"),
        ({"experts": 0, "zero_experts": 4}, r"experts: got 0; .* Zero-computation experts alone"),
        (
            {"experts": 4, "zero_experts": 2, "top_k": 7},
            r"top_k: got 7; expected between 1 and experts=4 \+ zero_experts=2",
        ),
        (
            {"experts": 4, "zero_experts": 2, "top_k": 3, "expected": 3},
            r"expected: got 3.0; expected more than 1, less than",
        ),
        ({"expected": 1}, r"expected: got 1.0; expected top_k=2 where there are no zero_experts"),
        ({"hidden": 12}, r"hidden: got 12; .*pieces of 16 bytes. Nearest: 16"),
        ({"groups": 3}, r"groups: got 3; expected a divisor of experts=8"),
        ({"gamma": "closed", "score": "sigmoid"}, r"gamma: got 'closed with score=sigmoid.*Use gamma=measured"),
        ({"bias": "proportional", "bias_step": -0.2}, r"bias_step: got -0.2; expected more than 0"),
        ({"gamma": 0.0}, r"gamma: got 0.0; expected more than 0"),
        ({"gamma": "closed", "renormalise": False, "split": 0}, r"split: got 0; expected at least 1"),
        ({"experts": 40_000}, r"experts: got 40000; expected fewer than"),
        ({"random_zero": True}, r"random_zero: got True; expected false where there are no zero_experts"),
        ({"bias_step": 0.1}, r"bias_step: got 0.1; expected nothing where bias=none"),
        ({"z_weight": -1.0}, r"z_weight: got -1.0; expected 0 or more"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureOfExperts.Config.parse(settings).resolved(WIDTH)
    with pytest.raises(ConfigError, match=r"width: got 250; .*16 bytes. Nearest: 248"):
        MixtureOfExperts.Config().resolved(250)
