"""What a worker does about its trials' processes: the GPU it gives them, and how it ends with those that do not end well."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation import worker as workers
from workbench.ablation.ablation import Ablation, visible_gpus
from workbench.ablation.plan import TUNING
from workbench.ablation.study import ATTEMPTS, slots
from workbench.ablation.worker import Worker
from workbench.results.store import RunFolder


def test_workers_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f/2")
    assert visible_gpus() == ["3", "GPU-5f/2"]
    run = Ablation.parse(ablation_fields(write_corpus(tmp_path / "corpus")), tmp_path / "results").create()
    assert run.about["gpus"] == ["3", "GPU-5f/2"]
    workers = [Worker(run) for _ in range(5)]
    with ExitStack() as stack:
        seen = []
        for worker in workers:
            stack.enter_context(worker._gpu())
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert seen == ["3", "GPU-5f/2", "3", "GPU-5f/2", "3"]
    with workers[0]._gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_without_gpus_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = Ablation.parse(ablation_fields(write_corpus(tmp_path / "corpus")), tmp_path / "results").create()
    run.about["gpus"] = []
    with Worker(run)._gpu():
        assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_that_dies_before_it_runs_is_killed_not_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = lone_worker(tmp_path, monkeypatch, lambda *arguments: os._exit(3))
    assert worker._turn()
    (run,) = runs(worker)
    assert run.status()["reason"] == "its process was killed (exit code 3)"
    run.set_status("interrupted", "left by an earlier launch")
    turns = 1
    while worker._turn():
        turns += 1
        assert turns < 10 and not worker.stopping
    (trials,) = slots(worker.plan.study("full", TUNING)).values()
    assert [trial.user_attrs["status"] for trial in trials] == ["killed"] * ATTEMPTS
    assert worker.run.finished and "killed" in worker.run.failures()["full"] and not worker.stopping


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_hung_trial_is_killed_when_its_worker_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(path: str, *arguments: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with RunFolder(path).hold():
            RunFolder(path).set_status("running", pid=os.getpid())
            while True:
                time.sleep(60)

    worker = lone_worker(tmp_path, monkeypatch, hang)
    monkeypatch.setattr(workers, "GRACE", 0.3)
    monkeypatch.setattr(
        worker, "_asked_to_stop", lambda: any(run.status()["status"] == "running" for run in runs(worker))
    )
    assert worker._turn()
    (run,) = runs(worker)
    assert run.status()["reason"] == "its process was killed (exit code -9)"


def runs(worker: Worker) -> list[RunFolder]:
    return [RunFolder(path) for path in worker.run.folder.glob("runs/*")]


def lone_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: Callable[..., None]) -> Worker:
    """A worker with one tuning trial to do, whose process runs ``trial`` instead of training."""
    fields = ablation_fields(write_corpus(tmp_path / "corpus"), arms={"full": {}}, confirmation={"seeds": [0]},
                             tuning={"trials": 1, "sampler": "random"})  # fmt: skip
    worker = Worker(Ablation.parse(fields, tmp_path / "results").create())
    worker.processes = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers, "_trial", trial)
    return worker
