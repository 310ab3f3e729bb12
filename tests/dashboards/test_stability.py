"""The panel of spikes, guards and alarms."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from dashboards.fake import FakeRun

from workbench.dashboards.panel import figure, make_panel
from workbench.dashboards.panels.stability import BINS, stability_table
from workbench.dashboards.snapshot import Snapshot


class Guarded(FakeRun):
    """Every run skips its third and fourth step and rolls back at the fifth."""

    def curves(self) -> pl.DataFrame:
        step = pl.col("step")
        return (
            super()
            .curves()
            .with_columns(
                skipped=pl.when(step < 3).then(0).when(step == 3).then(1).otherwise(2).cast(pl.Int64),
                rolled_back=(step >= 5).cast(pl.Int64),
                undone=(step >= 5).cast(pl.Int64) * 4,
                gradient_norm=pl.when(step == 3).then(50.0).otherwise(1.0),
            )
        )

    def diagnostics(self) -> pl.DataFrame:
        frame = super().diagnostics()
        large = frame.filter(pl.col("name") == "state_norm").with_columns(
            name=pl.lit("attention_score_max"), value=pl.col("value") * 50
        )
        return pl.concat([frame, large])


def test_marks_are_where_a_counter_rises(tmp_path: Path) -> None:
    table = stability_table(Snapshot(Guarded(tmp_path)), "gradient_norm")
    rows = table.filter(pl.col("run") == table["run"][0])
    assert rows.filter(pl.col("skipped") > 0)["tokens"].to_list() == [3000, 4000]
    assert rows.filter(pl.col("rolled_back") > 0)["tokens"].to_list() == [5000]


def test_a_run_without_guards_has_no_marks(tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path), "stability")
    assert {trace.mode for trace in drawn.data} == {"lines"}


def test_marks_are_drawn(tmp_path: Path) -> None:
    drawn = figure(Guarded(tmp_path), "stability")
    assert {trace.marker.symbol for trace in drawn.data if trace.mode == "markers"} == {"x", "triangle-left"}


def test_a_long_run_keeps_its_spikes(tmp_path: Path) -> None:
    table = stability_table(Snapshot(Guarded(tmp_path, points=3 * BINS)), "gradient_norm")
    rows = table.filter(pl.col("run") == table["run"][0])
    assert len(rows) == BINS and rows["value"].max() == 50 and rows["skipped"].sum() == 2


def test_interventions_are_counted_by_run(tmp_path: Path) -> None:
    run = Snapshot(Guarded(tmp_path))
    _, interventions, _ = make_panel("stability").blocks(run)
    assert interventions.table.select("skipped", "rolled_back", "undone").unique().rows() == [(2, 1, 4)]
    assert len(interventions.table) == len(run.lines())


@pytest.mark.parametrize(("diagnosed", "names"), [(False, set()), (True, {"attention_score_max"})])
def test_alarms_are_listed(diagnosed: bool, names: set[str], tmp_path: Path) -> None:
    *_, alarms = make_panel("stability").blocks(Snapshot(Guarded(tmp_path, diagnosed=diagnosed)))
    assert set(alarms.table["name"]) == names
