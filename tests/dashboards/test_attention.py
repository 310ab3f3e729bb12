"""Figures of what mixers read and cache draw their tables."""

from __future__ import annotations

import polars as pl

from workbench.dashboards.figures.attention import cache_figure, reads_figure, selected_figure


def test_one_map_per_mixer() -> None:
    table = pl.DataFrame({"query": [0, 1, 1], "key": [0, 0, 1], "strength": [1.0, 0.5, 0.0]})
    assert len(reads_figure({"full": table, "sliding": table}).data) == 2


def test_what_is_not_read_is_not_drawn() -> None:
    table = pl.DataFrame({"query": [0, 1, 1], "key": [0, 0, 1], "strength": [1.0, 0.5, 0.0]})
    assert list(reads_figure({"full": table}).data[0].y) == [0, 1]


def test_one_plot_per_group_of_heads() -> None:
    table = pl.DataFrame({"query": [0, 1], "group": [0, 1], "block": [0, 0]})
    assert len(selected_figure(table).data) == 2


def test_a_dotted_line_only_where_eviction_saves_something() -> None:
    sizes = {"arm": ["full", "full", "sliding", "sliding"], "length": [1, 2, 1, 2], "bytes": [4, 8, 4, 4]}
    table = pl.DataFrame({**sizes, "unevicted": [4, 8, 4, 8]})
    assert [trace.line.dash for trace in cache_figure(table).data] == ["solid", "solid", "dot"]
