"""Studies through the plan and a worker, without a trial's process: failures to learn from, lost databases."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import fail_stale_trials
from workbench.ablation.execution.timing import Timing
from workbench.ablation.execution.trial import Outcome
from workbench.ablation.execution.worker import Worker
from workbench.ablation.run import AblationRun
from workbench.ablation.search.samplers import INFEASIBLE
from workbench.config import ConfigError
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore::optuna.exceptions.ExperimentalWarning"),
]

RATE = {"training.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
HIDDEN = "model.feedforwards.swiglu.hidden"
Work = Callable[..., Worker]


@pytest.fixture
def search(ablation: Callable[..., Ablation]) -> Callable[..., AblationRun]:
    """A created ablation of one arm, with changes to its tuning."""

    def make(name: str = "test", **tuning: Any) -> AblationRun:
        fields: dict[str, Any] = {"arms": {"full": {}}, "confirmation": {"seeds": [0]}}
        tuning = {"trials": 6, "sampler": "random", "space": RATE, **tuning}
        return ablation(name, **fields, tuning=tuning).create()

    return make


def done(value: float) -> Outcome:
    return Outcome(Status.DONE, selection_value=value)


def tuning_trials(worker: Worker) -> list[optuna.trial.FrozenTrial]:
    return worker.plan.study("full", Stage.TUNING).trials


# -- what a sampler learns from ----------------------------------------------------------------------------------------

SCRIPT = {0: Outcome(Status.OUT_OF_MEMORY, "CUDA"), 1: Outcome(Status.DIVERGED, "NaN"), 2: done(0.5)}


@pytest.fixture
def worked(search: Callable[..., AblationRun], work: Work) -> Worker:
    return work(search(sampler="tpe", startup_trials=2).files, SCRIPT)


def test_a_failed_trial_keeps_its_status(worked: Worker) -> None:
    statuses = [trial.user_attrs["status"] for trial in tuning_trials(worked)[:3]]
    assert statuses == ["out_of_memory", "diverged", "done"]


def test_what_does_not_fit_is_infeasible(worked: Worker) -> None:
    assert [trial.constraints[INFEASIBLE] for trial in tuning_trials(worked)[:3]] == [1.0, -1.0, -1.0]


def test_a_failed_trial_is_infinitely_bad(worked: Worker) -> None:
    assert [trial.values[0] for trial in tuning_trials(worked)[:3]] == [math.inf, math.inf, 0.5]


def test_failures_do_not_hinder_the_choice(worked: Worker) -> None:
    choice = worked.folder.choices()["full"]
    assert (choice.selection_value, choice.done) == (0.5, 4)
    assert worked.folder.is_finished


def test_a_drawn_setting_off_the_budget_is_invalid_and_never_chosen(
    search: Callable[..., AblationRun], ablation: Callable[..., Ablation], work: Work
) -> None:
    # with one free trial, TPE draws the only other listed width, twice the matched one
    width = ablation(arms={"full": {}}).arms["full"].run().model.layers[0].feedforward.hidden  # type: ignore[attr-defined]
    space = {HIDDEN: {"values": [width, 2 * width]}}
    enqueue = [{HIDDEN: width}]
    run = search(sampler="tpe", trials=8, startup_trials=1, space=space, enqueue=enqueue)
    worker = work(run.files)
    invalid = [trial for trial in tuning_trials(worker) if trial.params[HIDDEN] == 2 * width]
    assert invalid
    for trial in invalid:
        assert trial.user_attrs["status"] == "invalid"
        assert f"tuning.space.{HIDDEN}" in trial.user_attrs["reason"]
        assert trial.constraints[INFEASIBLE] == 1.0
    assert run.selection()["full"]["hyperparameters"] == {HIDDEN: width}


def test_a_run_off_the_budget_is_refused(search: Callable[..., AblationRun]) -> None:
    plan = Plan(search().files)
    with pytest.raises(ConfigError, match=r"within 2.0% of the budget"):
        plan.create_run("full", Stage.CONFIRMATION, 0, {HIDDEN: 1024})


# -- warm starts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(search: Callable[..., AblationRun], work: Work) -> AblationRun:
    run = search("earlier")
    work(run.files, {0: Outcome(Status.CRASHED, "x")})
    return run


def test_a_warm_start_adds_the_finished_trials(
    search: Callable[..., AblationRun], work: Work, earlier: AblationRun
) -> None:
    run = search("new", sampler="tpe", warm_start=[str(earlier.folder)], trials=2)
    assert len(run.record.warm_start["full"]) == 5
    assert len(tuning_trials(work(run.files))) == 7
    assert run.selection()["full"]["trials"] == 2


def test_a_warm_start_needs_trials_inside_the_space(search: Callable[..., AblationRun], earlier: AblationRun) -> None:
    elsewhere = {"training.learning_rate": {"low": 0.5, "high": 0.6}}
    with pytest.raises(ConfigError, match=r"tuning.warm_start: got .*'full': 0"):
        search("none", sampler="tpe", warm_start=[str(earlier.folder)], space=elsewhere)


# -- lost databases and workers ----------------------------------------------------------------------------------------


def test_a_corrupt_database_loses_no_setting_that_a_sampler_drew(
    search: Callable[..., AblationRun], work: Work
) -> None:
    script = {3: done(0.25)}
    run = search(sampler="tpe", startup_trials=2)
    before = [trial.params for trial in tuning_trials(work(run.files, script))]
    database = run.folder / "study.db"
    database.write_bytes(database.read_bytes()[:5000])
    for path in run.folder.glob("study.db-*"):
        path.unlink()
    run.files.mark_finished(False)
    again = search(sampler="tpe", startup_trials=2)
    assert list(run.folder.glob("damaged-*-study.db"))
    restored = Plan(again.files).study("full", Stage.TUNING).trials
    assert [trial.system_attrs["fixed_params"] for trial in restored] == before
    work(again.files, script)
    assert again.selection()["full"]["hyperparameters"] == before[3]


def test_a_trial_taken_over_after_the_clock_jumped_ends_once_and_no_worker_with_it(
    search: Callable[..., AblationRun], work: Work
) -> None:
    run = search(trials=1)

    class Jumping(Worker):
        jumped = False

        def run(self, trial: optuna.Trial, folder: RunFolder, stage: Stage) -> Outcome:
            if not self.jumped:
                self.jumped = True
                with sqlite3.connect(self.folder.path / "study.db", timeout=60) as database:
                    database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
                fail_stale_trials(self.plan.study("full", stage))  # another worker looks
                trial.report(1.0, 1)
            return Outcome(Status.DONE, selection_value=1.0, report_value=1.0)

    worker = Jumping(run.files)
    worker.work_until_done()
    assert [trial.state for trial in tuning_trials(worker)] == [TrialState.FAIL, TrialState.COMPLETE]
    assert run.finished


class Unreachable(Worker):
    """A worker whose database fails the first ``failures`` times."""

    failures = 0

    def take_trial(self) -> bool:
        if self.failures:
            self.failures -= 1
            raise StorageInternalError("down")
        return False


def test_a_database_that_is_unreachable_for_a_moment_is_waited_for(search: Callable[..., AblationRun]) -> None:
    worker = Unreachable(search(trials=1).files, Timing(idle=0.001))
    worker.failures = 2
    worker.work_until_done()
    assert worker.failures == 0


def test_a_database_that_stays_unreachable_ends_the_worker(
    search: Callable[..., AblationRun], capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Unreachable(search(trials=1).files, Timing(idle=0.001, storage_timeout=0.05))
    worker.failures = 10**9
    worker.work_until_done()
    assert "the studies cannot be reached: down" in capsys.readouterr().out


def test_a_slow_worker_is_given_time_for_its_first_heartbeat(search: Callable[..., AblationRun]) -> None:
    plan = Plan(search(trials=1).files)
    plan.study("full", Stage.TUNING).ask()
    plan.advance()
    assert plan.next_study() is None


def test_a_trial_whose_worker_was_killed_before_its_first_heartbeat_is_retried(
    search: Callable[..., AblationRun], work: Work
) -> None:
    run = search(trials=1)
    Plan(run.files).study("full", Stage.TUNING).ask().set_user_attr("hyperparameters", "{}")
    worker = work(run.files, timing=replace(Timing(), idle=0.01, first_heartbeat=0.0))
    assert [trial.state for trial in tuning_trials(worker)] == [TrialState.FAIL, TrialState.COMPLETE]
    assert run.selection()["full"]["trials"] == 1


def test_a_worker_whose_folder_is_removed_ends_and_creates_nothing(
    search: Callable[..., AblationRun], tmp_path: Path
) -> None:
    import shutil

    run = search(trials=1)
    worker = Worker(run.files)
    shutil.rmtree(run.folder)
    worker.work_until_done()
    assert not run.folder.exists()
