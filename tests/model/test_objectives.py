"""Training objectives besides the next token: the hidden z-loss and the multi-token head."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import HYBRID
from torch import Tensor

from workbench.accounting import account
from workbench.contract import AuxOutputs
from workbench.model import LanguageModel, ModelConfig
from workbench.model.objectives import mtp_targets
from workbench.ops.hidden_z import hidden_z_floor, hidden_z_loss
from workbench.testing import count_flops, relative_error


def build(**changes: Any) -> LanguageModel:
    return LanguageModel(ModelConfig.parse({**HYBRID, **changes}), seed=1).double()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape)


def reference(z_ND: Tensor) -> Tensor:
    return z_ND.abs().exp().sum(-1).log().square().mean()


def test_hidden_z_is_its_definition_and_differentiates() -> None:
    z = (torch.randn(7, 24, dtype=torch.float64) * 3).requires_grad_()
    value = hidden_z_loss(z)
    torch.testing.assert_close(value, reference(z), rtol=1e-13, atol=0)
    wanted, got = (torch.autograd.grad(y * 0.7, z)[0] for y in (reference(z), value))
    assert relative_error(got, wanted) < 1e-13
    assert torch.autograd.gradcheck(hidden_z_loss, z)


def test_the_floor_of_hidden_z_is_reached_at_zero() -> None:
    assert float(hidden_z_loss(torch.zeros(3, 1024))) == pytest.approx(hidden_z_floor(1024))
    assert hidden_z_floor(1024) == pytest.approx(48.045, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_z_sums_in_fp32_and_keeps_its_input_and_two_numbers_a_token(dtype: torch.dtype) -> None:
    z = (torch.randn(5, 512) * 40).to(dtype).requires_grad_()  # exp(120) is beyond fp32
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = hidden_z_loss(z)
    assert sorted(t.numel() for t in kept) == [5, 5, z.numel()] and value.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    assert float(value.detach()) == pytest.approx(float(reference(exact.detach())), rel=1e-5)
    (got,), (wanted,) = (torch.autograd.grad(y, x) for y, x in ((value, z), (reference(exact), exact)))
    assert got.dtype == dtype and relative_error(got.double(), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        pytest.param(None, [6, 7, 8, -100], id="one document"),
        pytest.param([0, 0, 1, 1], [6, -100, 8, -100], id="two documents"),
    ],
)
def test_targets_of_the_multi_token_head(segments: list[int] | None, expected: list[int]) -> None:
    targets_BT = torch.tensor([[5, 6, 7, 8]])
    segments_BT = None if segments is None else torch.tensor([segments])
    assert mtp_targets(targets_BT, segments_BT).tolist() == [expected]


def test_the_head_predicts_the_token_after_the_next_within_documents() -> None:
    """Against every document by itself, position by position."""
    model, T = build(mtp={"weight": 0.3}), 24
    ids, ends = tokens(1, T + 1)[0], [0, 1, 3, 17, T]
    inputs, targets = ids[None, :-1], ids[None, 1:].clone()
    targets[:, 9] = -100  # not predicted
    segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)
    aux = AuxOutputs(collect_metrics=False)
    model.loss(inputs, targets, segments=segments, objective_aux=aux)
    losses = []
    head = model.mtp
    for a, b in pairwise(ends):
        embedded, hidden = model._states(inputs[:, a:b], None, None, None)
        if b - a < 2:
            continue
        joined = torch.cat((head.hidden_norm(hidden[:, :-1]), head.embedding_norm(embedded[:, 1:])), dim=-1)
        scores = model.logits(head.norm(head.block(head.project(joined))))[0]
        for t in range(b - a - 1):
            if targets[0, a + t + 1] >= 0:  # token a + t + 2
                losses.append(-scores[t].log_softmax(-1)[targets[0, a + t + 1]])
    assert len(losses) == T - len(ends) + 1 - 1
    torch.testing.assert_close(aux.metrics["mtp_loss"].value, torch.stack(losses).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(aux.losses[0], 0.3 * aux.metrics["mtp_loss"].value, rtol=1e-12, atol=0)


OBJECTIVES: dict[str, Any] = {"mtp": {"start": 0.5}, "hidden_z": 1e-3}


@pytest.fixture
def ids() -> Tensor:
    return tokens(2, 20)


def test_objectives_add_parameters_of_the_head_alone() -> None:
    loaded = build(**OBJECTIVES).load_state_dict(build().state_dict(), strict=False)
    assert all(name.startswith("mtp.") for name in loaded.missing_keys)
    assert not loaded.unexpected_keys


def test_objectives_change_no_evaluation(ids: Tensor) -> None:
    losses = [model.token_losses(ids, ids.roll(-1, 1)) for model in (build(**OBJECTIVES), build())]
    assert torch.equal(*losses)


@pytest.mark.parametrize(("progress", "metrics"), [(0.49, {"hidden_z_excess"}), (0.5, {"hidden_z_excess", "mtp_loss"})])
def test_the_head_is_trained_from_its_start(ids: Tensor, progress: float, metrics: set[str]) -> None:
    aux = AuxOutputs(collect_metrics=False)
    loss = build(**OBJECTIVES).loss(ids, ids.roll(-1, 1), objective_aux=aux, progress=progress)
    assert aux.metrics.keys() == metrics
    assert len(aux.losses) == len(metrics)
    assert torch.equal(loss, build().loss(ids, ids.roll(-1, 1)))


def test_hidden_z_is_that_of_the_last_block(ids: Tensor) -> None:
    model, aux = build(**OBJECTIVES), AuxOutputs(collect_metrics=False)
    model.loss(ids, ids.roll(-1, 1), objective_aux=aux, progress=0)
    excess = reference(model._states(ids, None, None, None)[1].flatten(0, 1)) - math.log(64) ** 2
    torch.testing.assert_close(aux.metrics["hidden_z_excess"].value, excess.detach(), rtol=1e-9, atol=0)


def test_recomputation_changes_no_gradient(ids: Tensor) -> None:
    model, gradients = build(**OBJECTIVES), []
    for model.recompute in (False, True):
        aux = AuxOutputs(collect_metrics=False)
        loss = model.loss(ids, ids.roll(-1, 1), objective_aux=aux)
        gradients.append(torch.autograd.grad(loss + sum(aux.losses), list(model.parameters())))
    for kept, recomputed in zip(*gradients):
        assert torch.equal(kept, recomputed)
        assert kept.abs().sum() > 0


def test_the_head_is_accounted_apart() -> None:
    settings = {
        "pattern": "gdn",
        "mtp": {"mixer": {"kind": "gdn", "chunk": 8}, "feedforward": {"kind": "swiglu", "hidden": 40}},
    }
    with_head, plain = (ModelConfig.parse({**HYBRID, **settings, **off}) for off in ({}, {"mtp": None}))
    model, T = LanguageModel(with_head, seed=0).requires_grad_(False), 64
    cost, without = account(with_head, T), account(plain, T)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters == without.parameters + cost.auxiliary
    assert (cost.non_embedding, cost.active, cost.forward_flops) == (
        without.non_embedding,
        without.active,
        without.forward_flops,
    )
    ids = tokens(1, T)
    measured = count_flops(lambda: model.loss(ids, ids, objective_aux=AuxOutputs(collect_metrics=False)))
    # on a CPU the last position, which has no target, costs no scores
    assert measured == pytest.approx(T * cost.training_flops / 3 - 2 * 300 * 64, rel=1e-9)
    half = account(with_head.changed(mtp=with_head.mtp.changed(start=0.5)), T)
    assert half.training_flops == pytest.approx((cost.training_flops + without.training_flops) / 2)
