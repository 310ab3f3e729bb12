"""Whole models: their size, their caches, how they start, and patterns that cannot be built."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.accounting import account
from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig
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
    held = sum(t.numel() * t.element_size() for cache in caches for t in cache.tensors())
    # fp64 caches; the recurrent state is accounted in fp32, so it is twice as large here
    state = sum(c.state_BHKV.numel() * 4 for c in caches if hasattr(c, "state_BHKV"))
    assert held == 2 * account(model.config, 24, element_bytes=8).cache_bytes + state


def test_tensors_that_two_models_share_start_equal() -> None:
    one, other = build(), build(pattern="full", mixers={}, feedforward="swiglu")
    a, b = one.state_dict(), other.state_dict()
    common = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert {"embedding.weight", "blocks.2.mixer.qkv.weight", "blocks.0.feedforward.up.weight"} <= set(common)
    assert all(torch.equal(a[name], b[name]) for name in common)
    assert not torch.equal(a["blocks.0.feedforward.up.weight"], a["blocks.2.feedforward.up.weight"])
    assert not torch.equal(a["embedding.weight"], LanguageModel(one.config, seed=2).state_dict()["embedding.weight"])


def test_weights_that_write_the_residual_start_smaller() -> None:
    state = build().state_dict()
    for name, fan_in in (
        ("blocks.2.mixer.out.weight", 64),
        ("blocks.0.mixer.out.weight", 64),
        ("blocks.0.feedforward.down.weight", None),
        ("blocks.1.feedforward.down", None),
    ):
        weight = state[name]
        fan = fan_in or (weight.shape[1])
        assert float(weight.std()) == pytest.approx(0.5 / fan**0.5 / 8**0.5, rel=0.1), name
    assert float(state["blocks.2.mixer.qkv.weight"].std()) == pytest.approx(0.5 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "path", "hint"),
    [
        ({"pattern": "slidng"}, "pattern", "'sliding'"),
        ({"pattern": "slidng", "mixers": {"sliding": {"window": 4}}}, "pattern", "'sliding'"),
        ({"feedforward": "mow"}, "feedforward", "'moe'"),
        ({"mixers": {"full": {"heads": 5}}}, "mixers.full.heads", "Nearest: 4"),
        ({"mixers": {"full": {"kv_heads": 3}}}, "mixers.full.kv_heads", "Nearest: 2"),
        ({"pattern": "sliding", "mixers": {"sliding": {"window": 0}}}, "mixers.sliding.window", "at least 1"),
        ({"pattern": "full gdn full"}, "pattern", "multiple of 3"),
        ({"mixers": {"sliding": {"window": 4}}}, "mixers.sliding", "no layer uses"),
        ({"at": {4: "gdn"}}, "at.4", "from 0 to 3"),
        ({"at": {-1: "gdn"}}, "at.-1", "from 0 to 3"),
        ({"at": {0: {"heads": 2}}}, "at.0.kind", "a registered mixer"),
        ({"at": {0: {"kind": "fulll"}}}, "at.0.kind", "'full'"),
        ({"at": {0: {"kind": []}}}, "at.0.kind", "a registered mixer"),
        ({"mixers": {"full": {"head": 2}}}, "mixers.full.head", "'heads'"),
        ({"pattern": " "}, "pattern", "at least one name"),
        ({"scale": "350m"}, "scale", "'340m'"),
        ({"depth": 10**9}, "depth", "less than or equal"),
        ({"feedforward": "moe", "feedforwards": {"moe": {"top_k": 9}}}, "feedforwards.moe.top_k", "between 1 and"),
    ],
)
def test_models_that_cannot_be_built(changes: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ModelConfig.parse(changes)
    assert raised.value.problems[0].path == path
    assert hint in str(raised.value)


def test_flops_are_counted() -> None:
    model, T = build(pattern="gdn", mixers={}, feedforward="moe"), 96
    counted = count_flops(lambda: model.logits(model(tokens(1, T))))
    assert counted == pytest.approx(account(model.config, T).forward_flops * T, rel=1e-9)
