"""The live dashboard: data change in place, and trouble is told instead of raised."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from dashboards.fake import FakeRun

from workbench.dashboards import dashboard
from workbench.dashboards.widget import Dashboard


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    folder = tmp_path / "results"
    folder.mkdir()
    return FakeRun(folder, progress=0.3, confirmed=False)


def header(view: Dashboard) -> str:
    return view.children[0].value


def test_trace_data_change_in_place(run: FakeRun) -> None:
    view = dashboard(run, refresh=0)
    curves, effects = view.plots["Curves"], view.plots["Effects"]
    assert len(curves.data[-1].x) == 6 and "0 of 12 runs" in header(view) and "left" in header(view)
    run.progress = 0.5
    assert view.refresh_once()
    assert len(curves.data[-1].x) == 10
    run.progress, run.confirmed = 1.0, True
    assert not view.refresh_once(), "finished"
    assert view.plots["Curves"] is curves and view.plots["Effects"] is effects
    assert len(curves.data[-1].x) == 20 and curves.data[-1].name == "gdn"
    assert "worse" in effects.data[-1].text[0] and not effects.layout.annotations
    assert "finished: 12 of 12 runs" in header(view)


def test_axes_are_chosen(run: FakeRun) -> None:
    view = dashboard(run, refresh=0)
    view.x_axis.value = "seconds"
    assert view.plots["Curves"].layout.xaxis.title.text == "training time (s)"
    view.y_axis.value = "selection_value"
    assert "bits per byte" in view.plots["Curves"].layout.yaxis.title.text


def test_nothing_jumps(run: FakeRun) -> None:
    view = dashboard(run, refresh=0)
    before = [(panel.layout.height, len(view.children)) for panel in view._panels.values()]
    run.progress, run.confirmed = 1.0, True
    view.refresh_once()
    assert before == [(panel.layout.height, len(view.children)) for panel in view._panels.values()]
    assert all(height for height, _ in before)


def test_errors_are_shown_and_pass(run: FakeRun) -> None:
    view = dashboard(run, refresh=0)
    run.broken = True
    assert view.refresh_once()
    assert "OSError: the &lt;disk&gt; is away" in header(view)
    run.broken = False
    view.refresh_once()
    assert "OSError" not in header(view)


def test_a_deleted_folder_is_a_sentence(run: FakeRun) -> None:
    view = dashboard(run, refresh=0)
    shutil.rmtree(run.folder)
    assert not view.refresh_once()
    assert "is gone" in header(view) and len(view.plots["Curves"].data[-1].x) == 6


def test_the_thread_ends_with_the_run_or_when_stopped(run: FakeRun) -> None:
    view, stopped = dashboard(run, refresh=0.02), dashboard(run, refresh=0.02)
    stopped.stop()
    time.sleep(0.1)
    assert view._thread.is_alive()
    run.progress, run.confirmed = 1.0, True
    for each in (view, stopped):
        each._thread.join(20)
        assert not each._thread.is_alive()
    assert "finished" in header(view) and "finished" not in header(stopped)


def test_no_runs_and_many_arms(tmp_path: Path) -> None:
    dashboard(FakeRun(tmp_path, trials=0), refresh=0).close()
    many = FakeRun(tmp_path, tuple(f"arm {i}" for i in range(50)), trials=1, points=5, progress=0.4)
    assert "refresh failed" not in header(dashboard(many, refresh=0))
