"""What is still to do, judged from the studies alone: no process is started."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import polars as pl
import pytest
from helpers import ablation_fields, write_corpus
from optuna.trial import TrialState
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import CONFIRMATION, TUNING, Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.execution.worker import Worker
from workbench.ablation.run import AblationRun
from workbench.cli import watching
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results.store import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def ablation(corpus: Path, results: Path) -> Ablation:
    return Ablation.parse(ablation_fields(corpus, arms={"full": {}}, confirmation={"seeds": [0]}), results)


def end_one(plan: Plan, stage: str, status: str, value: float = 1.0) -> RunFolder:
    """Take the next trial of a stage and end it, as a worker would."""
    study = plan.study("full", stage)
    trial = study.ask()
    seed = trial.user_attrs.get("seed", plan.config.tuning.seed)
    params = (
        {"training.learning_rate": trial.suggest_categorical("training.learning_rate", [2e-3, 8e-3])}
        if stage == TUNING
        else {}
    )
    folder = plan.folder_for("full", stage, seed, params)
    trial.set_user_attr("run", folder.path.name)
    if status == "done":
        folder.finish("done", selection_value=value)
        study.tell(trial, value)
    else:
        folder.finish(status, "why") if status == "crashed" else folder.set_status(status, "why")
        trial.set_user_attr("status", status)
        study.tell(trial, state=TrialState.FAIL)
    plan.advance()
    return folder


def open_slots(plan: Plan, stage: str) -> list[int]:
    return [slot for slot, trials in slots(plan.study("full", stage)).items() if trials[-1].state == TrialState.WAITING]


def test_an_interrupted_trial_is_taken_up_again_by_whoever_works(corpus: Path, tmp_path: Path) -> None:
    plan = Plan(ablation(corpus, tmp_path).create())
    end_one(plan, TUNING, "done")
    end_one(plan, TUNING, "interrupted")
    assert open_slots(plan, TUNING) == [1] and not plan.run.selection() and not plan.run.finished
    end_one(plan, TUNING, "done", 0.5)
    chosen = plan.run.selection()["full"]
    assert chosen["selection_value"] == 0.5 and chosen["done"] == 2
    assert open_slots(plan, CONFIRMATION) == [0]


def test_what_crashed_is_tried_again_when_the_user_starts_again(corpus: Path, tmp_path: Path) -> None:
    plan = Plan(ablation(corpus, tmp_path).create())
    first = end_one(plan, TUNING, "crashed")
    assert not plan.run.finished and open_slots(plan, TUNING) == [1]
    end_one(plan, TUNING, "crashed")
    assert plan.run.finished and "every tuning trial failed (crashed, crashed)" in plan.run.failures()["full"]
    plan.advance()
    assert plan.run.finished

    run = ablation(corpus, tmp_path).create()  # the variant's mistake is mended; the same command
    assert not run.finished and not run.selection() and open_slots(plan, TUNING) == [0, 1]
    assert not first.result() and first.status()["status"] == "interrupted"
    end_one(plan, TUNING, "done")
    end_one(plan, TUNING, "done", 0.5)
    confirmed = end_one(plan, CONFIRMATION, "crashed")
    assert run.finished
    assert not ablation(corpus, tmp_path).create().finished and not confirmed.result()
    end_one(plan, CONFIRMATION, "done")
    assert ablation(corpus, tmp_path).create().finished


def test_a_tuning_trial_that_crashed_before_the_choice_does_not_change_it_later(corpus: Path, tmp_path: Path) -> None:
    plan = Plan(ablation(corpus, tmp_path).create())
    end_one(plan, TUNING, "crashed")
    end_one(plan, TUNING, "done")
    chosen = plan.run.selection()
    assert ablation(corpus, tmp_path).create().selection() == chosen
    assert not open_slots(plan, TUNING) and open_slots(plan, CONFIRMATION) == [0]


@pytest.mark.parametrize("change", [{}, {"margin": 0.01, "deviation": "a reviewer asked"}])
def test_a_second_launch_says_how_the_work_is_carried_out(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = ablation(corpus, tmp_path).create().about
    assert before["storage_key"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("workbench.ablation.ablation.usable_cores", lambda: 12)
    monkeypatch.setattr("workbench.ablation.ablation.Plan", Mock())  # no database is there
    launch = {"workers": 3, "storage": "postgresql://me@host/studies"}
    again = Ablation.parse(
        ablation_fields(corpus, arms={"full": {}}, confirmation={"seeds": [0]}, launch=launch, **change), tmp_path
    )
    about = again.create().about
    assert about["config"]["launch"] == again.config.launch.plain() and len(about["storage_key"]) == 8
    assert (about["workers"], about["threads"], about["gpus"]) == (3, 4, ["4", "7"])
    assert again.create().about["storage_key"] == about["storage_key"]


def test_workers_with_the_same_process_number_in_two_containers_are_two(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ablation(corpus, tmp_path).create()
    with ExitStack() as stack:
        for host in ("here", "there.cluster"):
            monkeypatch.setattr("socket.gethostname", lambda host=host: host)
            stack.enter_context(run.enlisted())
        assert run.workers() == [os.getpid(), os.getpid()]
    assert run.workers() == []


def test_a_finished_ablation_has_a_verdict_though_a_run_never_began(corpus: Path, tmp_path: Path) -> None:
    fields = ablation_fields(corpus, tuning={"trials": 0})
    run = Ablation.parse(fields, tmp_path).create()
    for arm, seed in (("full", 0), ("full", 1), ("full", 2), ("sliding", 0), ("sliding", 1)):
        folder = Plan(run).folder_for(arm, CONFIRMATION, seed, {})
        measured = {run.metric.numerator: [1.0 + seed, 2.0], run.metric.denominator: [10, 20]}
        pl.DataFrame(measured).write_parquet(folder.path / "report.parquet")
        folder.finish("done", report_value=0.1)
    assert run.verdict() is None
    write_json(run.folder / "finished.json", {"identity": run.about["identity"]})
    verdict = run.verdict()
    assert verdict is not None and [row.arm for row in verdict.rows] == ["full", "sliding"]
    assert "no result" in str(verdict), str(verdict)


def test_a_pilot_stops_its_workers_on_ctrl_c_and_fails_unfinished(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "ablation.yaml", ablation_fields(corpus, launch={"measure": False}))  # JSON is YAML
    call = ["pilot", str(tmp_path / "ablation.yaml"), "--results", str(tmp_path / "results"), "--seeds", "2"]
    start, stop = Mock(), Mock(return_value=[])
    monkeypatch.setattr(AblationRun, "start_workers", start)
    monkeypatch.setattr(AblationRun, "stop", stop)
    monkeypatch.setattr(watching, "follow", Mock(side_effect=[KeyboardInterrupt, None]))
    stopped = CliRunner().invoke(cli.app, call)
    assert stopped.exit_code == 130 and "The same command goes on" in stopped.output and stop.called
    unfinished = CliRunner().invoke(cli.app, call)
    assert unfinished.exit_code == 1 and "Not finished" in unfinished.output
    assert start.call_count == 2 and stop.call_count == 1


def test_prepared_data_that_was_removed_is_made_again(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run = ablation(corpus, tmp_path / "results").create()
    shutil.rmtree(tmp_path / "results" / "cache")
    ablation(corpus, tmp_path / "results").create()
    assert (tmp_path / "results" / "cache" / run.about["data"]["full"] / "card.json").exists()
    shutil.rmtree(tmp_path / "results" / "cache")
    (corpus / "000.txt").write_text("something else")
    with pytest.raises(ConfigError, match=r"arms.full.data: got 'data that has changed since the launch"):
        ablation(corpus, tmp_path / "results").create()


def test_an_ablation_whose_folder_is_gone_is_told_to_those_who_watch(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path).create()
    watched = CliRunner().invoke(cli.app, ["watch", str(run.folder)])
    assert watched.exit_code == 1 and "No worker is at work" in watched.output
    worker = Worker(run)
    shutil.rmtree(run.folder)
    worker._work()  # ends, and brings no folder back
    assert not run.folder.exists()
    with pytest.raises(ConfigError, match="removed meanwhile"):
        watching.follow(run)
    table = CliRunner().invoke(cli.app, ["table", "--results", str(tmp_path)])
    assert table.exit_code == 1 and "No run below" in table.output
