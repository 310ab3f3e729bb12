"""Figures of what mixers read and cache."""

from __future__ import annotations

from typing import Any

from workbench.dashboards import attention as look
from workbench.evaluation.inspection import cache_table, reads, selected
from workbench.model import LanguageModel, ModelConfig


def layer(kind: str, **settings: Any) -> Any:
    config = ModelConfig(width=32, depth=1, vocabulary=16, pattern=kind, mixers={kind: settings})
    return LanguageModel(config, seed=0).blocks[0].mixer


def test_map_of_keys_by_query() -> None:
    assert look.reads_figure({"full": reads(layer("full"), 32, 20)}).data


def test_selected_blocks_have_one_map_a_group() -> None:
    table = selected(layer("asa_global", block=4, select_blocks=3, reuse=4), 32, 24)
    assert len(look.selected_figure(table).data) == 2


def test_cache_figure_has_a_dotted_line_only_where_eviction_saves_something() -> None:
    models = {"full": ModelConfig(), "sliding": ModelConfig(pattern="sliding")}
    assert len(look.cache_figure(cache_table(models, [32, 256])).data) == 3
