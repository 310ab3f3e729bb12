"""The live dashboard, without a browser: what is sent to the page, and errors that are shown instead of raised."""

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
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import make_panel, panels


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    folder = tmp_path / "results"
    folder.mkdir()
    return FakeRun(folder, progress=0.3, confirmed=False)


def opened(run: Any, panel: str = "curves", **settings: Any) -> Dashboard:
    """A dashboard that keeps what it would send to a page."""
    view = Dashboard(run, refresh=0, panel=panel)
    view.messages = []  # type: ignore[attr-defined]
    view.board.send = lambda message: view.messages.append(json.loads(message["text"]))  # type: ignore
    for name, value in settings.items():
        view.controls()[name].value = value
    return view


def event(view: Dashboard, **message: Any) -> None:
    """What the page sends when the reader does something."""
    view.board._handle_custom_msg(message, [])


def mark(view: Dashboard, kind: str, key: str) -> None:
    event(view, event="mark", mark=kind, key=key, on=True)


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_nothing_is_sent_when_nothing_has_changed(run: FakeRun) -> None:
    view = opened(run)
    view.refresh_once()
    assert not view.messages


def test_only_changed_traces_are_sent(run: FakeRun) -> None:
    view = opened(run)
    run.progress = 0.5
    view.refresh_once()
    (message,) = view.messages
    assert message["patch"]["id"] == "curves curves" and message["patch"]["layout"] is None
    assert all(len(json.loads(message["patch"]["traces"][str(i)])["x"]) == 10 for i in (4, 5))


def test_a_run_that_finishes_is_sent_as_a_patch(run: FakeRun) -> None:
    view = opened(run)
    run.progress, run.confirmed = 1.0, True
    assert not view.refresh_once(), "nothing more will change"
    assert all("patch" in message for message in view.messages)


def test_a_new_view_gets_everything(run: FakeRun) -> None:
    view = opened(run)
    event(view, event="ready")
    figure, source = view.messages[0]["blocks"]
    assert figure["kind"] == "figure" and len(figure["figure"]["data"]) == 6
    assert json.loads(figure["figure"]["layout"])["height"]
    assert "1.0+&lt;script&gt;" in source["html"]


# -- header ----------------------------------------------------------------------------------------------------------


def test_the_header_counts_runs_and_estimates_the_time_left(run: FakeRun) -> None:
    header = opened(run).header
    assert "running: 0 of 12 runs" in header and "left" in header


def test_the_header_of_a_finished_run(run: FakeRun) -> None:
    view = opened(run)
    run.progress, run.confirmed = 1.0, True
    view.refresh_once()
    assert "finished: 12 of 12 runs" in view.header


# -- tabs and buttons ------------------------------------------------------------------------------------------------


def end(run: FakeRun) -> None:
    run.progress, run.confirmed = 1.0, True


def test_a_run_that_ends_shows_its_verdict(run: FakeRun) -> None:
    view = Dashboard(run, refresh=0)
    assert view.panel_name == "curves"
    end(run)
    view.refresh_once()
    assert view.panel_name == "verdict"
    view.open_panel("curves")
    view.refresh_once()
    assert view.panel_name == "curves", "once only"


@pytest.mark.parametrize("panel", ["progress", "curves"])
def test_a_panel_that_the_reader_has_chosen_stays_open(run: FakeRun, panel: str) -> None:
    view = Dashboard(run, refresh=0)
    for name in ("cost", panel):
        view.tabs.value = name.capitalize()
    end(run)
    view.refresh_once()
    assert view.panel_name == panel


def test_tabs_count_failures_and_have_tooltips(run: FakeRun) -> None:
    view = Dashboard(run, refresh=0)
    end(run)
    run.status = "diverged"
    view.refresh_once()
    labels = [label for label, _ in view.tabs.options]
    assert "Failures (12)" in labels and "Curves" in labels
    assert len(view.tabs.tooltips) == len(labels) and all(view.tabs.tooltips)
    assert view.panel_name == "verdict"


def test_stop_and_launch_are_enabled_where_they_can_act(run: FakeRun) -> None:
    view = Dashboard(run, refresh=0)
    assert not view.stop_button.disabled and view.launch_button.disabled, "two workers are at work, and no more chosen"
    view.workers.value = 3
    assert not view.launch_button.disabled and view.launch_button.description == "Add workers"
    end(run)
    view.refresh_once()
    assert view.stop_button.disabled and view.launch_button.disabled
    run.status = "crashed"
    view.refresh_once()
    assert not view.launch_button.disabled and view.launch_button.description == "Retry failed"


def test_a_panel_that_does_not_come_up_says_what_to_do(run: FakeRun) -> None:
    texts = [child.value for child in Dashboard(run, refresh=0).children if hasattr(child, "value")]
    assert any("Reload this page" in text for text in texts if isinstance(text, str))


def test_errors_are_shown_and_pass(run: FakeRun) -> None:
    view = opened(run)
    run.broken = True
    assert view.refresh_once()
    assert "OSError: the &lt;disk&gt; is away" in view.header
    run.broken = False
    view.refresh_once()
    assert "OSError" not in view.header


def test_a_deleted_folder_leaves_the_panel(run: FakeRun) -> None:
    view = opened(run)
    shutil.rmtree(run.folder)
    view.refresh_once()
    assert "was deleted" in view.header and len(view.blocks[0].figure.data[-1].x) == 6


# -- settings --------------------------------------------------------------------------------------------------------


def test_axes_are_chosen(run: FakeRun) -> None:
    figure = opened(run, x="seconds", y="selection_value", log_y=True).blocks[0].figure
    assert figure.layout.xaxis.title.text == "training time (s)" and figure.layout.yaxis.type == "log"
    assert "bits per byte" in figure.layout.yaxis.title.text


def test_any_recorded_series_is_drawn(run: FakeRun) -> None:
    view = opened(run)
    control = view.controls()["y"]
    assert [value for _, value in control.options] == [
        "loss",
        "selection_value",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
    ]
    control.value = "gradient_norm"
    figure = view.blocks[0].figure
    assert figure.layout.yaxis.title.text.startswith("norm of the gradient") and set(figure.data[-1].y) == {1.0}


def test_an_unknown_series_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected one of loss"):
        make_panel("curves", y="speed")


def test_a_list_of_options_starts_with_what_is_drawn(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True), "diagnostics")
    assert view.controls()["diagnostic"].value == "half_life_p10", "not blank"


def test_a_list_shows_the_setting_that_is_drawn(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True), "diagnostics")
    view.panel.settings = view.panel.settings.changed(diagnostic="gone")
    view.refresh_once()
    assert view.panel.settings.diagnostic == view.controls()["diagnostic"].value != "gone"


def test_settings_that_cannot_follow_stay(run: FakeRun) -> None:
    def follow(settings: Any, field: str, run: Any) -> Any:
        raise ConfigError.at("view", got="a damaged file", expected="a saved view")

    view = opened(run)
    before = view.panel.settings
    view.panel.follow = follow  # type: ignore[method-assign]
    view.controls()["x"].value = "flops"
    assert "a damaged file" in view.message.value
    assert view.panel.settings == before and view.controls()["x"].value == before.x


def test_a_changed_number_of_tabs_draws_the_open_panel_alone(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    view, drawn = opened(run, "failures"), []
    monkeypatch.setattr(view, "_draw", lambda: drawn.append(view.panel_name))
    end(run)
    run.status = "diverged"
    view.refresh_once()
    assert drawn == ["failures"]


def test_a_list_without_options_is_not_shown(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path), "diagnostics")
    assert view.controls()["diagnostic"] not in view._settings_row.children


def test_smoothing_is_chosen(run: FakeRun) -> None:
    assert "smoothed (weight 0.5)" in opened(run, smoothing=0.5).blocks[0].figure.layout.yaxis.title.text


NOT_OF_A_FAKE_RUN = ("recall_", "components", "decoding", "ranks")
"""It has no task, crosses no seeds, decodes under no policy and trains on one rank."""


@pytest.mark.parametrize("panel", [name for name in panels if not name.startswith(NOT_OF_A_FAKE_RUN)])
def test_every_option_of_every_control_draws(panel: str, tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True, suites=True), panel)
    for control in view.controls().values():
        for option in getattr(control, "options", []):
            control.value = option[1]
            assert "failed (" not in view.header


def test_diagnostics_are_listed_and_chosen(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True), "diagnostics")
    control = view.controls()["diagnostic"]
    assert [name for name, _ in control.options] == ["half_life_p10", "load", "state_norm"]
    control.value = "load"
    assert view.blocks[0].figure.layout.yaxis.title.text.startswith("largest load")


def test_diagnostics_carry_their_unit(tmp_path: Path) -> None:
    figure = opened(FakeRun(tmp_path, diagnosed=True), "diagnostics").blocks[0].figure
    assert figure.layout.yaxis.title.text == "half life p10 (tokens)" and list(figure.data[-1].x) == [1, 10]


def test_vectors_are_drawn_as_maps(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, diagnosed=True), "layers", diagnostic="load")
    trace = view.blocks[0].figure.data[0]
    assert list(trace.x) == ["0", "1", "2", "3"] and [list(row) for row in trace.z] == [[1.0, 2.0, 3.0, 4.0]]


# -- marks and buttons in tables -------------------------------------------------------------------------------------


def test_a_hidden_arm_is_not_drawn(run: FakeRun) -> None:
    view = opened(run)
    mark(view, "hidden", "arm full")
    assert [trace.name for trace in view.blocks[0].figure.data if trace.showlegend] == ["gdn (tuning trials)"]


def test_hiding_an_arm_recolours_none(run: FakeRun) -> None:
    view = opened(run)
    colour = view.blocks[0].figure.data[-1].line.color
    mark(view, "hidden", "arm full")
    assert view.blocks[0].figure.data[-1].line.color == colour


def test_a_selected_run_is_drawn(run: FakeRun) -> None:
    view = opened(run)
    mark(view, "selected", "tuning-1-2")
    assert view.blocks[0].figure.data[-1].name == "tuning-1-2"


def test_a_hidden_run_is_not_drawn(run: FakeRun) -> None:
    view = opened(run)
    mark(view, "selected", "tuning-1-2")
    mark(view, "hidden", "tuning-1-2")
    assert view.blocks[0].figure.data[-1].name != "tuning-1-2"


def test_tables_list_what_is_hidden(run: FakeRun) -> None:
    view = opened(run, "runs")
    mark(view, "hidden", "arm full")
    mark(view, "hidden", "tuning-1-2")
    grid = view.board.shown[0]
    assert grid["marked"] == {"pinned": [], "hidden": ["arm full", "tuning-1-2"], "selected": []}
    assert [row["key"] for row in grid["rows"]] == ["arm full", "arm gdn"]
    assert [len(row["children"]) for row in grid["rows"]] == [3, 3]


def test_hiding_does_not_change_the_verdict(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path, ("full", "gdn", "nsa")), "effects")
    before = {row["arm"]: row for row in view.blocks[0].table.iter_rows(named=True)}
    mark(view, "hidden", "arm nsa")
    after = {row["arm"]: row for row in view.blocks[0].table.iter_rows(named=True)}
    assert after == {arm: before[arm] for arm in ("full", "gdn")}, "corrected for the arms that were declared"


def test_a_filter_chooses_rows(run: FakeRun) -> None:
    view = opened(run, "runs", rows="runs")
    event(view, event="filter", key="runs every-run", text="gdn lr>0.0005")
    grid = view.board.shown[0]
    assert [row["key"] for row in grid["rows"]] == ["tuning-1-1", "tuning-1-2"] and grid["total"] == 6
    assert len(view.blocks[0].table) == 2, "what is exported"
    event(view, event="filter", key="runs every-run", text="")
    assert len(view.board.shown[0]["rows"]) == 6


def test_a_filter_unfolds_the_arms_in_which_it_finds_runs(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path), "runs")
    event(view, event="filter", key="runs runs", text="seed=1")
    rows = view.board.shown[0]["rows"]
    assert [(row["key"], row["unfolded"]) for row in rows] == [("arm full", True), ("arm gdn", True)]
    assert [child["key"] for row in rows for child in row["children"]] == ["confirmation-0-1", "confirmation-1-1"]


def test_a_filter_keeps_the_runs_that_satisfy_it(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path), "runs")
    event(view, event="filter", key="runs runs", text="gdn confirmation")
    (row,) = view.board.shown[0]["rows"]
    assert [child["key"] for child in row["children"]] == [f"confirmation-1-{seed}" for seed in range(3)]


def test_a_mistake_in_a_filter_is_shown_and_loses_nothing(run: FakeRun) -> None:
    view = opened(run, "runs")
    event(view, event="filter", key="runs runs", text="speed>3")
    grid = view.board.shown[0]
    assert "got 'speed'; expected a column" in grid["problem"] and len(grid["rows"]) == 2


def test_any_table_is_filtered_by_its_titles(run: FakeRun) -> None:
    view = opened(run, "progress")
    event(view, event="filter", key="progress arms", text="stage=tuning left>0")
    assert {row["cells"][1] for row in view.board.shown[0]["rows"]} == {"tuning"}


def test_runs_are_filtered_by_the_titles_that_are_shown(run: FakeRun) -> None:
    view = opened(run, "runs", rows="runs")
    for text, count in (("time<60 tokens/s>3", 6), ("time>60", 0)):
        event(view, event="filter", key="runs every-run", text=text)
        assert len(view.board.shown[0]["rows"]) == count and not view.board.shown[0]["problem"]


def test_arms_and_runs_have_columns_of_their_own(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path), "runs")
    event(view, event="columns", key="runs runs", shown=["arm"])
    view.controls()["rows"].value = "runs"
    assert len([column for column in view.blocks[0].columns if not column.hidden]) > 1


def test_columns_are_chosen_and_exported(tmp_path: Path) -> None:
    view = opened(FakeRun(tmp_path), "runs")
    hidden = {column.title for column in view.board.shown[0]["columns"] if column.hidden}
    assert {"tokens", "failed", "status"} <= hidden, "the same everywhere"
    assert "tokens 20 k" in view.board.shown[0]["note"]
    event(view, event="columns", key="runs runs", shown=["arm", "tokens"])
    assert [column.title for column in view.blocks[0].columns if not column.hidden] == ["arm", "tokens"]
    text = view.write("md")[0].read_text()
    assert "| arm" in text and "20 k" in text and "report" not in text


@pytest.fixture
def crashed(tmp_path: Path) -> Dashboard:
    (tmp_path / "runs" / "tuning-0-1").mkdir(parents=True)
    (tmp_path / "runs" / "tuning-0-1" / "log.txt").write_text("Traceback <most recent>")
    return opened(FakeRun(tmp_path, status="crashed"), "failures")


def test_a_log_is_one_click_away(crashed: Dashboard) -> None:
    event(crashed, event="act", action="details", key="tuning-0-1")
    assert "Traceback &lt;most recent&gt;" in crashed.blocks[-1].html


def test_a_missing_log_is_explained(crashed: Dashboard) -> None:
    event(crashed, event="act", action="details", key="tuning-0-2")
    assert "There is no log" in crashed.blocks[-1].html


def test_the_page_of_a_run_takes_the_place_of_the_table_and_is_left(crashed: Dashboard) -> None:
    event(crashed, event="act", action="details", key="tuning-0-1")
    assert "runs" not in [block.name for block in crashed.blocks] and "full · tuning" in crashed.blocks[0].html
    event(crashed, event="act", action="close", key="tuning-0-1")
    assert [block.name for block in crashed.blocks] == ["failures"]


def test_there_is_no_page_of_a_run_that_does_not_exist(run: FakeRun) -> None:
    view = opened(run, "runs")
    event(view, event="act", action="details", key="../../secret")
    assert [block.name for block in view.blocks] == ["runs"]


# -- ablations -------------------------------------------------------------------------------------------------------


def test_a_folder_of_results_lists_its_ablations(tmp_path: Path) -> None:
    view = Dashboard(tmp_path, refresh=0)
    assert [name for _, name in view.tabs.options] == ["Ablations", "Journal", "Compare"]
    assert "No ablation in" in view.board.shown[0]["empty"]


def test_nothing_can_be_launched_before_an_ablation_is_open(tmp_path: Path) -> None:
    view = Dashboard(tmp_path, refresh=0)
    assert view.launch_button.disabled and view.stop_button.disabled


def test_an_unreadable_ablation_is_listed_as_such(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ablation.json").write_text('{"name": "broken"}')
    view = Dashboard(tmp_path, refresh=0)
    assert "cannot be read" in view.board.shown[0]["rows"][0]["cells"][1]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Dashboard(tmp_path / "none", refresh=0)


def test_a_finished_ablation_opens_with_its_verdict(tmp_path: Path) -> None:
    view = Dashboard(FakeRun(tmp_path), refresh=0)
    assert view.panel_name == "verdict" and "is worse than full" in view.blocks[0].html


def test_settings_remain_when_another_ablation_is_opened(run: FakeRun, tmp_path: Path) -> None:
    view = opened(run, "curves", x="seconds")
    view.show(FakeRun(tmp_path, ("other", "full")))
    view.open_panel("curves")
    assert view.panel.settings.x == "seconds" and view.controls()["x"].value == "seconds"


def test_marks_do_not_remain_when_another_ablation_is_opened(run: FakeRun, tmp_path: Path) -> None:
    view = opened(run)
    mark(view, "hidden", "arm full")
    view.show(FakeRun(tmp_path, ("other", "full")))
    assert not view.marks["hidden"] and "finished" in view.header


# -- export ----------------------------------------------------------------------------------------------------------


def test_a_shown_table_is_exported_with_its_provenance(tmp_path: Path) -> None:
    (path,) = opened(FakeRun(tmp_path)).write("csv")
    assert path == tmp_path / "exports" / "curves.csv"
    assert "a <b>name</b>" in path.with_name("curves.csv.provenance.json").read_text()


def test_a_grid_is_exported(tmp_path: Path) -> None:
    assert opened(FakeRun(tmp_path), "runs", rows="runs").write("tex")[0].read_text().count(r"\\") == 13


def test_a_panel_without_a_figure_exports_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no figure"):
        opened(FakeRun(tmp_path), "runs").write("png")


def test_the_report_is_exported(tmp_path: Path) -> None:
    assert opened(FakeRun(tmp_path)).write("html") == [tmp_path / "report.html"]


def test_the_report_of_an_archive_is_exported_outside_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = FakeRun(tmp_path / "mine")
    run.archived = True
    assert opened(run).write("html") == [Path("results/reports/mine.html")]


# -- thread ----------------------------------------------------------------------------------------------------------


def finish(run: FakeRun, view: Dashboard) -> str:
    """Let the run end; returns the header after the thread has ended."""
    time.sleep(0.1)
    run.progress, run.confirmed = 1.0, True
    view._thread.join(20)
    assert not view._thread.is_alive()
    return view.header


def test_the_thread_ends_with_the_run(run: FakeRun) -> None:
    assert "finished" in finish(run, dashboard(run, refresh=0.02))


def test_a_stopped_dashboard_keeps_what_it_shows(run: FakeRun) -> None:
    view = dashboard(run, refresh=0.02)
    view.stop()
    assert "finished" not in finish(run, view)


def test_exports_of_an_archive_leave_its_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = FakeRun(tmp_path / "committed" / "needle")
    run.folder.mkdir(parents=True)
    run.archived = True
    (path,) = opened(run).write("csv")
    assert path.resolve().parent == tmp_path / "results/exports/needle" and not list(run.folder.iterdir())
