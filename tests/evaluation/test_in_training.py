"""A run evaluates with its suites and stores the long table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from workbench.data import tasks
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS
from workbench.results import RunFolder
from workbench.results.tables import EVALUATION_SCHEMA, evaluations
from workbench.training import RunConfig
from workbench.training.trial import new_run, train

pytestmark = pytest.mark.process

FIELDS = {
    "model": {"width": 32, "depth": 1, "vocabulary": 24},
    "data": {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}, {"length": 16, "pairs": 3}], "examples": 8},
    "training": {"tokens": 4 * 2 * 16, "batch_size": 2, "context": 16, "evaluations": 2, "compile": False},
}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 10)
        folder = tmp_path_factory.mktemp("ablation")
        run = new_run(folder / "runs" / "one", folder / "cache", RunConfig.parse(FIELDS), arm="full")
        assert train(run.path, folder / "cache")["status"] == "done"
        yield folder


@pytest.fixture(scope="module")
def run(ablation: Path) -> RunFolder:
    return RunFolder(ablation / "runs" / "one")


def test_every_evaluation_has_its_rows(ablation: Path) -> None:
    rows = evaluations(ablation).filter(pl.col("task") == "mqar").select("step", "split", "metric").rows()
    units = (ANSWER_ERRORS.unit, ANSWER_LOSS.unit)
    assert rows == [
        (step, split, unit) for step, split in [(2, "selection"), (4, "selection"), (4, "report")] for unit in units
    ]


def test_the_table_has_its_columns(ablation: Path) -> None:
    assert evaluations(ablation).schema == EVALUATION_SCHEMA


def test_cells_of_a_view_are_tasks_of_their_own(ablation: Path) -> None:
    assert set(evaluations(ablation)["task"]) == {"mqar", "mqar/length=16,pairs=2", "mqar/length=16,pairs=3"}


@pytest.mark.parametrize("split", ["selection", "report"])
def test_the_result_is_the_last_value_of_the_primary_metric(run: RunFolder, split: str) -> None:
    rows = [row for row in run.evaluations() if row["split"] == split and row["task"] == "mqar"]
    values = [row["value"] for row in rows if row["metric"] == ANSWER_ERRORS.unit]
    assert run.result()[f"{split}_value"] == values[-1]


def test_the_report_gives_the_primary_metric(run: RunFolder) -> None:
    assert ANSWER_ERRORS.of(run.report(run.record().metric)) == run.result()["report_value"]


def test_the_report_names_suite_and_task(run: RunFolder) -> None:
    report = pl.read_parquet(run.path / "report.parquet")
    assert report.select("suite", "task").unique().rows() == [("answers", "mqar")]


def test_the_suite_of_the_primary_metric_is_that_of_the_data() -> None:
    assert RunConfig.parse({**FIELDS, "evaluation": ["loss"]}).primary_suite.config.kind == "answers"


def test_without_further_suites_the_identity_has_no_field_for_them() -> None:
    assert "evaluation" not in RunConfig.parse(FIELDS).canonical()
