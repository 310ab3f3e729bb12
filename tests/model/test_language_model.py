"""Whole models: parameters, FLOPs, packed documents, decoding, initial values."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.accounting import account
from workbench.model import LanguageModel, ModelConfig
from workbench.model.initialise import initialise
from workbench.testing import count_flops

MIXED: dict[str, Any] = {
    "width": 64,
    "depth": 4,
    "vocabulary": 300,
    "pattern": "gdn sliding full short",
    "feedforward": "swiglu moe",
    "mixers": {"sliding": {"window": 5}, "short": {"kind": "sliding", "window": 1, "kv_heads": 1}, "gdn": {"chunk": 8}},
}


def build(**changes: Any) -> LanguageModel:
    return LanguageModel(ModelConfig.parse({**MIXED, **changes}), seed=1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape)


@pytest.mark.parametrize(
    ("scale", "tied", "parameters"),
    [
        ("tiny", True, 1_066_112),
        ("tiny", False, 1_066_112 + 128 * 2048),
        ("340m", True, 341_099_520),
        ("340m", False, 341_099_520 + 1024 * 32_000),
        ("1.3b", True, 1_298_761_728),
        ("1.3b", False, 1_298_761_728 + 2048 * 32_000),
    ],
)
def test_named_scales(scale: str, tied: bool, parameters: int) -> None:
    config = ModelConfig(scale=scale, tied=tied)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == account(config, 2048).parameters == parameters


@pytest.mark.parametrize("scale", ["tiny", "340m", "1.3b"])
@pytest.mark.parametrize("pattern", ["sliding", "gdn gdn gdn full"])
def test_other_patterns_are_counted(scale: str, pattern: str) -> None:
    config = ModelConfig(scale=scale, pattern=pattern, feedforward="swiglu moe")
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == account(config, 2048).parameters


def test_packed_is_separate() -> None:
    model, ids = build().double(), tokens(1, 40)
    ends = [0, 1, 17, 18, 40]
    segments = torch.cat([torch.full((1, b - a), i) for i, (a, b) in enumerate(pairwise(ends))], dim=1)
    separate = torch.cat([model(ids[:, a:b]) for a, b in pairwise(ends)], dim=1)
    torch.testing.assert_close(model(ids, segments=segments), separate, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 5, 8, 23])
def test_prefill_and_decode_are_the_full_pass(cut: int) -> None:
    model, ids = build().double(), tokens(2, 24)
    caches = model.new_caches(2, 24)
    with torch.no_grad():
        parts = [model(ids[:, :cut], caches=caches), *(model(ids[:, t : t + 1], caches=caches) for t in range(cut, 24))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-10, atol=1e-10)


def test_caches_have_the_accounted_size() -> None:
    model = build().double()
    caches = model.new_caches(2, 24)
    model(tokens(2, 24), caches=caches)
    measured = sum(t.numel() * t.element_size() for cache in caches for t in cache.tensors())
    # fp64 caches; the recurrent state is accounted in fp32, so it is twice as large here
    state = sum(c.state_BHKV.numel() * 4 for c in caches if hasattr(c, "state_BHKV"))
    assert measured == 2 * account(model.config, 24, element_bytes=8).cache_bytes + state


def test_tensors_that_two_models_share_start_equal() -> None:
    one, other = build(), build(pattern="full", mixers={}, feedforward="swiglu")
    a, b = one.state_dict(), other.state_dict()
    common = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert {"embedding.weight", "blocks.2.mixer.qkv.weight", "blocks.0.feedforward.up.weight"} <= set(common)
    assert all(torch.equal(a[name], b[name]) for name in common)


def test_equal_tensors_of_two_layers_start_differently() -> None:
    state = build().state_dict()
    assert not torch.equal(state["blocks.0.feedforward.up.weight"], state["blocks.2.feedforward.up.weight"])


def test_another_seed_starts_differently() -> None:
    one, other = (LanguageModel(ModelConfig.parse(MIXED), seed=seed).state_dict() for seed in (1, 2))
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


def test_a_module_without_initial_values_is_named() -> None:
    model = build()
    model.norm.init_parameter = None
    with pytest.raises(TypeError, match=r"norm.weight: RMSNorm owns parameters but has no init_parameter"):
        initialise(model, 0)


@pytest.mark.parametrize(
    ("name", "fan_in"),
    [
        ("blocks.2.mixer.out.weight", 64),
        ("blocks.0.mixer.out.weight", 64),
        ("blocks.0.feedforward.down.weight", None),
        ("blocks.1.feedforward.down", None),
    ],
)
def test_weights_that_write_the_residual_stream_start_smaller(name: str, fan_in: int | None) -> None:
    weight = build().state_dict()[name]
    fan_in = fan_in or weight.shape[1]
    assert float(weight.std()) == pytest.approx(0.5 / fan_in**0.5 / 8**0.5, rel=0.1)


def test_other_weights_start_by_their_fan_in() -> None:
    assert float(build().state_dict()["blocks.2.mixer.qkv.weight"].std()) == pytest.approx(0.5 / 8, rel=0.1)


def test_flops_are_counted() -> None:
    model, T = build(pattern="gdn", mixers={}, feedforward="moe"), 96
    measured = count_flops(lambda: model.logits(model(tokens(1, T))))
    assert measured == pytest.approx(account(model.config, T).forward_flops * T, rel=1e-9)
