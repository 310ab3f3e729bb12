"""An ablation on a task: the metric of its data source from the runs to the verdict, tables, report, command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields

import workbench as wb
from workbench.ablation.execution.worker import Worker
from workbench.ablation.verdict import judge as verdicts
from workbench.config import ConfigError
from workbench.dashboards import figure, table, write_report
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.recall import recall_table
from workbench.data import tasks
from workbench.metric import ANSWER_ERRORS

pytestmark = pytest.mark.process

DATA = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}, {"length": 32, "pairs": 4}], "examples": 16}


def fields(tmp_path: Path, **data: Any) -> dict[str, Any]:
    fields = ablation_fields(tmp_path, name="recall", confirmation={"seeds": [0, 1]})
    fields["base"]["data"] = {**DATA, **data}
    fields["base"]["training"] |= {"tokens": 10 * 64, "evaluations": 2}
    fields["base"]["model"] |= {"vocabulary": 40}
    fields["tuning"] = {"trials": 0}
    return fields


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> wb.AblationRun:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 20)
        launched = wb.Ablation.parse(fields(folder), folder).create()
    Worker(launched.files).work_until_done()
    return launched


def test_the_verdict_is_on_errors(run: wb.AblationRun) -> None:
    assert run.finished and run.metric == ANSWER_ERRORS
    verdict = run.verdict()
    assert verdict is not None and verdict.unit == "errors per answer"
    frame = run.runs()
    assert set(frame["metric"]) == {"errors per answer"} and frame["report_value"].is_between(0, 1).all()
    for row in verdict.rows:
        held = frame.filter(pl.col("arm") == row.arm)["report_value"]
        assert row.value == pytest.approx(held.mean(), abs=1e-12)
    assert "errors per answer" in verdict.rows[0].sentence and "errors/answer" in str(verdict)
    assert "bits" not in str(verdict)
    assert verdicts.Verdict.from_plain(verdict.plain()) == verdict


@pytest.fixture
def report(run: wb.AblationRun) -> pl.DataFrame:
    """The report examples of one run."""
    return pl.read_parquet(Path(run.runs()["folder"][-1]) / "report.parquet")


def test_examples_are_stored_with_their_labels(report: pl.DataFrame) -> None:
    assert report.columns == [
        "suite",
        "task",
        "document",
        "nll_nats",
        "errors",
        "length",
        "pairs",
        "answers",
        "cluster",
    ]


def test_every_example_is_stored(run: wb.AblationRun) -> None:
    assert {len(pl.read_parquet(Path(folder) / "report.parquet")) for folder in run.runs()["folder"]} == {16}


def test_errors_are_at_most_the_answers(report: pl.DataFrame) -> None:
    assert (report["errors"] <= report["answers"]).all()


def test_every_pair_is_an_answer(report: pl.DataFrame) -> None:
    assert report["answers"].to_list() == report["pairs"].to_list()


def test_recall_is_drawn_from_the_stored_examples(run: wb.AblationRun) -> None:
    recalled = recall_table(Snapshot(run), "pairs", "length")
    assert recalled.columns == ["arm", "pairs", "length", "accuracy", "low", "high", "runs", "answers"]
    assert len(recalled) == 4 and set(recalled["runs"]) == {2} and sorted(set(recalled["answers"])) == [16, 32]
    folders = run.runs().filter(pl.col("arm") == "full")["folder"]
    frames = [pl.read_parquet(Path(f) / "report.parquet").filter(pl.col("pairs") == 4) for f in folders]
    wanted = [1 - frame["errors"].sum() / frame["answers"].sum() for frame in frames]
    row = recalled.row(by_predicate=(pl.col("arm") == "full") & (pl.col("pairs") == 4), named=True)
    assert row["accuracy"] == pytest.approx(sum(wanted) / 2) and row["low"] == pytest.approx(min(wanted))
    drawn = figure(run, "recall_curves")
    assert [trace.name for trace in drawn.data] == ["full", "sliding"], "one x for each length: arms side by side"
    assert row["accuracy"] in list(drawn.data[0].y)
    mapped = figure(run, "recall_map", labels=["length", "pairs"])
    assert [trace.name for trace in mapped.data] == ["full", "sliding"]
    assert mapped.data[0].z[1][1] == row["accuracy"] and mapped.data[0].z[0][1] is None
    assert len(table(run, "recall_map")) == 0
    assert "No confirmation run" in figure(run, "recall_map").layout.annotations[0].text


def test_report_and_command_line_name_the_unit(run: wb.AblationRun, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    page = page[page.index("</head>") :]
    assert (
        "<h2>Recall</h2>" in page
        and "selection error rate (errors per answer)" in page
        and 'id="recall_curves"' in page
    )
    assert "errors/answer" in page and "bits per byte" not in page and "bits/byte" not in page
    assert "Overlap: share of examples" in page and "first 20 training examples" in page
    for command in (["verdict", str(run.folder)], ["table", "--csv", "--results", str(run.folder.parent)]):
        done = subprocess.run([sys.executable, "-m", "workbench", *command], capture_output=True, text=True, check=True)
        assert "errors" in done.stdout and "bits" not in done.stdout


def test_arms_on_different_sorts_of_data_are_refused(tmp_path: Path) -> None:
    mixed = fields(tmp_path)
    mixed["arms"]["text"] = {"data": {"kind": "text"}}
    with pytest.raises(ConfigError, match=r"arms.text.data: got 'bits per byte'; expected the baseline's metric"):
        wb.Ablation.parse(mixed)


def test_answers_may_be_measured_by_their_loss(tmp_path: Path) -> None:
    assert wb.Ablation.parse(fields(tmp_path, measure="loss")).arms.metric.unit == "bits per answer"


@pytest.mark.parametrize(
    "other", [[{"length": 16, "pairs": 1}], [{"length": 16, "pairs": 2}, {"length": 64, "pairs": 4}]]
)
def test_arms_measured_on_other_examples_are_refused(
    tmp_path: Path, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "OVERLAP_ROWS", 1)
    apart = fields(tmp_path, measured=DATA["mixes"])
    apart["base"]["training"]["context"] = 64
    apart["arms"]["other"] = {"data.mixes": other}  # other training, same measurement
    wb.Ablation.parse(apart, tmp_path / "one").create()
    apart["arms"]["other"] = {"data.measured": other}
    with pytest.raises(ConfigError, match=r"arms.other.data: got 'other report documents than the baseline'"):
        wb.Ablation.parse(apart, tmp_path / "two").create()
