"""What steps read: counts and bytes by hand, overlap and hits of known choices, the engine's metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_tokens, small_model

from workbench.config import ConfigError
from workbench.decoding import Engine, Sampling
from workbench.decoding.reads import ReadLog

GREEDY = Sampling(max_tokens=5, temperature=0)
HEADS: dict[str, Any] = {"mixers": {"full": {"heads": 4, "kv_heads": 2}}}
FORCED = {"sink": 0, "local": 1}


def reads(fields: dict[str, Any], prompts: list[list[int]], **model: Any) -> ReadLog:
    return Engine(small_model(**(model or HEADS)), policy=fields).generate(prompts, GREEDY).metrics.reads


def test_streaming_reads_its_tokens_and_no_index() -> None:
    """Keys and values of 2 groups of 16 channels in fp32; steps at lengths 10 to 13."""
    log = reads({"kind": "streaming", "tokens": 6, "sink": 2}, random_tokens(3, 9).tolist())
    table = log.table()
    assert table["tokens"].to_list() == [6.0] * 8
    assert table["bytes"].to_list() == [6 * 2 * 2 * 16 * 4] * 8
    assert table.filter(layer=1)["dense_bytes"].to_list() == [length * 2 * 2 * 16 * 4 for length in (10, 11, 12, 13)]
    assert table["step"].to_list() == [1, 1, 2, 2, 3, 3, 4, 4]
    # of the newest 4 tokens 3 were read before, as were the first 2
    assert log.means()["overlap"] == pytest.approx(5 / 6)
    assert log.means()["hit_rate"] is None


def test_quest_reads_its_blocks_and_all_summaries() -> None:
    log = reads({"kind": "quest", "tokens": 8, "block": 4, **FORCED}, random_tokens(2, 9).tolist())
    row = log.table().row(0, named=True)  # 10 tokens: two blocks and a half
    assert row["units"] == 2
    summaries = 3 * 2 * 2 * 16 * 4
    assert row["bytes"] == pytest.approx(row["tokens"] * 2 * 2 * 16 * 4 + summaries)


def test_two_levels_read_summaries_codes_of_candidates_and_tokens() -> None:
    fields = {"kind": "two_level", "tokens": 3, "candidates": 8, "block": 4, "channels": "all", **FORCED}
    row = reads(fields, random_tokens(1, 16).tolist()).table().row(0, named=True)
    # 17 tokens, the newest alone in its block: summaries of 5 blocks, codes of the 8 tokens of the prompt's blocks and
    # of the newest, 3 tokens
    summaries, codes, tokens = 5 * 2 * 2 * 16 * 4, 9 * 2 * (8 + 2), 3 * 2 * 2 * 16 * 4
    assert row["bytes"] == pytest.approx(summaries + codes + tokens)


def test_latents_are_counted_per_group() -> None:
    log = reads({"kind": "streaming", "tokens": 6}, random_tokens(1, 9).tolist(), pattern="mla")
    mixer: Any = small_model(pattern="mla").blocks[0].get_submodule("mixer")
    assert log.means()["bytes"] == 6 * (mixer.project.C + mixer.project.R) * 4


def test_blocks_that_stay_are_hits() -> None:
    """With every block searched, all but a new one were resident."""
    fields = {"kind": "two_level", "tokens": 3, "candidates": 32, "block": 4, "channels": "all", **FORCED}
    table = reads(fields, random_tokens(1, 15).tolist()).table().filter(layer=0)
    assert table["hit_rate"].to_list() == [1.0] * 4
    assert table["overlap"].to_list() == pytest.approx([1.0, 4 / 5, 1.0, 1.0])  # token 17 begins block 5


def test_sequences_weigh_equally() -> None:
    """Two prompts of 9 tokens and one of 3, whose steps read at most 4 to 7 tokens."""
    prompts = [*random_tokens(2, 9).tolist(), *random_tokens(1, 3).tolist()]
    means = reads({"kind": "streaming", "tokens": 6}, prompts).means()
    assert means["tokens"] == pytest.approx((2 * 6 + (4 + 5 + 6 + 6) / 4) / 3)


def test_dense_decoding_has_no_reads() -> None:
    log = reads({"kind": "dense"}, random_tokens(1, 9).tolist())
    assert log.means() == {} and log.summary(1) == "" and log.table().height == 0


def test_indices_are_counted_among_the_caches() -> None:
    model, prompts = small_model(**HEADS), random_tokens(2, 9).tolist()
    fields = {"kind": "two_level", "tokens": 3, "candidates": 8, "block": 4, "channels": "all", **FORCED}
    dense, sparse = (Engine(model, policy=policy).generate(prompts, GREEDY).metrics for policy in ("dense", fields))
    assert sparse.cache_bytes == dense.cache_bytes + sparse.reads.index_bytes
    # a layer, 2 sequences of 14 tokens: summaries of 4 blocks, codes and steps, previous blocks, channels, counters of
    # two operators and of these numbers
    state = 2 * (4 * 2 * 2 * 16 * 4) + 2 * 14 * 2 * (8 + 2) + 2 * 2 * 2 * 8 + 2 * 16 * 8 + 2 * (2 * 4 * 4) + 4
    assert sparse.reads.index_bytes == 2 * state


def test_the_summary_names_shares() -> None:
    fields = {"kind": "two_level", "tokens": 3, "candidates": 8, "block": 4, "channels": "all", **FORCED}
    metrics = Engine(small_model(**HEADS), policy=fields).generate(random_tokens(1, 9).tolist(), GREEDY).metrics
    line = metrics.reads.summary(metrics.cache_bytes)
    assert line.startswith("a layer's step attends to 3 tokens, reads ")
    assert "overlap" in line and "hit rate" in line and "% of the caches" in line


def test_layers_with_a_window_keep_their_cache() -> None:
    log = reads({"kind": "streaming", "tokens": 6}, random_tokens(1, 9).tolist(), pattern="sliding full")
    assert set(log.table()["layer"]) == {1}


def test_first_layers_may_stay_dense() -> None:
    log = reads({"kind": "streaming", "tokens": 6, "dense_layers": 1}, random_tokens(1, 9).tolist())
    assert set(log.table()["layer"]) == {1}


def test_a_policy_that_changes_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Engine(small_model(pattern="sliding gdn"), policy="streaming")
    assert str(error.value).splitlines() == [
        "policy: got 'streaming' for 'sliding' in layer 0; expected attention to all tokens; a window already bounds "
        "what this layer reads.",
        "policy: got 'streaming' for 'gdn' in layer 1; expected attention to all tokens; what this layer reads is part "
        "of its definition.",
    ]


def test_a_policy_with_only_dense_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'streaming' for 'full' in layer 0, 1; expected a layer behind the first"):
        Engine(small_model(), policy={"kind": "streaming", "dense_layers": 2})


def test_a_full_cache_is_refused() -> None:
    model = small_model()
    caches = model.new_caches(1, 4, Engine(model, policy="streaming").policy.cache_for)
    with torch.no_grad():
        model(random_tokens(1, 4), caches=caches)
        with pytest.raises(ValueError, match="cache: got 5 tokens; expected at most 4"):
            model(random_tokens(1, 1), caches=caches)
