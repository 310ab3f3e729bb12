"""Tables of what sequence mixers read and cache."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch

from workbench.evaluation.inspection import attention_weights, cache_table, layer_input, reads, selected
from workbench.model import LanguageModel, ModelConfig


def layer(kind: str, **settings: Any) -> Any:
    config = ModelConfig(width=32, depth=1, vocabulary=16, pattern=kind, mixers={kind: settings})
    return LanguageModel(config, seed=0).blocks[0].mixer


@pytest.mark.parametrize(
    ("kind", "settings", "keys"),
    [
        ("full", {}, lambda t: t + 1),
        ("sliding", {"window": 5}, lambda t: min(t + 1, 5)),
        # a query reads its own block whatever else
        (
            "nsa",
            {
                "branches": ["selection"],
                "compress": "mean",
                "select_block": 8,
                "compress_length": 8,
                "select_blocks": 1,
                "initial_blocks": 0,
                "local_blocks": 1,
            },
            lambda t: t % 8 + 1,
        ),
    ],
)
def test_exactly_the_keys_that_are_read_have_strength(kind: str, settings: dict[str, Any], keys: Any) -> None:
    table = reads(layer(kind, **settings), 32, 20)
    assert len(table) == 20 * 21 // 2
    counts = table.filter(pl.col("strength") > 0).group_by("query").len().sort("query")["len"].to_list()
    assert counts == [keys(t) for t in range(20)]


def test_selected_blocks_are_those_of_the_layer() -> None:
    table = selected(layer("asa_global", block=4, select_blocks=3, reuse=4), 32, 24)
    assert table.filter((pl.col("query") == 23) & (pl.col("group") == 0))["block"].to_list()[-1] == 5


def test_no_selected_block_begins_behind_its_query() -> None:
    table = selected(layer("asa_global", block=4, select_blocks=3, reuse=4), 32, 24)
    assert table.filter(pl.col("block") * 4 > pl.col("query")).is_empty()


def test_cache_table_counts_the_bytes_of_every_length() -> None:
    table = cache_table({"full": ModelConfig()}, [32, 256])
    assert table["bytes"].to_list() == [4 * 2 * 128 * 2 * n for n in (32, 256)]


@pytest.mark.parametrize("window", [None, 5])
def test_attention_weights_are_those_of_the_layer(window: int | None) -> None:
    kind, settings = ("full", {}) if window is None else ("sliding", {"window": window})
    heads = {"heads": 4, "kv_heads": 2, **settings}
    config = ModelConfig(width=32, depth=2, vocabulary=16, pattern=kind, mixers={kind: heads})
    model = LanguageModel(config, seed=0)
    tokens_T = torch.randint(16, (12,))
    inputs = layer_input(model, tokens_T, 1)
    mixer = model.blocks[1].mixer
    weights = attention_weights(mixer, inputs)
    assert len(weights) == 4
    with torch.no_grad():
        _, _, v_BTGK = mixer._project(inputs.x_BTD)
        outputs = []
        for head, table in enumerate(weights):
            w_TT = torch.zeros(12, 12)
            w_TT[table["query"].to_list(), table["key"].to_list()] = torch.tensor(table["strength"].to_list())
            outputs.append(w_TT @ v_BTGK[0, :, head // 2])
        expected = mixer(inputs.x_BTD)[0]
        torch.testing.assert_close(mixer.out(torch.cat(outputs, -1)), expected, atol=1e-5, rtol=1e-4)


def test_a_recurrent_mixer_has_no_attention_weights() -> None:
    mixer = layer("gdn")
    model = LanguageModel(ModelConfig(width=32, depth=1, vocabulary=16, pattern="gdn"), seed=0)
    assert attention_weights(mixer, layer_input(model, torch.arange(8), 0)) == []


def test_a_layer_that_takes_from_an_earlier_one_is_inspected_with_it() -> None:
    fields = {"full": {"value_residual": True}}
    model = LanguageModel(ModelConfig(width=32, depth=2, vocabulary=16, pattern="full", mixers=fields), seed=0)
    inputs = layer_input(model, torch.arange(8), 1)
    table = reads(model.blocks[1].mixer, 0, 0, inputs=inputs)
    assert len(table) == 36 and len(attention_weights(model.blocks[1].mixer, inputs)) > 0
