"""Scores of suites in tables, figures and exports, and the verdict by secondary metrics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from dashboards.fake import FakeRun
from scipy import stats
from typer.testing import CliRunner

from workbench.cli import app
from workbench.dashboards import export_table, figure, paper_table, table, write_report
from workbench.dashboards.panel import Grid, make_panel, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.suites import best_cells
from workbench.dashboards.view import RunView, SingleRuns
from workbench.results.scores import FOLDER, METADATA, SCORE_SCHEMA

ODD = '<img src=x onerror=alert(1)> & "co"'
SUITE_PANELS = ["suite_map", "suite_lengths", "suite_scores"]


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path, ("full", "gdn", "kda"), seeds=6, suites=True)


def accuracies(run: FakeRun, arm: str, task: str, length: int | None = None) -> np.ndarray:
    """The accuracy of every run, from its documents."""
    rows = run.scores().filter((pl.col("arm") == arm) & (pl.col("task") == task) & pl.col("document").is_not_null())
    rows = rows if length is None else rows.filter(pl.col("length") == length)
    return rows.group_by("seed", maintain_order=True).agg(pl.col("value").mean())["value"].to_numpy()


def row_of(frame: pl.DataFrame, **fields: Any) -> dict[str, Any]:
    for name, value in fields.items():
        frame = frame.filter(pl.col(name).is_null() if value is None else pl.col(name) == value)
    assert len(frame) == 1
    return frame.row(0, named=True)


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_over_seeds_with_its_t_interval(run: FakeRun) -> None:
    row = row_of(table(run, "suite_map"), arm="gdn", task="vt")
    values = accuracies(run, "gdn", "vt")
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert row["value"] == pytest.approx(values.mean())
    assert (row["low"], row["high"]) == (pytest.approx(max(low, 0)), pytest.approx(min(high, 1)))
    assert (row["seeds"], row["documents"]) == (6, 24)


def test_a_difference_has_the_published_direction(run: FakeRun) -> None:
    row = row_of(table(run, "suite_map"), arm="kda", task="niah_single_1")
    gaps = accuracies(run, "kda", "niah_single_1") - accuracies(run, "full", "niah_single_1")
    assert row["difference"] == pytest.approx(gaps.mean())
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    loss = row_of(table(run, "suite_map"), arm="gdn", task="text")
    assert loss["difference"] == pytest.approx(-0.1, abs=0.02)


def test_the_mean_over_tasks_weighs_them_the_same(run: FakeRun) -> None:
    row = row_of(table(run, "suite_map"), arm="full", suite="ruler", task=None)
    both = (accuracies(run, "full", "vt") + accuracies(run, "full", "niah_single_1")) / 2
    assert row["value"] == pytest.approx(both.mean())


def test_lengths_are_rows(run: FakeRun) -> None:
    lengths = table(run, "suite_lengths")
    row = row_of(lengths, arm="gdn", task="vt", length=1024)
    assert row["value"] == pytest.approx(accuracies(run, "gdn", "vt", 1024).mean())
    assert lengths["length"].unique().sort().to_list() == [128, 256, 1024]
    assert "text" not in lengths["task"]  # which has no lengths


def test_a_hidden_baseline_is_what_differences_are_to(run: FakeRun) -> None:
    whole, part = Snapshot(run), Snapshot(run).filtered(["gdn"])
    assert table(part, "suite_map")["arm"].unique().to_list() == ["gdn"]
    assert row_of(table(part, "suite_map"), task="vt") == row_of(table(whole, "suite_map"), task="vt", arm="gdn")


# -- figures ---------------------------------------------------------------------------------------------------------


def test_the_map_has_a_row_per_task_and_a_column_per_arm(run: FakeRun) -> None:
    (drawn,) = figure(run, "suite_map").data
    assert list(drawn.x) == ["full", "gdn", "kda"]
    assert list(drawn.y)[:3] == ["ruler vt · accuracy", "ruler niah_single_1 · accuracy", "ruler, mean · accuracy"]
    assert float(drawn.text[0][1]) == pytest.approx(accuracies(run, "gdn", "vt").mean(), abs=1e-3)
    assert "interval over seeds" in drawn.hovertext[0][1]


def test_differences_leave_the_baseline_out(run: FakeRun) -> None:
    (drawn,) = figure(run, "suite_map", shown="difference").data
    assert list(drawn.x) == ["gdn", "kda"]
    assert drawn.text[0][0].startswith("+")
    assert drawn.text[3][0].startswith("-") and drawn.z[3][0] > 0  # fewer bits are better


def test_curves_mark_the_length_of_training(run: FakeRun) -> None:
    drawn = figure(run, "suite_lengths")
    assert {line.x0 for line in drawn.layout.shapes} == {256}
    assert len(drawn.layout.shapes) == 3  # two tasks and their mean
    assert drawn.layout.xaxis.type == "log"
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert list(lines[0].x) == [128, 256, 1024]


def test_a_suite_can_be_chosen(run: FakeRun) -> None:
    assert table(run, "suite_map", suite="loss")["suite"].unique().to_list() == ["loss"]
    assert make_panel("suite_map").choices(Snapshot(run)) == {"suite": ["all suites", "loss", "ruler"]}


@pytest.mark.parametrize("panel", SUITE_PANELS)
@pytest.mark.parametrize(
    "state", [{"seeds": 1}, {"arms": ("full",)}, {"arms": ("full", ODD)}, {"progress": 0.5}, {"status": "diverged"}]
)
def test_no_state_of_a_run_makes_a_panel_fail(panel: str, state: dict[str, Any], tmp_path: Path) -> None:
    blocks = make_panel(panel).blocks(Snapshot(FakeRun(tmp_path, **{"suites": True, **state})))
    assert len(blocks) == 1


@pytest.mark.parametrize("panel", SUITE_PANELS)
def test_panels_are_offered_where_suites_have_measured(panel: str, run: FakeRun, tmp_path: Path) -> None:
    assert panels[panel]().applies(run)
    assert not panels[panel]().applies(FakeRun(tmp_path))


@pytest.mark.parametrize("panel", ["suite_map", "suite_lengths"])
def test_names_are_escaped(panel: str, tmp_path: Path) -> None:
    drawn = figure(FakeRun(tmp_path, arms=("full", ODD), suites=True), panel)
    assert "<img" not in drawn.to_json().replace("\\u003c", "<")


# -- a paper's table -------------------------------------------------------------------------------------------------


def test_a_table_has_tasks_or_arms_as_rows(run: FakeRun) -> None:
    by_task, by_arm = table(run, "suite_scores"), table(run, "suite_scores", rows="arms")
    assert by_task.columns == ["task", "metric", "full", "gdn", "kda"]
    assert by_arm["arm"].to_list() == ["full", "gdn", "kda"]
    assert by_task["gdn"].to_list() == list(by_arm.row(1)[1:])


def test_numbers_of_a_task_have_the_same_decimals(run: FakeRun) -> None:
    for row in table(run, "suite_scores").iter_rows():
        assert len({len(number.split(".")[1]) for cell in row[2:] for number in cell.split(" ± ")}) == 1


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    cells = table(FakeRun(tmp_path, seeds=1, suites=True), "suite_scores")["gdn"]
    assert not any("±" in cell for cell in cells)


def test_latex_has_booktabs_and_plus_minus(run: FakeRun, tmp_path: Path) -> None:
    text = export_table(table(run, "suite_scores"), tmp_path / "t.tex", "x").read_text()
    assert (
        r"\begin{tabular}{llrrr}" in text
        and r"\toprule" in text
        and r"$\pm$" in text
        and r"ruler niah\_single\_1" in text
    )


def test_csv_keeps_every_digit(run: FakeRun, tmp_path: Path) -> None:
    numbers = table(run, "suite_map")
    export_table(numbers, tmp_path / "t.csv", "x")
    read = pl.read_csv(tmp_path / "t.csv")
    assert read["value"].to_list() == numbers["value"].to_list()


def test_a_paper_has_the_best_in_bold_where_a_difference_is_shown() -> None:
    def cell(arm: str, low: float | None, high: float | None) -> dict[str, Any]:
        return {"arm": arm, "difference_low": low, "difference_high": high, "higher_is_better": True}

    full, gdn, kda, nsa = (
        cell("full", None, None),
        cell("gdn", 0.1, 0.2),
        cell("kda", -0.1, 0.2),
        cell("nsa", -0.2, -0.1),
    )
    assert best_cells([full, gdn, kda, nsa]) == [gdn]
    assert best_cells([full, kda, nsa]) == [full, kda]
    assert best_cells([full, kda]) == []
    errors = [{**row, "higher_is_better": False} for row in (full, gdn, nsa)]
    assert best_cells(errors) == [errors[2]]


def test_the_table_of_scores_is_printed_with_caption(run: FakeRun, tmp_path: Path) -> None:
    printed = paper_table(run, "suite_scores", rows="arms")
    assert [row[0].text for row in printed.rows] == run.arms
    text = export_table(printed, tmp_path / "t.tex", "x").read_text()
    assert r"\caption{Evaluation suites of" in text and r"\begin{tabular}{lr" in text
    numbers = pl.read_parquet(export_table(printed, tmp_path / "t.parquet", "x"))
    assert numbers["value"].dtype == pl.Float64 and len(numbers) > len(printed.rows)


# -- secondary metrics -----------------------------------------------------------------------------------------------


def test_effects_have_a_plot_for_each_secondary_metric(run: FakeRun) -> None:
    blocks: list[Any] = make_panel("effects").blocks(Snapshot(run))
    *_, text, drawn, grid, sentences = blocks
    assert [note.text for note in drawn.figure.layout.annotations] == [
        "ruler vt, length 1024: 1 − accuracy",
        "loss: bits per byte",
    ]
    assert isinstance(grid, Grid) and len(grid.rows) == 6
    assert "declared order" in text.html and "longbench: F1 was not measured." in sentences.html
    markers = [trace.x[0] for trace in drawn.figure.data if trace.mode == "markers"]
    expected = drawn.table.filter(pl.col("arm") != "full")["difference"].to_list()
    assert markers == pytest.approx(expected)


def test_the_report_shows_them(run: FakeRun, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text()
    for heading in ("Secondary metrics", "Suites", "Suites over context length", "Suites, in numbers"):
        assert heading in page


def test_without_secondary_metrics_nothing_is_added(tmp_path: Path) -> None:
    assert len(make_panel("effects").blocks(Snapshot(FakeRun(tmp_path)))) == 2


def test_runs_of_their_own_have_suites(real_runs: dict[str, RunView], tmp_path: Path) -> None:
    folders = sorted(real_runs["finished"].folder.glob("runs/*"))[:2]
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]
    scores = pl.DataFrame(
        {
            "step": [1, 1, 2, 2],
            "split": ["selection"] * 4,
            "suite": ["probe"] * 4,
            "task": ["a", "b"] * 2,
            "document": [None] * 4,
            "metric": ["accuracy"] * 4,
            "value": [0.1, 0.2, 0.3, 0.4],
            "count": [1.0] * 4,
            "higher_is_better": [True] * 4,
            "upper": [1.0] * 4,
            "cluster": [None] * 4,
        },
        schema_overrides=SCORE_SCHEMA,
    )
    assert not SingleRuns(*copies).has_suites
    for copy in copies:
        (copy / FOLDER).mkdir()
        scores.write_parquet(copy / FOLDER / "probe.parquet", metadata={METADATA: "{}"})
    view = SingleRuns(*copies)
    assert view.has_suites
    frame = table(view, "suite_scores")
    assert frame.columns == ["task", "metric", *view.arms]
    assert frame.rows() == [  # of the last step
        ("probe a", "accuracy", "0.300", "0.300"),
        ("probe b", "accuracy", "0.400", "0.400"),
        ("probe, mean", "accuracy", "0.350", "0.350"),
    ]


def test_the_command_prints_and_writes_the_scores(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.ablation.run.AblationRun", lambda folder: run)
    answer = CliRunner().invoke(app, ["scores", str(tmp_path), "--arms", "--output", str(tmp_path / "s.md")])
    assert answer.exit_code == 0 and "±" in answer.output
    assert (tmp_path / "s.md").read_text().startswith("Evaluation suites of")
