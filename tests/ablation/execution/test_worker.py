"""A worker and its trials' processes: those that end without a result, hang, or do not react."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.storage import ATTEMPTS
from workbench.ablation.execution.studies import slots
from workbench.ablation.execution.timing import Timing
from workbench.ablation.execution.worker import Worker
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

MakeWorker = Callable[..., Worker]


@pytest.fixture
def make_worker(ablation: Callable[..., Ablation]) -> MakeWorker:
    """A worker with one tuning trial to do, whose process runs ``trial`` instead of training."""

    def make(
        trial: Callable[..., object], cls: type[Worker] = Worker, timing: Timing | None = None, **launch: Any
    ) -> Worker:
        fields: dict[str, Any] = {"arms": {"full": {}}, "confirmation": {"seeds": [0]}}
        run = ablation(**fields, tuning={"trials": 1, "sampler": "random"}, launch=launch).create()
        return cls(run.files, timing or Timing(), run_trial=trial, start_method="fork")

    return make


def only_run(worker: Worker) -> RunFolder:
    (run,) = worker.folder.run_folders(Stage.TUNING)
    return run


def statuses(worker: Worker) -> list[str]:
    (trials,) = slots(worker.plan.study("full", Stage.TUNING)).values()
    return [trial.user_attrs["status"] for trial in trials]


# -- killed ------------------------------------------------------------------------------------------------------------


def die(*arguments: object) -> None:
    os._exit(3)


def test_a_trial_that_dies_before_it_trains_is_killed_not_interrupted(make_worker: MakeWorker) -> None:
    worker = make_worker(die)
    assert worker.take_trial()
    assert only_run(worker).status()["reason"] == "its process was killed (exit code 3)"


def test_an_earlier_interruption_is_not_taken_for_this_one(make_worker: MakeWorker) -> None:
    worker = make_worker(die)
    assert worker.take_trial()
    only_run(worker).set_status(Status.INTERRUPTED, "left by an earlier launch")
    assert worker.take_trial()
    assert statuses(worker) == ["killed", "killed"]


def test_a_killed_trial_is_started_a_limited_number_of_times(make_worker: MakeWorker) -> None:
    worker = make_worker(die)
    worker.work_until_done()
    assert statuses(worker) == ["killed"] * ATTEMPTS
    assert "killed" in worker.folder.failures()["full"]
    assert worker.folder.is_finished
    assert not worker.stopping


# -- hung --------------------------------------------------------------------------------------------------------------


def hang_in_here() -> None:
    while True:
        time.sleep(60)


def hang_once(path: str, *arguments: object) -> None:
    """Hang without reacting to SIGTERM; finish when started again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = RunFolder(path)
    log = os.open(run.path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.register(signal.SIGUSR1, file=log)
    with run.lock():
        run.set_status(Status.RUNNING, pid=os.getpid())
        if run.metrics():
            run.finish(Status.DONE, None, selection_value=1.0)
            return
        run.add_metrics({"step": 1, "selection_value": None})
        hang_in_here()


@pytest.fixture
def hung(make_worker: MakeWorker) -> Worker:
    worker = make_worker(hang_once, timing=Timing(stack_dump_timeout=0.5), hung_after=0.5)
    assert worker.take_trial()
    return worker


def test_a_trial_without_progress_is_killed_as_hung(hung: Worker) -> None:
    status = only_run(hung).status()
    assert status["status"] == Status.HUNG
    assert "no progress for" in status["reason"]


def test_a_hung_trial_dumps_its_stack(hung: Worker) -> None:
    assert "in hang_in_here" in (only_run(hung).path / "log.txt").read_text()


def test_a_hung_trial_is_retried(hung: Worker) -> None:
    assert hung.take_trial()
    assert statuses(hung) == ["hung", "done"]


class StopsOnceRunning(Worker):
    """A worker that is asked to stop as soon as its trial is running."""

    def should_stop(self) -> bool:
        running = (run.status()["status"] == Status.RUNNING for run in self.folder.run_folders(Stage.TUNING))
        self.stopping = self.stopping or any(running)
        return self.stopping


def test_a_trial_that_ignores_the_request_to_stop_is_killed(make_worker: MakeWorker) -> None:
    worker = make_worker(hang_once, cls=StopsOnceRunning, timing=Timing(stop_timeout=0.3))
    assert worker.take_trial()
    assert only_run(worker).status()["reason"] == "its process was killed (exit code -9)"


def full_disk(path: str, *arguments: object) -> None:
    RunFolder(path).set_status(Status.INTERRUPTED, "the disk is full")


def test_a_full_disk_ends_the_worker(make_worker: MakeWorker, capsys: pytest.CaptureFixture[str]) -> None:
    worker = make_worker(full_disk)
    assert worker.take_trial()
    assert worker.stopping
    assert "the disk is full" in capsys.readouterr().out


def test_a_run_held_by_another_process_is_waited_for(make_worker: MakeWorker) -> None:
    worker = make_worker(die, hung_after=0.3)
    run = worker.plan.create_run("full", Stage.TUNING, 1000, worker.plan.arms["full"].points[0], slot=0)
    with run.lock():
        assert worker.take_trial()
    assert statuses(worker) == ["hung"]


def test_a_run_that_has_a_result_is_not_trained_again(make_worker: MakeWorker) -> None:
    worker = make_worker(die)
    run = worker.plan.create_run("full", Stage.TUNING, 1000, worker.plan.arms["full"].points[0], slot=0)
    run.finish(Status.DONE, None, selection_value=0.25)
    assert worker.take_trial()
    assert worker.plan.study("full", Stage.TUNING).best_value == 0.25
