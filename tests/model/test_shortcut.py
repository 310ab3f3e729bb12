"""Shortcuts beside pairs of layers (ScMoE) against the equations written out, and everything a model must do with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ablation.cost.memory import activation_bytes
from workbench.accounting import account
from workbench.config import ConfigError
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
    """Pairs of layers after arXiv 2509.01322: r = h + A0(n0 h), v = r + F0(n1 r), w = v + A1(n2 v), out = w + F1(n3 w) + m,
    and m the mixture of experts of n1 r, or of n3 w. Norms, dense feed-forwards and experts are written out here."""
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


def test_the_baseline_is_one_switch_away() -> None:
    """Equal parameters, by name, shape and start; equal FLOPs; another function."""
    first, second = build(), build("second")
    a, b = (LanguageModel(model.config, seed=1).state_dict() for model in (first, second))
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
    costs = [account(model.config, 64) for model in (first, second)]
    assert costs[0] == costs[1]
    ids = tokens(1, 64)
    counted = [count_flops(lambda m=model: m.logits(m(ids))) for model in (first.float(), second.float())]
    assert counted[0] == counted[1]
    assert not torch.allclose(first(ids), second(ids), rtol=0.01)
    assert first.config.identity != second.config.identity != build(shortcut="swiglu").config.identity


def test_parameters_and_flops_are_counted() -> None:
    config = ModelConfig.parse({**FIELDS, "pattern": "full mla", "mixers": {}})
    model, T = LanguageModel(config, seed=0), 64
    cost = account(config, T)
    assert sum(p.numel() for p in model.parameters()) == cost.parameters
    # full attention makes every product of its square, and counts the causal ones
    plain = ModelConfig.parse({**FIELDS, "pattern": "full mla", "mixers": {}, "shortcut": ""})
    counted = [count_flops(lambda m=m: m(tokens(1, T))) for m in (model, LanguageModel(plain, seed=0))]
    assert counted[0] - counted[1] == T * (cost.forward_flops - account(plain, T).forward_flops) > 0


@pytest.mark.parametrize("source", ["first", "second"])
def test_decoding_packing_and_recomputation_change_nothing(source: str) -> None:
    model, ids = build(source), tokens(2, 24)
    wanted = model(ids)
    caches = model.new_caches(2, 24)
    with torch.no_grad():
        parts = [model(ids[:, :9], caches=caches), *(model(ids[:, t : t + 1], caches=caches) for t in range(9, 24))]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted.detach(), rtol=1e-10, atol=1e-10)
    ends = [0, 1, 10, 24]
    segments = torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)
    separate = torch.cat([model(ids[:, a:b]) for a, b in pairwise(ends)], dim=1)
    torch.testing.assert_close(model(ids, segments=segments), separate, rtol=1e-10, atol=1e-10)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
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


def test_memory_of_a_deep_model_is_traced_by_one_pair() -> None:
    def saved(depth: int, **fields: Any) -> int:
        model = {"shortcut": "moe", "width": 64, "vocabulary": 300, "depth": depth, **fields}
        return activation_bytes(RunConfig.parse({"model": model, "training": {"context": 64}}))

    for fields in ({"shortcut_from": "first"}, {"shortcut_from": "second"}):
        two, four, eight = (saved(depth, **fields) for depth in (2, 4, 8))
        assert eight - four == 2 * (four - two) > 0
        # a pair of another kind, traced on its own, keeps as much
        assert (
            saved(8, shortcut="moe other", feedforwards={"other": {"kind": "moe", "balance_weight": 0.02}}, **fields)
            == eight
        )


def test_a_shortcut_speaks_for_itself() -> None:
    config = ModelConfig.parse({**FIELDS, "depth": 4, "feedforward": "moe"})
    model = LanguageModel(config, seed=0)
    layer_aux = [AuxOutputs() for _ in (*model.blocks, *model.shortcuts)]
    model(tokens(2, 9), layer_aux=layer_aux)
    assert len(layer_aux) == 6 and all(len(aux.counts) == 1 and "routing_entropy" in aux.metrics for aux in layer_aux)


def test_spans_are_what_belongs_together() -> None:
    config = ModelConfig.parse({**FIELDS, "depth": 8})
    assert [len(span.layers) for span in config.spans] == [2] * 4
    assert config.with_spans(config.spans).identity == config.identity
    shrunken = config.with_spans(config.spans[1:2])
    assert shrunken.layers == config.layers[2:4] and shrunken.shortcuts == config.shortcuts[:1] and shrunken.depth == 2
    assert LanguageModel(shrunken, seed=0)(tokens(1, 5)).isfinite().all()
    plain = ModelConfig(depth=3)
    assert plain.spans == tuple(((layer,), None) for layer in plain.layers)
    assert plain.with_spans(plain.spans[:1]).depth == 1


def test_identity_of_models_without_shortcuts_is_what_it_was() -> None:
    assert ModelConfig().identity == "33a83af1c4af"
    assert ModelConfig(scale="340m", pattern="gdn gdn gdn full", feedforward="swiglu moe").identity == "c8cb435f349f"
    assert "shortcut" not in ModelConfig().canonical()
    assert "of layer" not in ModelConfig().describe()
    assert "of layer 0's feed-forward input" in ModelConfig(shortcut="moe").describe()


@pytest.mark.parametrize(
    ("changes", "path", "hint"),
    [
        ({"depth": 3}, "shortcut", "an even number of layers"),
        ({"shortcut": "mow"}, "shortcut", "'moe'"),
        ({"shortcut": "moe moe swiglu"}, "shortcut", "multiple of 6"),
        ({"shortcut": "", "shortcut_from": "second"}, "shortcut_from", "shortcut: moe"),
        ({"shortcut_from": "third"}, "shortcut_from", "'first' or 'second'"),
        ({"feedforwards": {"moe": {"top_k": 9}}}, "feedforwards.moe.top_k", "between 1 and"),
        ({"feedforwards": {"other": {"kind": "moe"}}}, "feedforwards.other", "no layer uses"),
    ],
)
def test_shortcuts_that_cannot_be_built(changes: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse({"shortcut": "moe", **changes})
    assert raised.value.problems[0].path == path
    assert hint in str(raised.value)
