"""Shortcuts parallel to pairs of layers (ScMoE) against the equations, and everything a model must do with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ablation.cost.memory import activation_bytes
from workbench.accounting import account
from workbench.contract import AuxOutputs
from workbench.model import LanguageModel, ModelConfig
from workbench.testing import count_flops
from workbench.training.config import RunConfig

FIELDS: dict[str, Any] = {
    "width": 64,
    "depth": 4,
    "vocabulary": 300,
    "pattern": "full gdn sliding mla",
    "mixers": {"sliding": {"window": 5}, "gdn": {"chunk": 8}},
    "shortcut": "moe",
}


def build(source: str = "first", **changes: Any) -> LanguageModel:
    """A model in fp64 none of whose gains is 1."""
    model = LanguageModel(ModelConfig.parse({**FIELDS, "shortcut_from": source, **changes}), seed=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape)


def reference(model: LanguageModel, ids: Tensor) -> Tensor:
    """Pairs of layers as in arXiv 2509.01322, with norms, dense feed-forwards and experts written out:

    r = h + A0(n0 h), v = r + F0(n1 r), w = v + A1(n2 v), out = w + F1(n3 w) + m, m the experts of n1 r or of n3 w.
    """
    state = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def dense(x: Tensor, name: str) -> Tensor:
        gate, value = (x @ state[f"{name}.up.weight"].T).chunk(2, dim=-1)
        return (F.silu(gate) * value) @ state[f"{name}.down.weight"].T

    def experts(x: Tensor, name: str) -> Tensor:
        p = (x @ state[f"{name}.router.weight"].T).softmax(-1)
        gates = torch.zeros_like(p).scatter(-1, p.topk(2).indices, p.topk(2).values)
        gates = gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(state[f"{name}.up"], state[f"{name}.down"])):
            gate, value = (x @ up).chunk(2, dim=-1)
            y += gates[..., e, None] * ((F.silu(gate) * value) @ down)
        return y

    h = state["embedding.weight"][ids]
    for pair in range(2):
        one, two = (f"blocks.{2 * pair + i}" for i in range(2))
        mixers = [model.blocks[2 * pair + i].mixer for i in range(2)]
        r = h + mixers[0](norm(h, f"{one}.mixer_norm"))
        u = norm(r, f"{one}.feedforward_norm")
        v = r + dense(u, f"{one}.feedforward")
        w = v + mixers[1](norm(v, f"{two}.mixer_norm"))
        z = norm(w, f"{two}.feedforward_norm")
        m = experts(u if model.config.shortcut_from == "first" else z, f"shortcuts.{pair}")
        h = w + dense(z, f"{two}.feedforward") + m
    return norm(h, "norm")


@pytest.mark.parametrize("source", ["first", "second"])
def test_wiring_is_that_of_the_equations(source: str) -> None:
    model, ids = build(source), tokens(2, 21)
    torch.testing.assert_close(model(ids), reference(model, ids), rtol=1e-11, atol=1e-11)


def test_the_baseline_has_the_same_parameters() -> None:
    first, second = (LanguageModel(build(source).config, seed=1).state_dict() for source in ("first", "second"))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_baseline_costs_the_same() -> None:
    first, second = build(), build("second")
    assert account(first.config, 64) == account(second.config, 64)
    ids = tokens(1, 64)
    measured = [count_flops(lambda m=model: m.logits(m(ids))) for model in (first.float(), second.float())]
    assert measured[0] == measured[1]


def test_the_baseline_is_another_function() -> None:
    ids = tokens(1, 64)
    assert not torch.allclose(build()(ids), build("second")(ids), rtol=0.01)


def test_parameters_and_flops_are_counted() -> None:
    config = ModelConfig.parse({**FIELDS, "pattern": "full mla", "mixers": {}})
    model, T = LanguageModel(config, seed=0), 64
    cost = account(config, T)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters
    # full attention makes every product of its square, and counts the causal ones
    plain = ModelConfig.parse({**FIELDS, "pattern": "full mla", "mixers": {}, "shortcut": ""})
    measured = [count_flops(lambda m=m: m(tokens(1, T))) for m in (model, LanguageModel(plain, seed=0))]
    assert measured[0] - measured[1] == T * (cost.forward_flops - account(plain, T).forward_flops) > 0


@pytest.mark.parametrize("source", ["first", "second"])
def test_prefill_and_decode_are_the_full_pass(source: str) -> None:
    model, ids = build(source), tokens(2, 24)
    caches = model.new_caches(2, 24)
    with torch.no_grad():
        parts = [model(ids[:, :9], caches=caches), *(model(ids[:, t : t + 1], caches=caches) for t in range(9, 24))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", ["first", "second"])
def test_packed_is_separate(source: str) -> None:
    model, ids, ends = build(source), tokens(2, 24), [0, 1, 10, 24]
    segments = torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)
    separate = torch.cat([model(ids[:, a:b]) for a, b in pairwise(ends)], dim=1)
    torch.testing.assert_close(model(ids, segments=segments), separate, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("source", ["first", "second"])
def test_recomputation_changes_no_gradient(source: str) -> None:
    model, ids, gradients = build(source), tokens(2, 24), []
    for model.recompute in (False, True):
        gradients.append(torch.autograd.grad(model.loss(ids, ids.roll(-1, 1)), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_compiled_units_are_whole_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **settings: real(call, backend="aot_eager", **settings))
    torch._dynamo.reset()
    fields: dict[str, Any] = {"pattern": "full", "mixers": {}, "mtp": {}}
    plain, compiled, ids = build(**fields).float(), build(**fields).float(), tokens(2, 17)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks()
    losses = []
    for model in (compiled, plain):
        aux = AuxOutputs(collect_metrics=False)
        loss = model.loss(ids, ids.roll(-1, 1), objective_aux=aux)
        (loss + sum(aux.losses)).backward()
        losses.append(torch.stack([loss, *aux.losses]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def _activation_bytes(depth: int, **fields: Any) -> int:
    model = {"shortcut": "moe", "width": 64, "vocabulary": 300, "depth": depth, **fields}
    return activation_bytes(RunConfig.parse({"model": model, "training": {"context": 64}}))


@pytest.mark.parametrize("source", ["first", "second"])
def test_memory_grows_by_the_same_amount_with_every_pair(source: str) -> None:
    two, four, eight = (_activation_bytes(depth, shortcut_from=source) for depth in (2, 4, 8))
    assert eight - four == 2 * (four - two) > 0


@pytest.mark.parametrize("source", ["first", "second"])
def test_a_pair_of_another_kind_is_traced_by_itself(source: str) -> None:
    other = {"shortcut": "moe other", "feedforwards": {"other": {"kind": "moe", "balance_weight": 0.02}}}
    assert _activation_bytes(8, shortcut_from=source, **other) == _activation_bytes(8, shortcut_from=source)


def test_a_shortcut_has_auxiliary_outputs_of_its_own() -> None:
    model = LanguageModel(ModelConfig.parse({**FIELDS, "feedforward": "moe"}), seed=0)
    layer_aux = [AuxOutputs() for _ in range(4 + 2)]
    model(tokens(2, 9), layer_aux=layer_aux)
    assert [len(aux.counts) for aux in layer_aux] == [1] * 6
    assert all("routing_entropy" in aux.metrics for aux in layer_aux)
