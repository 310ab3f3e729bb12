"""Every kind of run provides what dashboards read, and every panel opens on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dashboards.fake import FakeRun
from helpers import ablation_fields

import workbench as wb
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import EmptyRun, PlannedRun, ResultsFolder, RunView, SingleRuns
from workbench.results.store import RunFolder

ARCHIVE = Path(__file__).parents[2] / "results" / "ablations" / "needle"


def planned(folder: Path) -> RunView:
    fields = ablation_fields(folder)
    fields["base"]["data"] = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}], "examples": 16}
    return PlannedRun(wb.Ablation.parse(fields, folder))


def single(folder: Path) -> RunView:
    paths = [folder / "a", folder / "b"]
    for path in paths:
        path.mkdir()
        about = {"metric": FakeRun(folder).metric.plain(), "stage": "confirmation", "seed": 0}
        (path / "run.json").write_text(json.dumps(about))
        RunFolder(path)
    return SingleRuns(*paths)


KINDS: dict[str, Callable[[Path], RunView]] = {
    "empty": lambda folder: EmptyRun(folder, ["full", "gdn"]),
    "results": ResultsFolder,
    "planned": planned,
    "launched": lambda folder: FakeRun(folder, trials=0),
    "running": lambda folder: FakeRun(folder, progress=0.5, confirmed=False, diagnosed=True),
    "finished": lambda folder: FakeRun(folder, diagnosed=True),
    "failed": lambda folder: FakeRun(folder, status="diverged"),
    "archived": lambda folder: wb.open(ARCHIVE),
    "single": single,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_a_run_view(kind: str, tmp_path: Path) -> None:
    assert isinstance(KINDS[kind](tmp_path), RunView)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_a_run_view(kind: str, tmp_path: Path) -> None:
    assert isinstance(Snapshot(KINDS[kind](tmp_path)), RunView)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("panel", panels)
def test_every_panel_opens_on_every_kind_of_run(kind: str, panel: str, tmp_path: Path) -> None:
    run = KINDS[kind](tmp_path)
    if not panels[panel]().applies(run):
        pytest.skip("not offered for this run")
    view = Dashboard(run, refresh=0, panel=panel)
    assert "failed (" not in view.header
    assert view.board.shown
