"""Steps replayed from a CUDA graph, and compiled steps, against eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import case_models, decoding_models, random_tokens, small_model

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling

pytestmark = pytest.mark.gpu

GREEDY = Sampling(max_tokens=40, temperature=0)
POLICIES: dict[str, dict[str, Any]] = {
    "quest": {"kind": "quest", "tokens": 16, "block": 4, "sink": 1, "local": 2},
    "two_level": {
        "kind": "two_level",
        "tokens": 8,
        "candidates": 16,
        "block": 4,
        "sink": 1,
        "local": 2,
        "channels": "all",
    },
    "streaming": {"kind": "streaming", "tokens": 8, "sink": 2},
    "hierarchical": {"kind": "hierarchical", "candidates": 16, "block": 4, "sub_block": 2},
}


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(length).tolist() for length in lengths]


def both(model: torch.nn.Module, sampling: Sampling, **options: Any) -> list[list[list[int]]]:
    batch = prompts(21, 17, 33)
    return [Engine(model, graphs=graphs, **options).generate(batch, sampling).tokens for graphs in ("off", "on")]


@pytest.mark.parametrize("name", decoding_models())
def test_a_graph_makes_the_same_tokens(name: str) -> None:
    eager, replayed = both(small_model(**case_models()[name]).cuda(), GREEDY)
    assert replayed == eager


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_makes_the_same_tokens_and_reads_under_a_policy(policy: str) -> None:
    attention = "dsa" if policy == "hierarchical" else "full"
    settings = {"pattern": f"{attention} gdn", "mixers": {"dsa": {"top_k": 7}} if attention == "dsa" else {}}
    model, batch = small_model(**settings).cuda(), prompts(21, 17)
    results = [
        Engine(model, policy=POLICIES[policy], graphs=graphs).generate(batch, GREEDY) for graphs in ("off", "on")
    ]
    assert results[0].tokens == results[1].tokens
    assert results[0].metrics.reads.table().equals(results[1].metrics.reads.table())


def test_a_graph_draws_the_same_samples() -> None:
    eager, replayed = both(small_model(pattern="full gdn").cuda(), Sampling(max_tokens=40, seed=3, top_k=20))
    assert replayed == eager


@pytest.mark.parametrize("pattern", ["full gdn", "nsa kda", "asa_local asa_global", "moba mla"])
def test_compiled_steps_make_the_same_tokens(pattern: str) -> None:
    model, batch = small_model(pattern=pattern).cuda(), prompts(21, 17)
    eager = Engine(model, graphs="off").generate(batch, GREEDY).tokens
    assert Engine(model, graphs="on", compiled=True).generate(batch, GREEDY).tokens == eager


def test_a_layer_that_waits_for_the_device_is_refused() -> None:
    model = small_model(feedforward="moe", feedforwards={"moe": {"backend": "loop"}}).cuda()
    with pytest.raises(ConfigError, match=r"graphs: .*backend: loop"):
        Engine(model, graphs="on")
