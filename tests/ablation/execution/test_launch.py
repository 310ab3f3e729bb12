"""Launching: workers, kills, second calls. Real processes on small models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields
from optuna.trial import TrialState
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.run import AblationRun, table
from workbench.cli import watching
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.status import Stage

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

LONG = {"training": {"tokens": 300 * 64, "checkpoint_every": 25, "log_every": 5}}
# where something else than the comparison is tested: one arm, one tuning trial, one seed
FEW: dict[str, Any] = {
    "arms": {"full": {}},
    "tuning": {"trials": 1, "sampler": "random"},
    "confirmation": {"seeds": [0]},
}
WAIT = 500  # seconds; a loaded machine with a slow disk is no failure
Make = Callable[..., Ablation]


def until(condition: Callable[[], Any], seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def result_times(run: AblationRun) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run.folder.glob("runs/*/result.json")}


def starts(run: AblationRun) -> list[int]:
    return [path.read_text().count('"started"') for path in run.folder.glob("runs/*/events.jsonl")]


# -- one finished ablation ---------------------------------------------------------------------------------------------


def test_every_planned_run_is_done(finished: AblationRun) -> None:
    assert finished.runs()["status"].to_list() == ["done"] * finished.total
    assert finished.total == 10


def test_every_run_was_started_once(finished: AblationRun) -> None:
    assert starts(finished) == [1] * finished.total


@pytest.mark.parametrize(("stage", "num_slots"), [(Stage.TUNING, 2), (Stage.CONFIRMATION, 3)])
@pytest.mark.parametrize("arm", ["full", "sliding"])
def test_every_slot_has_one_complete_trial(finished: AblationRun, arm: str, stage: Stage, num_slots: int) -> None:
    by_slot = slots(Plan(finished.files).study(arm, stage))
    assert len(by_slot) == num_slots
    assert [[trial.state for trial in trials] for trials in by_slot.values()] == [[TrialState.COMPLETE]] * num_slots
    assert len({trials[0].user_attrs["run"] for trials in by_slot.values()}) == num_slots


def test_the_chosen_setting_has_the_smallest_selection_value(finished: AblationRun) -> None:
    tuned = finished.runs().filter((pl.col("arm") == "full") & (pl.col("stage") == Stage.TUNING))
    assert finished.selection()["full"]["selection_value"] == tuned["selection_value"].min()
    assert finished.runs().filter("selected").height == 2


def test_the_verdict_is_over_all_seeds(finished: AblationRun) -> None:
    verdict = finished.verdict()
    assert verdict is not None
    assert [row.seeds for row in verdict.rows] == [3, 3]
    assert verdict.rows[1].verdict in ("better", "worse", "undecided")


def test_the_verdicts_value_is_the_mean_over_the_report_runs(finished: AblationRun) -> None:
    verdict = finished.verdict()
    assert verdict is not None
    confirmed = finished.runs().filter((pl.col("arm") == "full") & (pl.col("stage") == Stage.CONFIRMATION))
    assert verdict.rows[0].value == pytest.approx(confirmed["report_value"].mean(), rel=1e-9)


def test_runs_of_all_ablations_are_one_table(finished: AblationRun) -> None:
    assert table(finished.folder.parent).height == 10


def test_curves_are_logged(finished: AblationRun) -> None:
    assert finished.curves().height > 10


# -- second launches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(finished: AblationRun, tmp_path: Path) -> AblationRun:
    """A copy of the finished ablation, to be changed."""
    shutil.copytree(finished.folder.parent, tmp_path, dirs_exist_ok=True)
    return AblationRun(tmp_path / "test")


def test_a_second_launch_repeats_nothing(copied: AblationRun, ablation: Make) -> None:
    before = result_times(copied)
    assert ablation().launch().finished
    assert result_times(copied) == before


def test_a_lost_database_repeats_nothing(copied: AblationRun, ablation: Make) -> None:
    before, verdict = result_times(copied), str(copied.verdict())
    for path in copied.folder.glob("study.db*"):
        path.unlink()
    copied.files.mark_finished(False)
    again = ablation().launch()
    assert again.wait(WAIT)
    assert result_times(again) == before
    assert str(again.verdict()) == verdict


def test_the_same_name_with_other_arms_is_refused_with_the_difference(ablation: Make) -> None:
    run = ablation().create()
    arms = {"full": {}, "sliding": {"model.pattern": "sliding", "model.mixers.sliding.window": 5}}
    with pytest.raises(ConfigError) as raised:
        ablation(arms=arms).create()
    text = str(raised.value)
    assert "name: got" in text
    assert "window: 4 there, 5 here" in text
    assert str(run.folder) in text


def test_more_workers_share_the_machine(ablation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    asked = ablation()
    assert asked.threads == 16
    assert asked.with_workers(8).threads == 4
    assert asked.with_workers(8).config.identity == asked.config.identity


def test_ranks_of_a_run_share_its_part_of_the_machine(ablation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    asked = ablation(launch={"devices": 2, "workers": 0})
    assert (asked.workers, asked.threads) == (1, 16)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert (asked.workers, asked.threads) == (4, 4), "a worker for each pair of GPUs"


def test_fewer_workers_leave_the_threads(ablation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    assert ablation().with_workers(1).threads == 16


# -- kills and stops ---------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_its_trial_resumes(ablation: Make) -> None:
    run = ablation(base=LONG, **FEW).launch(workers=1)  # trials have one thread, as with two
    until(lambda: run.runs()["step"].sum() > 30)
    (victim,) = run.workers()
    os.kill(victim, signal.SIGKILL)
    until(lambda: not run.workers())
    assert not run.finished
    run.start_workers(1)  # no relaunch: the heartbeat alone must bring the trial back
    assert run.wait(WAIT)
    assert set(run.runs()["status"]) == {"done"}
    assert any('"resumed"' in path.read_text() for path in run.folder.glob("runs/*/events.jsonl"))
    trials = Plan(run.files).study("full", Stage.TUNING).get_trials()
    (retried,) = [trial for trial in trials if "failed_trial" in trial.system_attrs]
    assert retried.state == TrialState.COMPLETE

    # the resumed trial and the verdict are those of an undisturbed ablation
    whole = ablation("whole", base=LONG, **FEW).launch()
    assert whole.wait(WAIT)
    # on a loaded machine a heartbeat may be missed, so that this trial is taken up again as well
    (same,) = Plan(whole.files).study("full", Stage.TUNING).get_trials(states=[TrialState.COMPLETE])
    assert same.params == retried.params
    assert same.intermediate_values == retried.intermediate_values
    assert same.value == retried.value
    assert [row.value for row in whole.verdict().rows] == [row.value for row in run.verdict().rows]  # type: ignore[union-attr]


def test_a_killed_trial_is_resumed_by_its_worker(ablation: Make) -> None:
    run = ablation(base=LONG, **FEW).launch(workers=1)
    until(lambda: run.runs()["step"].sum() > 30)
    (path,) = [p for p in run.folder.glob("runs/*/status.json") if '"running"' in p.read_text()]
    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
    assert run.wait(WAIT)
    assert set(run.runs()["status"]) == {"done"}
    assert '"resumed"' in (path.parent / "events.jsonl").read_text()


def test_workers_that_have_started_are_listed(ablation: Make) -> None:
    run = ablation().create()
    assert len(run.start_workers()) == len(run.workers()) == 2
    assert not run.start_workers(), "live workers count"
    assert run.stop(WAIT) == []


def test_stopped_at_once_no_worker_stays(ablation: Make) -> None:
    run = ablation().create()
    run.start_workers()
    run.stop(WAIT)
    assert run.workers() == []
    assert not run.finished


def test_a_stopped_ablation_is_resumed_by_the_same_call(ablation: Make) -> None:
    run = ablation(base=LONG, **FEW).launch()
    until(lambda: run.runs()["step"].sum() > 20)
    run.stop(WAIT)
    statuses = set(run.runs()["status"])
    assert "interrupted" in statuses
    assert "killed" not in statuses
    again = ablation(base=LONG, **FEW).launch()
    assert again.wait(WAIT)
    assert set(again.runs()["status"]) == {"done"}


# -- the command line --------------------------------------------------------------------------------------------------


def command(tmp_path: Path, *arguments: str) -> list[str]:
    results = str(tmp_path / "results")
    return [sys.executable, "-m", "workbench", "run", str(tmp_path / "ablation.yaml"), "--results", results, *arguments]


def test_ctrl_c_in_the_command_line_stops_after_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "ablation.yaml", ablation_fields(corpus, base=LONG))  # JSON is YAML
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    folder = tmp_path / "results" / "test"
    until(lambda: (folder / "ablation.json").exists() and AblationRun(folder).runs()["step"].sum() > 20)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 130, output
    assert "The same command resumes" in output
    assert "Traceback" not in output
    assert not AblationRun(folder).workers()
    assert list(folder.glob("runs/*/checkpoint/step-*"))


def test_two_launches_at_once_share_the_work(corpus: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "ablation.yaml", ablation_fields(corpus, confirmation={"seeds": [0]}))
    call = command(tmp_path, "--detach")
    processes = [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0, output
    run = AblationRun(tmp_path / "results" / "test")
    assert run.wait(WAIT)
    assert run.runs()["status"].to_list() == ["done"] * run.total
    assert starts(run) == [1] * run.total


def test_a_pilot_stops_its_workers_on_ctrl_c(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: AblationRun) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching, "follow", interrupted)
    done = pilot(corpus, tmp_path)
    assert done.exit_code == 130
    assert "The same command resumes" in done.output
    assert not AblationRun(tmp_path / "results" / "test-pilot").workers()


def test_an_unfinished_pilot_is_an_error(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "follow", lambda run: run.stop(WAIT))
    done = pilot(corpus, tmp_path)
    assert done.exit_code == 1
    assert "Not finished" in done.output


def pilot(corpus: Path, tmp_path: Path) -> Any:
    write_json(tmp_path / "ablation.yaml", ablation_fields(corpus, base=LONG, launch={"measure": False, "workers": 1}))
    call = ["pilot", str(tmp_path / "ablation.yaml"), "--results", str(tmp_path / "results"), "--seeds", "2"]
    return CliRunner().invoke(cli.app, call)


def test_watching_without_a_worker_is_an_error(ablation: Make) -> None:
    run = ablation(**FEW).create()
    watched = CliRunner().invoke(cli.app, ["watch", str(run.folder)])
    assert watched.exit_code == 1
    assert "No worker is alive" in watched.output


def test_a_folder_removed_while_it_is_watched_is_reported(ablation: Make) -> None:
    run = ablation(**FEW).create()
    shutil.rmtree(run.folder)
    with pytest.raises(ConfigError, match="removed meanwhile"):
        watching.follow(run)


def test_a_table_of_no_runs_is_an_error(tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli.app, ["table", "--results", str(tmp_path)])
    assert printed.exit_code == 1
    assert "No run below" in printed.output


# -- failed arms -------------------------------------------------------------------------------------------------------

WILD: dict[str, Any] = {
    "arms": {"full": {}, "wild": {"training.learning_rate": 1e300}},
    "tuning": {"trials": 1, "sampler": "random", "space": {"training.weight_decay": {"low": 0.1, "high": 0.2}}},
    "confirmation": {"seeds": [0, 1]},
}


@pytest.fixture(scope="module")
def wild(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> AblationRun:
    """A finished ablation in which one arm diverges."""
    run = Ablation.parse(ablation_fields(corpus, **WILD), tmp_path_factory.mktemp("wild")).launch()
    assert run.wait(WAIT)
    return run


def test_a_diverged_arm_stays_in_the_table(wild: AblationRun) -> None:
    (row,) = wild.runs().filter(pl.col("arm") == "wild").iter_rows(named=True)
    assert row["status"] == "diverged"
    assert "step" in row["reason"]


def test_a_diverged_arm_stays_in_the_verdict(wild: AblationRun) -> None:
    verdict = wild.verdict()
    assert verdict is not None
    assert {row.arm: row.verdict for row in verdict.rows} == {"full": "baseline", "wild": "failed"}
    assert "every tuning trial failed" in verdict.rows[1].sentence


def test_a_diverged_run_is_not_retried(wild: AblationRun, corpus: Path) -> None:
    before = result_times(wild)
    assert Ablation.parse(ablation_fields(corpus, **WILD), wild.folder.parent).launch().finished
    assert result_times(wild) == before


def test_one_arm_gives_a_verdict_about_itself(ablation: Make, work: Callable[..., Any]) -> None:
    run = ablation(arms={"full": {}}, tuning={"trials": 0}, confirmation={"seeds": [0, 1]}).launch()
    assert run.wait(WAIT)
    verdict = run.verdict()
    assert verdict is not None
    assert [row.verdict for row in verdict.rows] == ["baseline"]
