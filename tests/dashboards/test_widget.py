"""The live dashboard, without a browser: what is sent to the page, and trouble that is told instead of raised."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from dashboards.fake import FakeRun

from workbench.config import ConfigError
from workbench.dashboards import dashboard
from workbench.dashboards.panels import PANELS, TUNING
from workbench.dashboards.widget import Dashboard


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    folder = tmp_path / "results"
    folder.mkdir()
    return FakeRun(folder, progress=0.3, confirmed=False)


def opened(run: FakeRun, panel: str = "Curves", **settings: Any) -> Dashboard:
    """A dashboard that keeps what it would send to a page."""
    view = Dashboard(run, refresh=0, panel=panel)
    view.messages = []  # type: ignore[attr-defined]
    view.board.send = lambda message: view.messages.append(json.loads(message["text"]))  # type: ignore
    for name, value in settings.items():
        getattr(view, name).value = value
    return view


def test_only_what_changed_is_sent(run: FakeRun) -> None:
    view = opened(run)
    assert "0 of 12 runs" in view.header and "left" in view.header
    view.refresh_once()
    assert not view.messages, "nothing has happened"
    run.progress = 0.5
    assert view.refresh_once()
    (message,) = view.messages
    assert set(message) == {"patch"} and message["patch"]["id"] == "Curves curves"
    assert all(len(json.loads(message["patch"]["traces"][str(i)])["x"]) == 10 for i in (2, 3)), "both lines, no axes"
    assert message["patch"]["layout"] is None
    run.progress, run.confirmed = 1.0, True
    assert not view.refresh_once(), "finished"
    assert all("patch" in message for message in view.messages)
    assert "finished: 12 of 12 runs" in view.header


def test_a_view_that_comes_up_is_given_everything(run: FakeRun) -> None:
    view = opened(run)
    view.board._heard(None, {"event": "ready"}, [])
    figure, source = view.messages[0]["blocks"]
    assert (
        figure["kind"] == "figure"
        and len(figure["figure"]["data"]) == 4
        and json.loads(figure["figure"]["layout"])["height"]
    )
    assert source["kind"] == "text" and "1.0+&lt;script&gt;" in source["html"]


def test_axes_and_smoothing_are_chosen(run: FakeRun) -> None:
    view = opened(run, x_axis="seconds", y_axis="selection_value", log_y=True, smoothing=0.5)
    figure = view._blocks[0].figure
    assert figure.layout.xaxis.title.text == "training time (s)" and figure.layout.yaxis.type == "log"
    assert "bits per byte" in figure.layout.yaxis.title.text and "smoothed" in figure.layout.yaxis.title.text


def test_marks_drive_the_figures(run: FakeRun) -> None:
    view = opened(run)
    colour = view._blocks[0].figure.data[-1].line.color
    view._heard({"event": "mark", "mark": "hidden", "key": "arm full", "on": True})
    assert [trace.name for trace in view._blocks[0].figure.data if trace.showlegend] == ["gdn (tuning trials)"]
    assert view._blocks[0].figure.data[-1].line.color == colour, "hiding an arm recolours none"
    view._heard({"event": "mark", "mark": "selected", "key": "tuning-1-2", "on": True})
    assert view._blocks[0].figure.data[-1].name == "tuning-1-2"
    view._heard({"event": "mark", "mark": "hidden", "key": "tuning-1-2", "on": True})
    assert view._blocks[0].figure.data[-1].name != "tuning-1-2"
    view.panel.value = "Runs"
    plain = view.board._shown[0]
    assert plain["marked"] == {"pinned": [], "hidden": ["arm full", "tuning-1-2"], "selected": ["tuning-1-2"]}
    assert len(plain["rows"]) == 6, "the table still lists what is hidden"


def test_hiding_changes_no_verdict(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, ("full", "gdn", "nsa"))
    view = opened(run, "Effects")
    before = {row["arm"]: row for row in view._blocks[0].table.iter_rows(named=True)}
    view._heard({"event": "mark", "mark": "hidden", "key": "arm nsa", "on": True})
    after = {row["arm"]: row for row in view._blocks[0].table.iter_rows(named=True)}
    assert after == {arm: before[arm] for arm in ("full", "gdn")}, "corrected for the family that was declared"


def test_a_log_is_one_click_away(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, status="crashed")
    (tmp_path / "runs" / "tuning-0-1").mkdir(parents=True)
    (tmp_path / "runs" / "tuning-0-1" / "log.txt").write_text("Traceback <most recent>")
    view = opened(run, "Failures")
    assert view._blocks[0].action == "log" and len(view._blocks) == 1
    view._heard({"event": "act", "action": "log", "key": "tuning-0-1"})
    assert "Traceback &lt;most recent&gt;" in view._blocks[-1].html
    view._heard({"event": "act", "action": "log", "key": "tuning-0-2"})
    assert "no log" in view._blocks[-1].html
    view._heard({"event": "act", "action": "log", "key": "tuning-0-2"})
    assert len(view._blocks) == 1


EDGE_CASES: dict[str, dict[str, Any]] = {
    "no runs": {"trials": 0},
    "one arm": {"arms": ("full",)},
    "all failed": {"status": "diverged"},
    "fifty arms": {"arms": tuple(f"arm {i}" for i in range(50)), "trials": 2, "points": 5},
    "under way": {"progress": 0.5, "confirmed": False},
    "many trials": {"trials": 7},
    "diagnostics": {"diagnosed": True},
}


@pytest.mark.parametrize("case", EDGE_CASES)
def test_every_panel_shows_something_sensible(case: str, tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, **EDGE_CASES[case]))
    for panel in PANELS:
        view.panel.value = panel
        views = {"Tuning": (view.tuning_view, list(TUNING)), "Mechanisms": (view.mechanism, view.mechanism.options)}
        control, options = views.get(panel, (None, (None,)))
        for option in options:
            if control is not None:
                control.value = option
            assert "failed (" not in view.header, f"{panel} {option}: {view.header}"
            assert view._blocks and view.board._shown[-1]["kind"] == "text"
            for block in view.board._shown:
                if block["kind"] == "figure":
                    drawn = block["figure"]
                    titled = all(axis.title.text or axis.visible is False for axis in drawn.select_xaxes())
                    assert titled or drawn.data[0].type in ("table", "parcoords")


def test_layers_tell_of_themselves(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True), "Mechanisms")
    assert view.diagnostic.options == ("half_life_p10", "load", "state_norm")
    drawn = view._blocks[0].figure
    assert drawn.layout.yaxis.title.text == "half life p10 (tokens)" and list(drawn.data[-1].x) == [1, 10]
    view.diagnostic.value = "load"
    assert view._blocks[0].figure.layout.yaxis.title.text.startswith("largest load")
    view.mechanism.value = "layers"
    expert_map = view._blocks[0].figure.data[0]
    assert list(expert_map.x) == ["0", "1", "2", "3"] and [list(row) for row in expert_map.z] == [[1.0, 2.0, 3.0, 4.0]]


def test_a_folder_of_results_lists_its_ablations(tmp_path: Path) -> None:
    view = Dashboard(tmp_path, refresh=0)
    assert view.panel.value == "Ablations" and "No ablation in" in view.board._shown[0]["empty"]
    assert view.launch_button.disabled and view.stop_button.disabled
    for panel in PANELS:
        view.panel.value = panel
        assert "failed (" not in view.header
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ablation.json").write_text('{"name": "broken"}')
    view.refresh_once()
    assert "cannot be read" in view.board._shown[0]["rows"][0][2][1]
    with pytest.raises(ConfigError, match="no such folder"):
        Dashboard(tmp_path / "none", refresh=0)


def test_controls_hold_when_another_ablation_is_opened(run: FakeRun, tmp_path: Path) -> None:
    view = opened(run, "Mechanisms", mechanism="recall", x_axis="seconds")
    view._heard({"event": "mark", "mark": "hidden", "key": "arm full", "on": True})
    view.show(FakeRun(tmp_path, ("other", "full")))  # type: ignore[arg-type]
    view.panel.value = "Mechanisms"
    assert view.settings.mechanism == "recall" and view.settings.x == "seconds" and not view.settings.hidden
    assert "answers" in view._blocks[0].html and "finished" in view.header


def test_what_is_shown_can_be_exported(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path))
    (path,) = view.write("csv")
    assert path == tmp_path / "exports" / "curves.csv" and path.read_text().startswith("# a <b>name</b>")
    view.panel.value = "Runs"
    with pytest.raises(ConfigError, match="no figure"):
        view.write("png")
    assert view.write("tex")[0].read_text().count(r"\\") == 13


def test_errors_are_shown_and_pass(run: FakeRun) -> None:
    view = opened(run)
    run.broken = True
    assert view.refresh_once()
    assert "OSError: the &lt;disk&gt; is away" in view.header
    run.broken = False
    view.refresh_once()
    assert "OSError" not in view.header


def test_a_deleted_folder_is_a_sentence(run: FakeRun) -> None:
    view = opened(run)
    shutil.rmtree(run.folder)
    view.refresh_once()
    assert "is gone" in view.header and len(view._blocks[0].figure.data[-1].x) == 6


def test_the_thread_ends_with_the_run_or_when_stopped(run: FakeRun) -> None:
    view, stopped = dashboard(run, refresh=0.02), dashboard(run, refresh=0.02)
    stopped.stop()
    time.sleep(0.1)
    assert view._thread.is_alive()
    run.progress, run.confirmed = 1.0, True
    for each in (view, stopped):
        each._thread.join(20)
        assert not each._thread.is_alive()
    assert "finished" in view.header and "finished" not in stopped.header
