"""Policies as arms: an ablation that trains nothing and decodes the runs of another one, as every command shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields
from typer.testing import CliRunner

import workbench as wb
from workbench.ablation.analysis.diagnostics import drift_table
from workbench.ablation.execution.worker import Worker
from workbench.cli import app
from workbench.data import tasks
from workbench.results.scores import READS

pytestmark = pytest.mark.process

DATA = {"kind": "mqar", "mixes": [{"length": 16, "pairs": 2}], "examples": 16}
SUITE = {"kind": "answers", "name": "longer", "data": {**DATA, "mixes": [{"length": 32, "pairs": 2}]}}
TRAINING = {"tokens": 10 * 64, "evaluations": 2}
SEEDS = [0, 1, 2, 3]


def fields(name: str, arms: dict[str, Any], folder: Path, **base: Any) -> dict[str, Any]:
    changed = ablation_fields(folder, name=name, confirmation={"seeds": SEEDS}, tuning={"trials": 0})
    changed["base"] |= {"data": DATA, **base}
    changed["base"]["training"] |= TRAINING | base.get("training", {})
    changed["base"]["model"] |= {"vocabulary": 40}
    return {**changed, "arms": arms, "baseline": next(iter(arms)), "question": "what does reading less cost?"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> wb.AblationRun:
    folder = tmp_path_factory.mktemp("results")
    training = dict(ablation_fields(folder)["base"]["training"])
    arms = {
        "dense": {"decoding.policy": "dense"},
        "streaming": {"decoding.policy": {"kind": "streaming", "tokens": 4, "sink": 1}},
        "eight bits": {"decoding.cache_dtype": "int8"},
    }
    start = {"folder": str(folder / "source"), "arm": "full"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "OVERLAP_ROWS", 20)
        source = wb.Ablation.parse(fields("source", {"full": {}}, folder), folder).create()
        Worker(source.files).work_until_done()
        decoded = fields("decoded", arms, folder, start=start, training={**training, "tokens": 0}, evaluation=[SUITE])
        launched = wb.Ablation.parse(decoded, folder).create()
        Worker(launched.files).work_until_done()
    return launched


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_arms_are_paired_by_seed(run: wb.AblationRun) -> None:
    verdict = run.verdict()
    assert verdict is not None
    assert [(row.seeds, row.difference is None) for row in verdict.rows] == [(4, True), (4, False), (4, False)]


def test_runs_that_train_nothing_have_no_speed(run: wb.AblationRun) -> None:
    assert drift_table(run)["tokens_per_second"].to_list() == [None] * len(SEEDS)


def test_the_cost_card_has_caches_as_the_policy_makes_them(run: wb.AblationRun) -> None:
    card = {row["arm"]: row for row in run.cost().iter_rows(named=True)}
    dense, streaming, eight = (card[arm]["cache_bytes"] for arm in ("dense", "streaming", "eight bits"))
    assert dense < streaming and eight < 0.6 * dense
    assert "cache bytes" in card["eight bits"]["mismatch"]


@pytest.mark.parametrize("name", ["verdict", "scores", "table", "report"])
def test_commands_print_it(run: wb.AblationRun, name: str) -> None:
    assert command(name, str(run.folder))


def test_the_table_of_a_paper_is_written(run: wb.AblationRun, tmp_path: Path) -> None:
    command("paper-table", str(run.folder), "--output", str(tmp_path / "table.tex"))
    assert "streaming" in (tmp_path / "table.tex").read_text()


def test_suites_are_measured_through_the_policy(run: wb.AblationRun) -> None:
    losses = run.scores().filter(pl.col("metric") == "bits per answer", pl.col("document").is_null())
    by_arm = {arm: part["value"].to_list() for (arm,), part in losses.group_by("arm")}
    assert by_arm["dense"] != by_arm["streaming"] != by_arm["eight bits"] != by_arm["dense"]
    assert READS in run.scores()["suite"]


def test_a_suite_that_comes_later_is_measured_through_the_policy(
    run: wb.AblationRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    text = f"{{kind: answers, name: later, data: {SUITE['data']}}}"
    command("evaluate", str(run.folder), text)
    of_arms = pl.col("document").is_null() & pl.col("suite").is_in(["longer", "later"])
    values = run.scores().filter(of_arms).group_by("arm", "seed", "metric").agg(pl.col("value").n_unique())
    assert values["value"].to_list() == [1] * len(values)
