"""What training minimises beside the next token: the hidden z-loss, and the token after the next."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import HYBRID
from torch import Tensor

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import AuxOutputs
from workbench.model import LanguageModel, ModelConfig
from workbench.ops.hidden_z import hidden_z_floor, hidden_z_loss
from workbench.testing import count_flops
from workbench.testing.conformance import relative_error


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
    assert (
        float(hidden_z_loss(torch.zeros(3, 1024)))
        == pytest.approx(hidden_z_floor(1024))
        == pytest.approx(48.045, abs=1e-3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_z_sums_in_fp32_and_keeps_its_input_alone(dtype: torch.dtype) -> None:
    z = (torch.randn(5, 512) * 40).to(dtype).requires_grad_()  # exp(120) is beyond fp32
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = hidden_z_loss(z)
    assert sorted(t.numel() for t in kept) == [5, z.numel()] and value.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    assert float(value.detach()) == pytest.approx(float(reference(exact.detach())), rel=1e-5)
    (got,), (wanted,) = (torch.autograd.grad(y, x) for y, x in ((value, z), (reference(exact), exact)))
    assert got.dtype == dtype and relative_error(got.double(), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_the_head_predicts_the_token_after_the_next_within_documents() -> None:
    """Against every document by itself, position by position."""
    model, T = build(mtp={"weight": 0.3}), 24
    ids, ends = tokens(1, T + 1)[0], [0, 1, 3, 17, T]
    inputs, targets = ids[None, :-1], ids[None, 1:].clone()
    targets[:, 9] = -100  # nothing to predict from this one
    segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)
    aux = AuxOutputs(collect_metrics=False)
    model.loss(inputs, targets, segments=segments, objective_aux=aux)
    losses = []
    head = model.mtp
    for a, b in pairwise(ends):
        embedded, hidden = model._states(inputs[:, a:b], None, None, None)
        if b - a < 2:
            continue
        both = torch.cat((head.hidden_norm(hidden[:, :-1]), head.embedding_norm(embedded[:, 1:])), dim=-1)
        scores = model.logits(head.norm(head.block(head.project(both))))[0]
        for t in range(b - a - 1):
            if targets[0, a + t + 1] >= 0:  # which is token a + t + 2
                losses.append(-scores[t].log_softmax(-1)[targets[0, a + t + 1]])
    assert len(losses) == T - len(ends) + 1 - 1
    torch.testing.assert_close(
        aux.metrics["mtp_loss"], torch.stack(losses).mean(), rtol=1e-7, atol=0
    )  # weights are fp32
    torch.testing.assert_close(aux.losses[0], 0.3 * aux.metrics["mtp_loss"], rtol=1e-12, atol=0)


def test_further_losses_serve_training_alone() -> None:
    model, ids = build(mtp={"start": 0.5}, hidden_z=1e-3), tokens(2, 20)
    plain = build()
    shared = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("mtp.") for name in shared.missing_keys) and not shared.unexpected_keys
    assert torch.equal(model.token_losses(ids, ids.roll(-1, 1)), plain.token_losses(ids, ids.roll(-1, 1)))
    aux = AuxOutputs(collect_metrics=False)
    early = model.loss(ids, ids.roll(-1, 1), objective_aux=aux, progress=0.49)
    assert torch.equal(early, plain.loss(ids, ids.roll(-1, 1))) and set(aux.metrics) == {"hidden_z_excess"}
    excess = reference(model._states(ids, None, None, None)[1].flatten(0, 1)) - math.log(64) ** 2
    torch.testing.assert_close(aux.metrics["hidden_z_excess"], excess.detach(), rtol=1e-9, atol=0)
    late, aux = None, AuxOutputs(collect_metrics=False)
    gradients = []
    for recompute in (False, True):
        model.recompute, aux = recompute, AuxOutputs(collect_metrics=False)
        late = model.loss(ids, ids.roll(-1, 1), objective_aux=aux, progress=0.5)
        assert len(aux.losses) == 2 and set(aux.metrics) == {"mtp_loss", "hidden_z_excess"}
        gradients.append(torch.autograd.grad(late + sum(aux.losses), list(model.parameters())))
    assert torch.equal(late, early)
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients))


def test_the_head_is_counted_apart() -> None:
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
    counted = count_flops(lambda: model.loss(ids, ids, objective_aux=AuxOutputs(collect_metrics=False)))
    # on a CPU the last position, which has no target, costs no scores
    assert counted == pytest.approx(T * cost.training_flops / 3 - 2 * 300 * 64, rel=1e-9)
    half = account(with_head.changed(mtp=with_head.mtp.changed(start=0.5)), T)
    assert half.training_flops == pytest.approx((cost.training_flops + without.training_flops) / 2)


def test_what_is_off_leaves_the_identity_alone() -> None:
    plain = ModelConfig.parse(HYBRID)
    assert plain.changed(mtp=None, hidden_z=0.0).identity == plain.identity
    others = [plain.changed(mtp={}), plain.changed(mtp={"weight": 0.1}), plain.changed(hidden_z=1e-7)]
    assert len({plain.identity, *(other.identity for other in others)}) == 4
    assert plain.changed(mtp={"mixer": {"kind": "gdn", "chunk": 8}}).identity == others[0].identity
    assert "multi-token head" in others[0].describe() and "hidden z-loss, weight 1e-07" in others[2].describe()


@pytest.mark.parametrize(
    ("changes", "path", "hint"),
    [
        ({"mtp": {"weight": 0}}, "mtp.weight", "greater than 0"),
        ({"mtp": {"start": 1.0}}, "mtp.start", "less than 1"),
        ({"mtp": {"mixer": "ful"}}, "mtp.mixer.kind", "'full'"),
        (
            {"mtp": {"feedforward": {"kind": "swiglu", "hidden": 0}}},
            "mtp.feedforward.hidden",
            "greater than or equal to 1",
        ),
        ({"mtp": {"weigth": 1}}, "mtp.weigth", "'weight'"),
        ({"hidden_z": -1}, "hidden_z", "greater than or equal to 0"),
    ],
)
def test_objectives_that_cannot_be_built(changes: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse(changes)
    assert raised.value.problems[0].path == path
    assert hint in str(raised.value)
