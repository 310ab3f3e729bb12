"""Figures of what mixers read and cache draw their tables."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from workbench.dashboards.figures.attention import cache_figure, reads_figure, selected_figure
from workbench.dashboards.panel import Figure, make_panel
from workbench.dashboards.snapshot import Snapshot


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


def test_maps_are_square_without_a_grid_and_have_a_title() -> None:
    table = pl.DataFrame({"query": [0, 1, 1], "key": [0, 0, 1], "strength": [1.0, 0.5, 0.0]})
    layout = reads_figure({"full": table, "sliding": table}, "gdn: inputs").layout
    assert layout.title.text == "gdn: inputs" and not layout.xaxis.showgrid and not layout.yaxis2.showgrid
    assert (layout.yaxis.scaleanchor, layout.yaxis2.scaleanchor) == ("x", "x2")


@pytest.mark.process
def test_any_layer_is_looked_into(real_runs: Any) -> None:
    snapshot = Snapshot(real_runs["finished"])
    panel = make_panel("attention", layer="1")
    assert panel.choices(snapshot)["layer"] == ["", "0", "1"]
    panel.prepare(snapshot)
    figures = [block for block in panel.blocks(snapshot) if isinstance(block, Figure)]
    assert [block.figure.layout.annotations[0].text for block in figures] == ["layer 1: full", "layer 1: sliding"]
    assert [block.figure.layout.title.text.split(":")[0] for block in figures] == real_runs["finished"].arms


@pytest.mark.process
def test_each_head_has_a_map_of_a_training_document(real_runs: Any) -> None:
    snapshot = Snapshot(real_runs["finished"])
    panel = make_panel("attention", layer="0", heads="each")
    panel.prepare(snapshot)
    figures = [block for block in panel.blocks(snapshot) if isinstance(block, Figure)]
    assert len(figures) == 2
    for block in figures:
        titles = [annotation.text for annotation in block.figure.layout.annotations]
        assert (
            titles == [f"head {i}" for i in range(len(titles))]
            and "attention weights" in block.figure.layout.title.text
        )
        totals = block.table.group_by("map", "query").agg(pl.col("strength").sum())["strength"]
        assert totals.to_list() == pytest.approx([1.0] * len(totals), abs=1e-5)
        assert "customdata[3]" in block.figure.data[0].hovertemplate and block.figure.data[0].customdata


def test_tokens_are_under_the_pointer_and_few_ones_along_the_axes() -> None:
    table = pl.DataFrame({"query": [0, 1, 1], "key": [0, 0, 1], "strength": [1.0, 0.5, 0.5]})
    figure = reads_figure({"full": table}, tokens=["a<b>", "\n"])
    assert figure.layout.xaxis.ticktext == ("a&lt;b&gt;", "\\n")
    assert [list(cell) for cell in figure.data[0].customdata][1] == [1, 0, "\\n", "a&lt;b&gt;"]
    assert reads_figure({"full": table}, tokens=["x"] * 30).layout.xaxis.ticktext is None
    assert reads_figure({"full": table}).data[0].customdata is None


def test_many_maps_are_in_several_rows() -> None:
    table = pl.DataFrame({"query": [0], "key": [0], "strength": [1.0]})
    figure = reads_figure({f"head {i}": table for i in range(6)})
    assert figure.layout.yaxis5.scaleanchor == "x5" and figure.layout.yaxis5.domain[1] < figure.layout.yaxis.domain[0]
