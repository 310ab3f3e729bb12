"""Attention to the tokens that a learned index selects: against the definition, shared between layers, decoded,
trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import decoded_together
from torch import Tensor

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, mixers
from workbench.decoding import Engine, Sampling
from workbench.decoding.policy import policies
from workbench.model import LanguageModel, ModelConfig
from workbench.ops import token_index
from workbench.ops.sparse_attention import chunked as sparse_chunked
from workbench.ops.sparse_attention import operators
from workbench.ops.token_index.reference import (
    divergence_reference,
    index_scores,
    mean_attention,
    select_reference,
)
from workbench.testing import MixerConformance, relative_error

B, T, D = 2, 23, 64
SIZES: dict[str, Any] = {"index_heads": 3, "index_dim": 8, "kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "dsa": {"top_k": 6, **SIZES},
    "lsa": {"top_k": 9, "sink_tokens": 2, "window_tokens": 4, **SIZES},
}
READER: dict[str, Any] = {"kind": "lsa", "shared_index": True, **CASES["lsa"]}
LATENT: dict[str, Any] = {"top_k": 6, "latents": 2, "query_latent": 12, "index_heads": 3, "index_dim": 8}
LATENT_LSA: dict[str, Any] = {**LATENT, "top_k": 9, "sink_tokens": 2, "window_tokens": 4}
EVERY = {**CASES, "dsa_latent": LATENT, "lsa_latent": LATENT_LSA}
LATENT_READER: dict[str, Any] = {"kind": "lsa_latent", "shared_index": True, **LATENT_LSA}
MODELS: dict[str, dict[str, Any]] = {
    "pairs on latents": {
        "pattern": "lsa_latent reader",
        "mixers": {"lsa_latent": LATENT_LSA, "reader": LATENT_READER},
    },
    "latents": {"pattern": "dsa_latent", "mixers": {"dsa_latent": LATENT}},
    "dsa": {"pattern": "dsa", "mixers": {"dsa": CASES["dsa"]}},
    "pairs": {"pattern": "lsa reader", "mixers": {"lsa": CASES["lsa"], "reader": READER}},
    "one index": {"pattern": "lsa reader reader reader", "mixers": {"lsa": CASES["lsa"], "reader": READER}},
    "short": {"pattern": "dsa", "mixers": {"dsa": {**CASES["dsa"], "top_k": T}}},
}
every_model = pytest.mark.parametrize("name", MODELS)


def layer(name: str, **settings: Any) -> Any:
    return type("Suite", (MixerConformance,), {"name": name})().build(settings)  # type: ignore[attr-defined]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def model_of(**fields: Any) -> LanguageModel:
    """In fp64, with no parameter at its initial value."""
    model = LanguageModel(ModelConfig.parse({"width": D, "depth": 4, "vocabulary": 300, **fields}), seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(300, shape)


def projected(module: Any, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values of all heads (B, T, H, ·), those of latents expanded, and the factor of the scores."""
    if not hasattr(module, "project"):
        return *module._project(x_TD[None]), module.K**-0.5
    q_n, q_r, c, kr = module.project(x_TD[None])
    return torch.cat((q_n, q_r), dim=-1), *module.project.expanded(c, kr), module.project.scale


def scores_of(module: Any, x_TD: Tensor) -> Tensor:
    """(T, T) index scores by the definition."""
    source = module.project.query_source(x_TD[None]) if hasattr(module, "project") else None
    return index_scores(*(part[0] for part in module.index(x_TD[None], source)))


def selected(module: Any, x_TD: Tensor) -> list[list[int]]:
    """By the definition."""
    forced = {name: int(count) for name, count in module.forced.items()}
    return select_reference(scores_of(module, x_TD), module.top_k, **forced)


def attended(module: Any, x_TD: Tensor, tokens: list[list[int]]) -> Tensor:
    """Attention of every position to its tokens, by a mask."""
    *parts, scale = projected(module, x_TD)
    q, k, v = (part.transpose(1, 2) for part in parts)
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for t, seen in enumerate(tokens):
        mask[t, seen] = True
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=scale)
    return o[0].transpose(0, 1).flatten(1) @ module.out.weight.T


@pytest.mark.parametrize("name", EVERY)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    module, x_TD = layer(name, **EVERY[name]), random(T, D).requires_grad_()
    actual, expected = module(x_TD[None])[0], attended(module, x_TD, selected(module, x_TD))
    assert relative_error(actual, expected) < 1e-12
    weight, reached = random(T, D), {n: p for n, p in module.named_parameters() if not n.startswith("index.")}
    got, wanted = (torch.autograd.grad((y * weight).sum(), [x_TD, *reached.values()]) for y in (actual, expected))
    for parameter, a, b in zip(["x", *reached], got, wanted):
        assert relative_error(a, b) < 1e-11, parameter


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("warming_up", [False, True])
def test_the_loss_is_the_divergence_of_the_definition(name: str, warming_up: bool) -> None:
    module, x_TD, aux = layer(name, **EVERY[name], index_weight=0.5), random(T, D), AuxOutputs(warming_up=warming_up)
    y_TD = module(x_TD[None], aux=aux)[0]
    tokens = [list(range(t + 1)) for t in range(T)] if warming_up else selected(module, x_TD)
    q, k, _, scale = projected(module, x_TD)
    p_TT = mean_attention(q[0], k[0], tokens, scale)
    scores_TT = scores_of(module, x_TD)
    expected = 0.5 * divergence_reference(scores_TT, p_TT, tokens).mean()
    (loss,) = aux.losses
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-11)
    parameters = list(module.index.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        assert relative_error(a, b) < 1e-10
    assert relative_error(y_TD, attended(module, x_TD, tokens)) < 1e-12, "the warm-up attends densely"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("warming_up", [False, True])
def test_under_autocast_the_operators_have_what_the_kernels_compute(
    name: str, warming_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors in bf16: with others a GPU would take torch. The warm-up on latents attends without these operators."""
    module, x_BTD, factors = layer(name, **EVERY[name]).float(), torch.randn(B, T, D), []
    of_index, of_attention = token_index._implementation, operators._selected_implementation

    def index_implementation(index: token_index.IndexKeys, *attention: Tensor, chosen: int = 0) -> Any:
        factors.extend([index.q_BTJX, index.k_BSX, *attention])
        assert index.w_BTJ.dtype in (torch.bfloat16, torch.float32)
        return of_index(index, *attention, chosen=chosen)

    def attention_implementation(q: Tensor, v: Tensor | None, *sizes: int) -> Any:
        factors.extend([q] if v is None else [q, v])
        return of_attention(q, v, *sizes)

    monkeypatch.setattr(token_index, "_implementation", index_implementation)
    monkeypatch.setattr(operators, "_selected_implementation", attention_implementation)
    aux = AuxOutputs(warming_up=warming_up)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD = module(x_BTD, aux=aux)
    (y_BTD.float().sum() + sum(aux.losses)).backward()
    assert len(factors) >= 8
    assert {x.dtype for x in factors} == {torch.bfloat16}


@pytest.mark.parametrize("length", [1, 9, T])
def test_few_tokens_are_full_attention_bit_for_bit(length: int) -> None:
    full, x_BTD = layer("full", kv_heads=2, head_dim=16), random(B, length, D)
    for name, case in CASES.items():
        module = layer(name, **{**case, "top_k": T})
        module.load_state_dict(full.state_dict(), strict=False)
        assert torch.equal(module(x_BTD), full(x_BTD)), name
        pieces = [module.new_cache(B, length, "cpu", torch.float64), full.new_cache(B, length, "cpu", torch.float64)]
        sparse, dense = (
            torch.cat([mixer(part, cache=cache) for part in x_BTD.split([1] * length, dim=1)], dim=1)
            for mixer, cache in zip((module, full), pieces)
        )
        assert torch.equal(sparse, dense), name


def test_the_first_queries_attend_to_everything() -> None:
    full, sparse, x_BTD = layer("full", kv_heads=2, head_dim=16), layer("dsa", **CASES["dsa"]), random(B, T, D)
    sparse.load_state_dict(full.state_dict(), strict=False)
    k = sparse.top_k
    assert relative_error(sparse(x_BTD)[:, :k], full(x_BTD)[:, :k]) < 1e-12
    assert relative_error(sparse(x_BTD)[:, k:], full(x_BTD)[:, k:]) > 1e-3


def test_on_latents_few_tokens_are_latent_attention_bit_for_bit() -> None:
    sizes = {"latents": 2, "query_latent": 12}
    dense, x_BTD = layer("mla", **sizes), random(B, T, D)
    for name, case in (("dsa_latent", LATENT), ("lsa_latent", LATENT_LSA)):
        sparse = layer(name, **{**case, "top_k": T})
        sparse.load_state_dict(dense.state_dict(), strict=False)
        assert torch.equal(sparse(x_BTD), dense(x_BTD)), name


# -- layers that share an index --------------------------------------------------------------------------------------


def losses_of(model: LanguageModel, tokens: Tensor, **options: Any) -> tuple[Tensor, list[AuxOutputs]]:
    layer_aux = [AuxOutputs(collect_metrics=False, **options) for _ in model.blocks]
    return model.loss(tokens, tokens, layer_aux=layer_aux), layer_aux


@pytest.mark.parametrize("name", ["pairs", "one index", "pairs on latents"])
def test_readers_attend_to_the_tokens_of_the_index(name: str) -> None:
    model, seen = model_of(**MODELS[name]), []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda mixer, inputs, output: seen.append((mixer, inputs[0], output)))
    model(ids(1, T))
    for mixer, x_BTD, y_BTD in seen:
        if mixer.index is not None:
            tokens = selected(mixer, x_BTD[0])
        assert relative_error(y_BTD[0], attended(mixer, x_BTD[0], tokens)) < 1e-11


@pytest.mark.parametrize("warming_up", [False, True])
def test_an_index_learns_from_the_losses_of_all_its_layers(warming_up: bool) -> None:
    model, tokens = model_of(**MODELS["one index"]), ids(2, T)
    loss, layer_aux = losses_of(model, tokens, warming_up=warming_up)
    parameters = {n: p for n, p in model.named_parameters() if ".index." in n}
    assert {n.split(".")[1] for n in parameters} == {"0"}
    assert torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True) == (None,) * 5
    parts = [aux.losses[0] for aux in layer_aux]
    assert len({float(part.detach()) for part in parts}) == 4
    of_each = [torch.autograd.grad(part, list(parameters.values()), retain_graph=True) for part in parts]
    assert all(gradient.any() for gradients in of_each for gradient in gradients[:3])
    total = torch.autograd.grad(torch.stack(parts).sum(), list(parameters.values()))
    for summed, *each in zip(total, *of_each):
        assert relative_error(summed, sum(each)) < 1e-11
    others = [p for n, p in model.named_parameters() if n not in parameters]
    _, layer_aux = losses_of(model, tokens, warming_up=warming_up)
    reached = torch.autograd.grad(layer_aux[1].losses[0], others, allow_unused=True)
    assert all(gradient is None for gradient in reached), "the loss trains more than the index"


# -- documents, decoding, accounting ---------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@every_model
def test_prefill_in_pieces_and_decode_agree_with_the_full_pass(name: str) -> None:
    model, tokens = model_of(**MODELS[name]), ids(2, T)
    with torch.no_grad():
        full = model(tokens)
        for sizes in ([7, 9, 1, 1, 1, 4], [5, 1, 1, 1, 1, 1, 13], [T - 1, 1]):
            caches = model.new_caches(2, T)
            close(torch.cat([model(part, caches=caches) for part in tokens.split(sizes, dim=1)], dim=1), full)


@every_model
def test_steps_of_sequences_of_different_lengths(name: str) -> None:
    model, lengths, steps = model_of(**MODELS[name]), (9, 3), 8
    sequences = [ids(1, length + steps) for length in lengths]
    for made, tokens, length in zip(decoded_together(model, sequences, lengths), sequences, lengths):
        with torch.no_grad():
            close(made, model(tokens)[:, length:])


@pytest.mark.parametrize("name", ["dsa", "latents", "pairs", "pairs on latents"])
def test_sequences_decoded_together_do_not_influence_each_other(name: str) -> None:
    model, prompts = model_of(**MODELS[name]), [ids(length).tolist() for length in (11, 21, 17)]
    engine, greedy = Engine(model), Sampling(max_tokens=9, temperature=0)
    separate = [engine.generate([prompt], greedy).tokens[0] for prompt in prompts]
    assert engine.generate(prompts, greedy).tokens == separate
    assert Engine(model, prefill_tokens=8).generate(prompts, greedy).tokens == separate


@every_model
@pytest.mark.parametrize("warming_up", [False, True])
def test_documents_of_a_row_are_separate_in_outputs_and_losses(name: str, warming_up: bool) -> None:
    model, tokens = model_of(**MODELS[name]), ids(1, T)
    segments, lengths = (torch.arange(T) // 9)[None].clone(), [9, 9]
    segments[:, 18:] = -1  # padding
    packed = [AuxOutputs(warming_up=warming_up) for _ in model.blocks]
    hidden = model(tokens, segments=segments, layer_aux=packed)
    apart = [[AuxOutputs(warming_up=warming_up) for _ in model.blocks] for _ in lengths]
    parts = [model(part, layer_aux=aux) for part, aux in zip(tokens[:, :18].split(lengths, dim=1), apart)]
    close(hidden[:, :18], torch.cat(parts, dim=1))
    for index, aux in enumerate(packed):
        close(aux.losses[0], torch.stack([of[index].losses[0] for of in apart]).mean())


@every_model
def test_parameters_and_cache_are_counted(name: str) -> None:
    model = model_of(**MODELS[name])
    cost, caches = account(model.config, T, 8), model.new_caches(2, T)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert 2 * cost.cache_bytes == sum(tensor.nbytes for cache in caches for tensor in cache.tensors())


def test_a_layer_is_what_the_formulas_say() -> None:
    """DSA at 340m, 8,192 tokens, written out: the index scores every key of the queries behind the first top_k."""
    d, H, G, K, J, X, n, length = 1024, 16, 4, 64, 4, 64, 1024, 8192
    config = ModelConfig(scale="340m", pattern="dsa").layers[0].mixer
    cost = mixers["dsa"].cost(config, d, length)
    projected = (H + 2 * G) * K + J * X + X + J
    assert cost.parameters == d * projected + H * K * d + 2 * X
    assert cost.cache_bytes == length * (2 * G * K + X) * 2
    attended = sum(min(t, n) for t in range(1, length + 1)) / length
    scored = sum(t for t in range(n + 1, length + 1)) / length
    matrices = 2 * d * projected + 2 * H * K * d
    assert cost.flops == pytest.approx(matrices + 4 * H * K * attended + 2 * J * X * scored, rel=1e-12)


def test_a_step_reads_all_index_keys_and_the_selected_keys_and_values() -> None:
    module, row, index_row = layer("dsa", **CASES["dsa"]), 2 * 2 * 16 * 8, 8 * 8
    long, short = (module.new_cache(2, length, "cpu", torch.float64) for length in (40, 6))
    assert long.step_bytes([40, 3]) == (6 + 3) * row + 43 * index_row
    assert short.step_bytes([6, 3]) == 9 * row


def test_nothing_of_the_size_of_the_square_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    length, kept = 1024, []
    monkeypatch.setattr(sparse_chunked, "CHUNK_BYTES", 2**18)
    module = layer("dsa", **{**CASES["dsa"], "top_k": 32}).float()
    x_BTD, aux = torch.randn(1, length, D), AuxOutputs()

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y_BTD = module(x_BTD, aux=aux)
    (y_BTD.sum() + aux.losses[0]).backward()
    assert max(kept) <= length * 2 * D < length**2 / 4


def test_recomputed_and_compiled_gradients_are_those_of_the_plain_pass() -> None:
    model, tokens = model_of(**MODELS["pairs"], depth=2), ids(2, T)
    torch._dynamo.reset()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss, layer_aux = losses_of(model, tokens)
        (loss + sum(aux.losses[0] for aux in layer_aux)).backward()
        assert all(p.grad is not None for p in model.parameters())
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.recompute = True
    assert all(map(torch.equal, gradients(), plain))
    for unit in model.units:
        unit.forward = torch.compile(unit.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for actual, expected in zip(gradients(), plain):
        close(actual, expected)


def test_diagnostics_tell_what_the_index_finds() -> None:
    module, x_BTD = layer("dsa", **CASES["dsa"]), random(B, T, D)
    for warming_up in (False, True):
        aux = AuxOutputs(warming_up=warming_up)
        module(x_BTD, aux=aux)
        assert {"index_divergence", "index_recall", "index_mass"} == set(aux.metrics)
        assert 0 < float(aux.metrics["index_recall"].value) < 1 and 0 < float(aux.metrics["index_mass"].value) < 1
    short = AuxOutputs()
    module(x_BTD[:, :5], aux=short)
    assert set(short.metrics) == {"index_divergence"}, "every token is attended"


def test_gradient_descent_on_the_loss_finds_the_tokens_with_the_most_attention() -> None:
    """The attention of heads that agree, by an index that starts from noise."""
    torch.manual_seed(0)
    module, x_BTD = layer("dsa", top_k=8, index_heads=4, index_dim=16, rotary=False), random(4, 48, D)
    with torch.no_grad():
        module.qkv.weight.mul_(2)
    optimiser, recalls = torch.optim.Adam(module.index.parameters(), lr=1e-2), []
    for _ in range(150):
        aux = AuxOutputs(warming_up=True)
        module(x_BTD, aux=aux)
        recalls.append(float(aux.metrics["index_recall"].value))
        optimiser.zero_grad()
        aux.losses[0].backward()
        optimiser.step()
    assert recalls[-1] > 0.8 > 0.5 > recalls[0]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dsa", "latents"])
def test_policies_and_bounds_of_scores_refuse_it_by_name(name: str) -> None:
    model, quest = model_of(**MODELS[name]), policies["quest"]
    with pytest.raises(ConfigError, match="reads those that a learned index selects"):
        quest(quest.Config()).check(model)
    assert "selected tokens" in model.blocks[0].mixer.score_obstacle()
    assert model.new_caches(1, 8)[0].store_in(torch.int8) is not None


def test_a_parametrisation_refuses_a_base_with_another_index() -> None:
    base = {"width": 32, "mixers": {"dsa": {**CASES["dsa"], "index_dim": 4}}}
    with pytest.raises(ConfigError, match="index_dim"):
        model_of(**MODELS["dsa"], parametrisation={"kind": "mup", "base": base})
    model_of(**MODELS["dsa"], parametrisation={"kind": "mup", "base": {"width": 32}})


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        ({"pattern": "dsa", "mixers": {"dsa": {"top_k": 0}}}, "mixers.dsa.top_k", "greater than or equal to 1"),
        ({"pattern": "dsa", "mixers": {"dsa": {"index_dim": 7}}}, "mixers.dsa.index_dim", "multiple of 2"),
        (
            {"pattern": "dsa", "mixers": {"dsa": {"index_dim": 8, "index_rotary_dim": 10}}},
            "mixers.dsa.index_rotary_dim",
            "index_dim=8",
        ),
        ({"pattern": "dsa", "mixers": {"dsa": {"warm_up": 1.0}}}, "mixers.dsa.warm_up", "less than 1"),
        ({"pattern": "lsa", "mixers": {"lsa": {"top_k": 36}}}, "mixers.lsa.top_k", "Set top_k: 37 or more"),
        ({"pattern": "reader", "mixers": {"reader": READER}}, "pattern", "the index of lsa"),
        (
            {"pattern": "lsa reader", "mixers": {"lsa": CASES["lsa"], "reader": {**READER, "top_k": 10}}},
            "mixers.lsa.top_k",
            "9, as in layer 0",
        ),
        ({**MODELS["pairs"], "mtp": {}}, "mtp.mixer", "a mixer with its own"),
    ],
)
def test_what_cannot_be_built(fields: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        model_of(**fields)
    assert error.value.problems[0].path == path


def test_sizes_of_an_index_that_a_reader_lacks_are_no_part_of_the_model() -> None:
    other = {**MODELS["pairs"]["mixers"], "reader": {**READER, "index_heads": 7}}
    configs = [
        ModelConfig.parse({"width": D, "depth": 4, **MODELS["pairs"], **more}) for more in ({}, {"mixers": other})
    ]
    assert configs[0].identity == configs[1].identity
