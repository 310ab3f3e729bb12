"""Layers that take tensors of earlier layers: keys and values, or the values of the first layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import decoded_together
from torch import Tensor

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import Shared
from workbench.decoding import Engine, Sampling
from workbench.decoding.policy import policies
from workbench.model import LanguageModel, ModelConfig
from workbench.model.roles import rescaling_pairs
from workbench.optimisers import optimisers
from workbench.transforms.base import transforms

T = 23
READER: dict[str, Any] = {"kind": "full", "shared_kv": True}
WINDOW_READER: dict[str, Any] = {"kind": "sliding", "window": 5, "shared_kv": True, "output_gate": "head"}
MODELS: dict[str, dict[str, Any]] = {
    "pairs": {"pattern": "full reader", "mixers": {"reader": READER}},
    "upper half": {
        "pattern": "sliding full reader reader",
        "mixers": {"sliding": {"window": 5}, "full": {"kv_heads": 1}, "reader": {**READER, "kv_heads": 1}},
    },
    "windows": {
        "pattern": "sliding reader reader reader",
        "mixers": {"sliding": {"window": 5}, "reader": WINDOW_READER},
    },
    "convolved keys": {
        "pattern": "full reader",
        "mixers": {"full": {"convolution": "keys", "softcap": 3.0}, "reader": {**READER, "sink": True}},
    },
    "value residual": {"mixers": {"full": {"value_residual": True, "exclusive": True}}},
    "values of a recurrent layer": {
        "pattern": "rwkv7 full",
        "at": {0: {"kind": "rwkv7", "head_dim": 16, "value_residual": False}},
        "mixers": {"rwkv7": {"head_dim": 16}},
    },
    "both": {
        "pattern": "full full reader reader",
        "mixers": {"full": {"value_residual": True}, "reader": READER},
        "residual": "hyper_connections",
        "mtp": {"mixer": "full"},
    },
}


def build(**fields: Any) -> LanguageModel:
    """In fp64, with no parameter at its initial value."""
    model = LanguageModel(ModelConfig.parse({"width": 64, "depth": 4, "vocabulary": 300, **fields}), seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(300, shape)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


every_model = pytest.mark.parametrize("name", MODELS)


def test_a_reader_attends_to_the_keys_and_values_of_the_layer_before() -> None:
    model = build(
        **{**MODELS["pairs"], "depth": 2, "mixers": {"full": {"rotary": False}, "reader": {**READER, "rotary": False}}}
    )
    seen: list[Tensor] = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda mixer, inputs, output: seen.extend((inputs[0], output)))
    model(ids(1, T))
    (x_giver, _, x_reader, y_reader), (giver, reader) = seen, (block.mixer for block in model.blocks)
    H, K = giver.H, giver.K
    _, k, v = (x_giver[0] @ giver.qkv.weight.T).view(T, 3 * H, K).split(H, dim=1)
    q = (x_reader[0] @ reader.q.weight.T).view(T, H, K)
    o = F.scaled_dot_product_attention(*(z.transpose(0, 1)[None] for z in (q, k, v)), is_causal=True)
    close(y_reader[0], o[0].transpose(0, 1).flatten(1) @ reader.out.weight.T)


def test_later_layers_mix_in_the_values_of_the_first_one() -> None:
    model = build(depth=3, mixers={"full": {"value_residual": True, "rotary": False}})
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda mixer, inputs, output: seen.append((inputs[0], output)))
    model(ids(1, T))
    values = [(x[0] @ b.mixer.qkv.weight.T).chunk(3, dim=1)[2] for (x, _), b in zip(seen, model.blocks)]
    for (x, y), own, block in zip(seen, values, model.blocks):
        mixer = block.mixer
        of_first, of_own = mixer.value_shares
        q, k, _ = (x[0] @ mixer.qkv.weight.T).chunk(3, dim=1)
        parts = (z.view(1, T, mixer.H, mixer.K).transpose(1, 2) for z in (q, k, of_first * values[0] + of_own * own))
        o = F.scaled_dot_product_attention(*parts, is_causal=True)
        close(y[0], o[0].transpose(0, 1).flatten(1) @ mixer.out.weight.T)


def test_later_layers_of_rwkv7_mix_in_the_values_of_the_first_one() -> None:
    """As published: without a share in the first layer, which takes none."""
    model, seen = build(**{**MODELS["values of a recurrent layer"], "pattern": "rwkv7", "depth": 3}), []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda mixer, inputs, output: seen.append((inputs[0], output)))
    assert model.config.sources == ({}, {"values of rwkv7": 0}, {"values of rwkv7": 0})
    assert not hasattr(model.blocks[0].mixer, "value_bias")
    model(ids(1, T))
    first = model.blocks[0].mixer
    given = first.v(first.mixtures(seen[0][0], None, None)["v"])
    for (x, y), block in list(zip(seen, model.blocks))[1:]:
        close(y, block.mixer(x, shared=Shared({"values of rwkv7": given})))
        assert (y - block.mixer(x)).norm() > 0.01 * y.norm()


@every_model
def test_prefill_and_decode_agree_with_the_full_pass(name: str) -> None:
    model, tokens = build(**MODELS[name]), ids(2, T)
    with torch.no_grad():
        full, caches = model(tokens), model.new_caches(2, T)
        pieces = [model(part, caches=caches) for part in tokens.split([7, 9, 1, 1, 1, 4], dim=1)]
        close(torch.cat(pieces, dim=1), full)


@every_model
def test_steps_of_sequences_of_different_lengths(name: str) -> None:
    model, lengths, steps = build(**MODELS[name]), (9, 3), 8
    sequences = [ids(1, length + steps) for length in lengths]
    for made, tokens, length in zip(decoded_together(model, sequences, lengths), sequences, lengths):
        with torch.no_grad():
            close(made, model(tokens)[:, length:])


@every_model
def test_documents_of_a_row_are_separate(name: str) -> None:
    model, tokens = build(**MODELS[name]), ids(2, T)
    packed = model(tokens, segments=(torch.arange(T) // 9).expand(2, T))
    close(packed, torch.cat([model(part) for part in tokens.split([9, 9, 5], dim=1)], dim=1))


@every_model
def test_parameters_and_cache_are_counted(name: str) -> None:
    model = build(**MODELS[name]).float()
    cost, caches = account(model.config, T, 4), model.new_caches(2, T)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert 2 * cost.cache_bytes == sum(tensor.nbytes for cache in caches for tensor in cache.tensors())


def test_pairs_of_layers_halve_the_cache() -> None:
    shared, plain = (account(build(**fields).config, T).cache_bytes for fields in (MODELS["pairs"], {}))
    assert 2 * shared == plain


@every_model
def test_recomputed_and_compiled_gradients_are_those_of_the_plain_pass(name: str) -> None:
    model, tokens = build(**MODELS[name]), ids(2, T)
    torch._dynamo.reset()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.loss(tokens, tokens).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.recompute = True
    assert all(map(torch.equal, gradients(), plain))
    for unit in model.units:
        unit.forward = torch.compile(unit.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for actual, expected in zip(gradients(), plain):
        close(actual, expected)


@every_model
def test_every_parameter_is_trained(name: str) -> None:
    model, tokens = build(**{**MODELS[name], "mtp": None}), ids(2, T)
    model.loss(tokens, tokens).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_model
def test_rescaling_pairs_keep_the_model(name: str) -> None:
    """Also those of layers whose tensors others read."""
    model, tokens = build(**MODELS[name]), ids(1, T)
    with torch.no_grad():
        before = model(tokens)
        for _, pair in rescaling_pairs(model):
            for parameter, factor in pair.factors(2.0 ** torch.randint(-3, 4, (len(pair.heads),)).double()):
                model.get_parameter(parameter).mul_(factor)
        close(model(tokens), before)


def test_score_factors_of_a_giver_leave_its_keys_alone() -> None:
    giver, reader = (block.mixer for block in build(**MODELS["pairs"]).blocks[:2])
    factors = giver.score_factors(torch.full((giver.H,), 0.25))["qkv.weight"].flatten()
    assert factors[: giver.H * giver.K].unique().tolist() == [0.25] and (factors[giver.H * giver.K :] == 1).all()
    assert "earlier layer" in str(reader.score_obstacle())


def test_a_cache_in_eight_bits_is_shared() -> None:
    model, tokens = build(**MODELS["pairs"]), ids(2, T)
    with torch.no_grad():
        caches = model.new_caches(2, T)
        assert [cache.store_in(torch.int8) for cache in caches] == [None] * 5
        pieces = torch.cat([model(part, caches=caches) for part in tokens.split([9] + [1] * 14, dim=1)], dim=1)
        full = model(tokens)
    assert 0 < (pieces - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("dtype", ["model", "int8"])
@pytest.mark.parametrize("name", ["pairs", "upper half", "windows"])
def test_a_step_reads_shared_rows_in_every_layer(name: str, dtype: Any) -> None:
    model, lengths = build(**MODELS[name]).float(), (9, 6)
    caches = Engine(model, cache_dtype=dtype).new_caches(2, T)
    for cache, block in zip(caches, model.blocks):
        mixer = block.mixer
        tokens = sum(min(length, mixer.window or length) for length in lengths)
        row_bytes = 2 * mixer.G * (4 * mixer.K if dtype == "model" else mixer.K + 4)  # eight bits, a step in fp32
        assert cache.step_bytes(lengths) == tokens * row_bytes


def test_the_bytes_of_a_step_count_shared_rows_in_every_layer() -> None:
    model, batch = build(**MODELS["pairs"]).float(), [ids(8).tolist(), ids(5).tolist()]
    metrics = Engine(model, stop_tokens=()).generate(batch, Sampling(max_tokens=3, temperature=0)).metrics
    mixer, untied = model.blocks[0].mixer, 0 if model.head is None else model.head.numel()
    used = sum(parameter.numel() for parameter in model.parameters()) - untied
    assert metrics.step_bytes == 4 * (used + 4 * (10 + 7) * 2 * mixer.G * mixer.K)


def test_inputs_of_convolutions_are_read_and_written() -> None:
    cache = build(**MODELS["convolved keys"]).new_caches(2, T)[0]
    assert cache.step_bytes((9, 6)) == cache.row_bytes((9, 6)) + 2 * 2 * 3 * 64 * 8


def test_a_policy_refuses_layers_that_share_keys() -> None:
    model, quest = build(**MODELS["pairs"]), policies["quest"]
    with pytest.raises(ConfigError, match="several layers read these"):
        quest(quest.Config()).check(model)


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        ({"pattern": "reader full", "mixers": {"reader": READER}}, "pattern", "layer 0"),
        ({"pattern": "sliding reader", "mixers": {"reader": READER}}, "pattern", "keys and values of full"),
        (
            {"pattern": "full reader", "mixers": {"reader": {**READER, "kv_heads": 1}}},
            "mixers.full.kv_heads",
            "as in layer 0",
        ),
        ({"pattern": "full reader", "mixers": {"reader": READER}, "mtp": {}}, "mtp.mixer", "a mixer with its own"),
        (
            {"pattern": "full reader", "mixers": {"reader": {**READER, "exclusive": True}}},
            "mixers.reader.shared_kv",
            "exclusive",
        ),
    ],
)
def test_what_cannot_be_built(fields: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(**fields)
    assert error.value.problems[0].path == path


def test_silent_copies_keep_the_sources_of_layers() -> None:
    """Interleaved, a reader would read the keys of the new layer before it."""
    adamw = optimisers["adamw"]
    source = build(**{**MODELS["pairs"], "depth": 2}).config
    for order, pattern in (("whole", "full reader"), ("interleaved", "full full reader reader")):
        stack = transforms["stack"](transforms["stack"].Config(new_out="zero", order=order), adamw(adamw.Config()))
        target = stack.target(source, source.changed(depth=4, pattern=pattern))
        if order == "interleaved":
            with pytest.raises(ConfigError, match="keys and values of full from the new layer"):
                stack.check(source, target)
        else:
            stack.check(source, target)


@pytest.mark.parametrize("pattern", ["a b rb a ra", "a ra ra b rb"])
def test_layers_that_read_the_nearest_keys_are_not_left_out_of_estimates(pattern: str) -> None:
    sizes = {"a": {"kind": "full", "heads": 2}, "b": {"kind": "full", "heads": 4}}
    readers = {f"r{name}": {**READER, **size} for name, size in sizes.items()}
    model = ModelConfig.parse({"width": 64, "depth": 5, "pattern": pattern, "mixers": {**sizes, **readers}})
    assert not model.repeats
    assert ModelConfig().repeats
