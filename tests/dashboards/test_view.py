"""Every kind of run provides what dashboards read, and every panel opens on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dashboards.fake import FakeRun

import workbench as wb
from workbench.config import ConfigError
from workbench.dashboards import write_report
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import EmptyRun, ResultsFolder, RunView, SingleRuns, distinct_names

pytestmark = pytest.mark.process

ARCHIVES = sorted(path.parent for path in Path(__file__).parents[2].glob("results/ablations/*/ablation.json"))
MADE_UP: dict[str, Callable[[Path], RunView]] = {
    "empty": lambda folder: EmptyRun(folder, ["full", "gdn"]),
    "results": ResultsFolder,
    "running": lambda folder: FakeRun(folder, progress=0.5, confirmed=False, diagnosed=True),
    **{path.name: lambda folder, path=path: wb.open(path) for path in ARCHIVES},  # type: ignore[misc]
}
REAL = ("planned", "launched", "interrupted", "finished", "failed", "archived", "single")


@pytest.fixture(params=[*REAL, *MADE_UP])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunView:
    if request.param in MADE_UP:
        return MADE_UP[request.param](tmp_path)
    return request.getfixturevalue("real_runs")[request.param]


def test_every_kind_of_run_is_a_run_view(run: RunView) -> None:
    assert isinstance(run, RunView)


def test_a_snapshot_is_a_run_view(run: RunView) -> None:
    assert isinstance(Snapshot(run), RunView)


@pytest.mark.parametrize("panel", panels)
def test_every_panel_opens_on_every_kind_of_run(run: RunView, panel: str) -> None:
    if not panels[panel]().applies(run):
        with pytest.raises(ConfigError, match="that applies to this run"):
            Dashboard(run, refresh=0, panel=panel)
        return
    view = Dashboard(run, refresh=0, panel=panel)
    assert "failed (" not in view.header
    assert view.board.shown


def test_every_kind_of_run_can_be_reported(run: RunView, tmp_path: Path) -> None:
    assert "</html>" in write_report(run, tmp_path / "report.html").read_text()


def test_the_layers_of_a_finished_run_can_be_inspected(real_runs: dict[str, RunView]) -> None:
    view = Dashboard(real_runs["finished"], refresh=0, panel="attention")
    view.panel.prepare(Snapshot(view.run))
    view.refresh_once()
    assert [block.name for block in view.blocks] == ["attention-full-reads", "attention-sliding-reads"]


def test_an_archive_has_no_layers_to_inspect(real_runs: dict[str, RunView]) -> None:
    with pytest.raises(ConfigError, match="that applies to this run"):
        Dashboard(real_runs["archived"], refresh=0, panel="attention")


def test_an_ablation_is_planned_until_it_is_launched(real_runs: dict[str, RunView]) -> None:
    assert "not launched: 0 of 4 runs" in Dashboard(real_runs["planned"], refresh=0).header


def test_an_interrupted_ablation_can_be_resumed(real_runs: dict[str, RunView]) -> None:
    assert Dashboard(real_runs["interrupted"], refresh=0).launch_button.description == "Resume"


def test_an_archive_cannot_be_launched(real_runs: dict[str, RunView]) -> None:
    assert Dashboard(real_runs["archived"], refresh=0).launch_button.disabled


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/run", "y/other"], ["run", "other"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a/x/run", "b/x/run", "a/y"], ["a/x/run", "b/x/run", "a/y"]),
    ],
)
def test_runs_of_one_folder_name_are_told_apart(folders: list[str], names: list[str]) -> None:
    assert distinct_names([Path(folder) for folder in folders]) == names


def test_one_run_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="every folder once"):
        distinct_names([Path("x/run"), Path("x/run")])


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the folder of a run"):
        SingleRuns(tmp_path)


def test_a_link_to_a_run_is_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(ConfigError, match="every folder once"):
        distinct_names([tmp_path / "run", tmp_path / "link"])
