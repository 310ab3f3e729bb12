"""Hierarchical search of a learned index: every step against a search written out in plain Python, in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import random_tokens, small_model
from torch import Tensor

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.decoding.policies.hierarchical import Hierarchical, HierarchicalCache
from workbench.evaluation import DecodingConfig
from workbench.evaluation.decoded import DecodedModel, Decoder
from workbench.mixers.families.indexed import IndexedCache
from workbench.model import LanguageModel
from workbench.ops.sparse_decoding.reference import indexer_score
from workbench.ops.token_index import IndexKeys

PROMPT, LENGTH = 21, 53
DSA = {"top_k": 7, "index_heads": 3, "index_dim": 8}
LSA = {**DSA, "kind": "lsa", "top_k": 9, "sink_tokens": 2, "window_tokens": 4}
MODELS: dict[str, dict[str, Any]] = {
    "dsa": {"pattern": "dsa", "mixers": {"dsa": DSA}},
    "latents": {"pattern": "dsa_latent", "mixers": {"dsa_latent": DSA}},
    "lsa": {"pattern": "own reader", "mixers": {"own": LSA, "reader": {**LSA, "shared_index": True}}},
    "lsa on latents": {
        "pattern": "own reader",
        "mixers": {
            "own": {**LSA, "kind": "lsa_latent"},
            "reader": {**LSA, "kind": "lsa_latent", "shared_index": True},
        },
    },
}
every_model = pytest.mark.parametrize("name", MODELS)
SMALL = {"candidates": 16, "block": 4}


def policy_for(model: LanguageModel, **fields: Any) -> Hierarchical:
    policy = Hierarchical(Hierarchical.Config.parse(fields))
    policy.prepare(model)
    return policy


@torch.no_grad()
def steps(model: LanguageModel, policy: Hierarchical | None, tokens_BT: Tensor) -> Iterator[tuple[Tensor, list[Any]]]:
    """Hidden states of every step after a prompt, and the caches."""
    caches = model.new_caches(len(tokens_BT), LENGTH, None if policy is None else policy.cache_for)
    model(tokens_BT[:, :PROMPT], caches=caches)
    positions_B = torch.full((len(tokens_BT),), PROMPT)
    for cache in caches:
        cache.step_from(positions_B)
    for token_B1 in tokens_BT[:, PROMPT:].split(1, dim=1):
        yield model(token_B1, caches=caches), caches
        positions_B += 1


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[IndexKeys, Tensor, Tensor]]:
    """Queries, index keys (B, S, X) and selected tokens (B, n) of every step and layer."""
    made: list[tuple[IndexKeys, Tensor, Tensor]] = []
    select = HierarchicalCache.select

    def recorded(self: Any, index: IndexKeys, lengths_B: Tensor, forced: Any) -> Tensor:
        tokens_Bn = select(self, index, lengths_B, forced)
        made.append((index, self.rows[-1][:, : int(lengths_B[0])].clone(), tokens_Bn))
        return tokens_Bn

    monkeypatch.setattr(HierarchicalCache, "select", recorded)
    return made


def best(scores: dict[int, float], first: set[int], count: int) -> list[int]:
    """``count`` numbers: those of ``first``, then by score, of equal ones the first."""
    return sorted(sorted(scores, key=lambda number: (number not in first, -scores[number], number))[:count])


def searched(
    q_JX: Tensor, w_J: Tensor, k_SX: Tensor, *, block: int, sub_block: int, count: int, top_k: int, **forced: int
) -> list[int]:
    """The tokens of one step."""
    length, sink, local = len(k_SX), forced["initial"], forced["local"]
    scores = dict.fromkeys(range(-(-length // block)), 0.0)
    for n, part in enumerate(k_SX.split(sub_block)):
        scores[n * sub_block // block] += indexer_score(q_JX, w_J, part.mean(0))
    kept = {s for s in range(length) if s < sink or s >= length - local}
    chosen = best(scores, {0, (length - 1) // block} | {s // block for s in kept}, count)
    inside = {s: indexer_score(q_JX, w_J, k_SX[s]) for s in range(length) if s // block in chosen}
    return best(inside, kept, top_k)


@every_model
@pytest.mark.parametrize("sub_block", [None, 2, 1])
def test_a_step_attends_to_the_best_tokens_of_the_best_blocks(
    name: str, sub_block: int | None, searches: list[tuple[IndexKeys, Tensor, Tensor]]
) -> None:
    model = small_model(**MODELS[name]).double()
    list(steps(model, policy_for(model, **SMALL, sub_block=sub_block), random_tokens(2, LENGTH)))
    mixer = model.blocks[0].mixer
    own = sum(block.mixer.index is not None for block in model.blocks)
    assert len(searches) == (LENGTH - PROMPT) * own, "a layer without an index does not search"
    settings = {"block": 4, "sub_block": sub_block or 4, "count": 4, "top_k": mixer.top_k, **mixer.forced}
    for index, k_BSX, tokens_Bn in searches:
        for b in range(2):
            expected = searched(index.q_BTJX[b, 0], index.w_BTJ[b, 0], k_BSX[b], **settings)
            assert [token for token in tokens_Bn[b].tolist() if token >= 0] == expected


def test_documents_are_measured_through_the_search() -> None:
    """With too few candidates losses are others than those of the layer; with all of them they are the same."""
    model = small_model(**MODELS["dsa"]).double()
    tokens_BT, segments = random_tokens(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.int64)
    losses = {}
    for name, policy in {"own": "dense", "all": {"candidates": 56, "block": 4}, "few": SMALL}.items():
        settings = policy if isinstance(policy, str) else {"kind": "hierarchical", **policy}
        decoder = Decoder(DecodingConfig.parse({"policy": settings, "prompt": PROMPT}), list)
        losses[name] = DecodedModel(model, decoder).token_losses(tokens_BT, tokens_BT.roll(-1, 1), segments=segments)
    assert torch.allclose(losses["all"], losses["own"]) and not torch.allclose(losses["few"], losses["own"])
    assert set(decoder.scores()["metric"]) >= {"tokens", "units", "bytes"}


@every_model
def test_candidates_of_every_block_are_the_steps_of_the_layer(name: str) -> None:
    """Bit by bit, as long as there are no more tokens than candidates; not beyond."""
    model, tokens_BT = small_model(**MODELS[name]).double(), random_tokens(2, LENGTH)
    candidates = 36
    pairs = zip(
        steps(model, policy_for(model, candidates=candidates, block=4), tokens_BT), steps(model, None, tokens_BT)
    )
    same = [torch.equal(actual, expected) for (actual, _), (expected, _) in pairs]
    assert all(same[: candidates - PROMPT]) and not all(same)


def test_no_more_tokens_than_a_layer_attends_are_all_attended() -> None:
    dense = small_model(pattern="dsa", mixers={"dsa": {**DSA, "top_k": LENGTH}}).double()
    policy, tokens_BT = policy_for(dense, candidates=56, block=4), random_tokens(2, LENGTH)
    with torch.no_grad():
        whole_BTD = dense(tokens_BT)
    for t, (hidden_B1D, _) in enumerate(steps(dense, policy, tokens_BT), PROMPT):
        torch.testing.assert_close(hidden_B1D[:, 0], whole_BTD[:, t], rtol=1e-10, atol=1e-12)


def test_what_a_step_reads_is_counted() -> None:
    model = small_model(**MODELS["dsa"])
    *_, (_, caches) = steps(model, policy_for(model, **SMALL, sub_block=2), random_tokens(2, LENGTH))
    read = caches[0].latest_read.tolist()
    row, key, blocks = 2 * 64 * 4, 8 * 4, -(-LENGTH // 4)  # keys and values of 64 channels, index keys of 8, in fp32
    candidates = 3 * 4 + LENGTH % 4
    assert read[:2] == [7, 4] and read[4:] == [7 * row + 2 * blocks * key + candidates * key, LENGTH * row, 0]
    assert caches[0].step_bytes((LENGTH, LENGTH)) == 2 * read[4]
    own = model.new_caches(2, LENGTH)[0]
    assert own.step_bytes((LENGTH, LENGTH)) == 2 * (7 * row + LENGTH * key)


def test_the_engine_reports_what_was_read() -> None:
    model = small_model(**MODELS["dsa"])
    prompts = [random_tokens(1, length)[0].tolist() for length in (40, 25)]
    metrics = Engine(model, policy={"kind": "hierarchical", **SMALL}, stop_tokens=()).generate(prompts).metrics
    means = metrics.reads.means()
    assert means["tokens"] == 7 and means["units"] == 4 and means["hit_rate"] is None
    assert 0 <= means["overlap"] <= 1 and metrics.reads.index_bytes > 0


def test_first_layers_may_search_everything() -> None:
    model = small_model(**MODELS["dsa"])
    caches = model.new_caches(1, 9, policy_for(model, **SMALL, flat_layers=1).cache_for)
    assert [type(cache) for cache in caches[:2]] == [IndexedCache, HierarchicalCache]
    with pytest.raises(ConfigError, match="flat_layers=2"):
        policy_for(model, **SMALL, flat_layers=2)


@pytest.mark.parametrize("pattern", ["full", "mla", "nsa", "gdn"])
def test_layers_without_a_learned_index_are_refused_by_name(pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"'hierarchical' for '{pattern}' in layer 0, 1.*learned index"):
        policy_for(small_model(pattern=pattern))


def test_layers_beside_those_with_an_index_keep_their_cache() -> None:
    model = small_model(pattern="dsa full", mixers={"dsa": DSA})
    caches = model.new_caches(1, 9, policy_for(model, **SMALL).cache_for)
    assert isinstance(caches[0], HierarchicalCache) and type(caches[1]) is type(model.new_caches(1, 9)[1])


def test_candidates_are_at_least_what_a_layer_attends() -> None:
    model = small_model(**MODELS["dsa"])
    with pytest.raises(ConfigError, match="at least 8: the layer attends top_k=7"):
        policy_for(model, candidates=4, block=4)
    with pytest.raises(ConfigError, match=r"at least 32: .* 2 blocks of 16 are always searched"):
        policy_for(model, candidates=16, block=16)
    policy_for(model, candidates=8, block=4)


def test_blocks_of_tokens_that_are_always_selected_fit() -> None:
    model = small_model(pattern="lsa", mixers={"lsa": {**LSA, "top_k": 8}})
    with pytest.raises(ConfigError, match="at least 12"):  # a window of 4 tokens overlaps two blocks, the first one
        policy_for(model, candidates=8, block=4)
    policy_for(model, candidates=12, block=4)


@pytest.mark.parametrize(("fields", "path"), [({"sub_block": 3}, "sub_block"), ({"candidates": 18}, "candidates")])
def test_settings_that_contradict_each_other(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        Hierarchical.Config.parse({**SMALL, **fields})


@pytest.mark.gpu
def test_on_a_gpu_kernels_search_as_plain_torch_does() -> None:
    from workbench.ops.dispatch import force_backend

    model, tokens_BT = small_model(**MODELS["lsa"]).cuda(), random_tokens(2, 40).cuda()
    policy = policy_for(model, **SMALL, sub_block=2)
    made = []
    for backend in ("torch", "triton"):
        with force_backend(backend):
            engine = Engine(model, policy=policy, stop_tokens=())
            made.append(engine.generate(tokens_BT.tolist(), Sampling(max_tokens=40, temperature=0)).tokens)
    assert made[0] == made[1]
