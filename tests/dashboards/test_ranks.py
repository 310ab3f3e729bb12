"""The panel of ranks and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from dashboards.fake import FakeRun

from workbench.contract import BudgetChoice
from workbench.dashboards.panel import Grid, figure, make_panel
from workbench.dashboards.panels.ranks import MEASURES, budget_table, timeline_table, times_table
from workbench.dashboards.snapshot import Snapshot
from workbench.results.tables import Points


class OnTwoRanks(FakeRun):
    """Every run has two ranks, of which the second works half as long, and layers with budgets."""

    def curves(self) -> pl.DataFrame:
        times = {"step_seconds": 2.0, "rank_imbalance": 1.25, "waiting": 0.2}
        return super().curves().with_columns(**times, budget=12.0, coverage_lost=0.03)

    def diagnostics(self) -> pl.DataFrame:
        frame = super().diagnostics()
        of_one = frame.filter(pl.col("name") == frame["name"][0])
        coverage = of_one.with_columns(name=pl.lit("coverage"), value=0.95)
        return pl.concat([frame, of_one.with_columns(name=pl.lit("budget")), coverage])


@pytest.fixture
def run(tmp_path: Path) -> OnTwoRanks:
    times = {"micro_batches": [[1.0, 0.5], [0.5, 0.25]], "waiting": [0.0, 0.75], "step": [1.6, 1.6]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "ranks": times}) + "\n")
    return OnTwoRanks(tmp_path, diagnosed=True)


def test_micro_batches_and_waiting_follow_one_another(run: OnTwoRanks) -> None:
    table = timeline_table(Snapshot(run)).filter((pl.col("arm") == "full") & (pl.col("rank") == 1))
    assert table["part"].to_list() == ["micro-batch 1", "micro-batch 2", "waiting"]
    assert table["start"].to_list() == [0.0, 0.5, 0.75]
    assert (table["start"] + table["seconds"]).max() == 1.5


def test_a_bar_is_drawn_for_every_part(run: OnTwoRanks) -> None:
    assert len(figure(run, "ranks").data) == 2 * 2 * 3


def test_times_are_medians_by_arm(run: OnTwoRanks) -> None:
    (row, _) = times_table(Snapshot(run)).iter_rows(named=True)
    assert row == {
        "arm": "full",
        "step_seconds": 2.0,
        "rank_imbalance": 1.25,
        "waiting": 0.2,
        "budget": 12.0,
        "coverage_lost": 0.03,
        "coverage": pytest.approx(0.95),
    }


def test_columns_of_the_log_are_read_from_it(tmp_path: Path) -> None:
    """A step logs the metrics of its layers' choices under these names."""
    choice = BudgetChoice(torch.tensor(12), torch.tensor(0.03))
    assert set(choice.metrics) < set(MEASURES)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(MEASURES, 0.5)}) + "\n")
    (row,) = Points.read(tmp_path / "metrics.jsonl").frame.select(MEASURES).iter_rows(named=True)
    assert row == dict.fromkeys(MEASURES, 0.5)


def test_budgets_are_drawn_by_layer_and_step(run: OnTwoRanks) -> None:
    blocks = make_panel("ranks").blocks(Snapshot(run))
    assert set(budget_table(Snapshot(run))["name"]) == {"budget"}
    assert {trace.type for trace in blocks[2].figure.data} == {"heatmap"}  # type: ignore[union-attr]


def test_it_is_offered_where_there_is_something_to_show(run: OnTwoRanks, tmp_path: Path) -> None:
    assert make_panel("ranks").applies(run)
    assert not make_panel("ranks").applies(FakeRun(tmp_path))


def test_runs_of_one_process_have_no_times(tmp_path: Path) -> None:
    drawn = make_panel("ranks").blocks(Snapshot(FakeRun(tmp_path)))
    assert "several devices" in drawn[0].figure.layout.annotations[0].text  # type: ignore[union-attr]
    assert isinstance(drawn[1], Grid) and not drawn[1].rows


def test_an_archive_shows_times_by_arm_alone(run: OnTwoRanks) -> None:
    run.archived = True
    assert [type(block) for block in make_panel("ranks").blocks(Snapshot(run))] == [Grid]
