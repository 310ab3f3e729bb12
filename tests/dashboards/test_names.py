"""Display names of arms in everything that is shown, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import workbench as wb
from workbench.ablation.run import AblationRun
from workbench.dashboards import figure, paper_table, table, write_report
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import Grid
from workbench.distribution import ROOT

NAMES = {"full": "softmax attention", "gdn": "Gated DeltaNet"}


@pytest.fixture
def run(tmp_path: Path) -> AblationRun:
    """An archive two of whose three arms have display names."""
    shutil.copytree(ROOT / "results" / "ablations" / "needle", tmp_path / "needle")
    run = wb.open(tmp_path / "needle")
    run.rename(NAMES)
    return run


def test_figures_have_display_names(run: AblationRun) -> None:
    effects = figure(run, "effects")
    assert list(effects.layout.yaxis.ticktext) == ["sliding", "Gated DeltaNet"]
    assert effects.layout.xaxis.title.text.startswith("difference to “softmax attention” in errors per answer")
    assert {trace.name for trace in figure(run, "frontier").data} >= {"softmax attention", "Gated DeltaNet", "sliding"}
    assert "gdn" not in {trace.name for trace in figure(run, "recall_curves").data}


def test_tables_of_papers_have_display_names_and_data_the_own(run: AblationRun, tmp_path: Path) -> None:
    text = run.paper_table(tmp_path / "t.tex").read_text()
    assert "Gated DeltaNet" in text and "difference to softmax attention with" in text
    assert paper_table(run, "runs").rows[0][0].text == "softmax attention"
    assert set(table(run, "effects")["arm"]) == {"full", "sliding", "gdn"}
    assert "Gated DeltaNet" not in run.paper_table(tmp_path / "t.csv").read_text()


def test_the_dashboard_and_the_report_have_display_names(run: AblationRun, tmp_path: Path) -> None:
    view = Dashboard(run, refresh=0, panel="progress")
    (grid, *_) = [block for block in view.blocks if isinstance(block, Grid)]
    assert {row.cells[0] for row in grid.rows} == {"softmax attention", "sliding", "Gated DeltaNet"}
    assert grid.rows[0].key == "arm full", "what is marked stays marked"
    view.open_panel("verdict")
    head = str(view.board.shown[0]["html"])
    assert "Gated DeltaNet" in head and "than softmax attention" in head
    assert "gdn is shown as Gated DeltaNet." in str(view.board.shown)
    report = write_report(run, tmp_path / "report.html").read_text()
    assert "Gated DeltaNet" in report and run.record.order == ["full", "sliding", "gdn"]


def test_arms_of_other_ablations_keep_their_names(run: AblationRun) -> None:
    shutil.copytree(ROOT / "results" / "ablations" / "needle", run.folder.parent / "other")
    view = Dashboard(run, refresh=0, panel="compare")
    arms = next(block for block in view.blocks if isinstance(block, Grid) and block.name == "arms")
    shown = {row.key: row.cells[1] for row in arms.rows}
    assert shown["needle/full"] == "softmax attention" and shown["other/full"] == "full"
