"""What a worker does about its trials' processes: the GPU it gives them, and how it ends with those that do not end well."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from helpers import ablation_fields, write_corpus
from optuna.artifacts import get_all_artifact_meta

from workbench.ablation.ablation import Ablation, visible_gpus
from workbench.ablation.execution import worker as workers
from workbench.ablation.execution.artifacts import LOG_END, artifact_store, attach
from workbench.ablation.execution.plan import TUNING
from workbench.ablation.execution.studies import ATTEMPTS, open_storage, slots
from workbench.ablation.execution.watchdog import Watchdog
from workbench.ablation.execution.worker import Worker
from workbench.results import RunFolder, RunRecord


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


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_without_progress_is_stopped_as_hung_and_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_at_first(path: str, *arguments: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        folder = RunFolder(path)
        log = os.open(folder.path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(signal.SIGUSR1, file=log)
        with folder.hold():
            folder.set_status("running", pid=os.getpid())
            if (folder.path / "metrics.jsonl").exists():
                folder.finish("done", None, selection_value=1.0)
                return
            folder.add_metrics({"step": 1, "selection_value": None})
            stuck_in_here()

    def stuck_in_here() -> None:
        while True:
            time.sleep(60)

    monkeypatch.setattr(workers, "SAYING", 0.5)
    worker = lone_worker(tmp_path, monkeypatch, hang_at_first, hung_after=0.5)
    assert worker._turn()
    (run,) = runs(worker)
    assert run.status()["status"] == "hung" and "no progress for" in run.status()["reason"]
    assert "in stuck_in_here" in (run.path / "log.txt").read_text()  # where it stood
    assert worker._turn()
    (trials,) = slots(worker.plan.study("full", TUNING)).values()
    assert [trial.user_attrs["status"] for trial in trials] == ["hung", "done"]

    # what optuna-dashboard shows of the two
    storage, store = worker.plan.storage, artifact_store(worker.run.folder)
    held = [get_all_artifact_meta(trial, storage=storage) for trial in trials]
    names = [sorted(meta.filename for meta in metas) for metas in held]
    assert names == [["log.txt", "metrics.jsonl", "run.json"], ["metrics.jsonl", "result.json", "run.json"]]
    for metas in held:
        for meta in metas:
            content = store.open_reader(meta.artifact_id).read()
            assert content == (run.path / meta.filename).read_bytes()


def test_a_hung_run_is_told_from_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run, look = RunFolder(tmp_path), 0.5
    dog = Watchdog(run, least=10)

    def silence(seconds: float) -> float | None:
        for _ in range(round(seconds / look)):
            now[0] += look
            if (silent := dog.silent()) is not None:
                return silent
        return None

    assert silence(9.5) is None and silence(1) == 10.5  # nothing is known of its pace
    for interval in (0.5, 8):
        dog = Watchdog(run, least=10)
        for step in range(5):
            run.add_metrics({"step": step})
            assert silence(interval) is None
        patience = max(10, 20 * interval)
        assert silence(patience - interval) is None and silence(1) == patience + 0.5
    dog = Watchdog(run, least=10)
    now[0] += 3600  # the watching process itself stood still
    assert dog.silent() is None and silence(5) is None and silence(0.5) == 10.5


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_full_disk_costs_the_artifacts_not_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = lone_worker(
        tmp_path, monkeypatch, lambda path, *arguments: RunFolder(path).finish("done", None, selection_value=1.0)
    )
    (worker.run.folder / "artifacts").write_text("no folder")
    assert worker._turn()
    (trials,) = slots(worker.plan.study("full", TUNING)).values()
    assert [trial.user_attrs["status"] for trial in trials] == ["done"] and not worker.stopping


def test_artifacts_keep_the_end_of_a_long_log_and_are_replaced(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", RunRecord(arm="full"))
    (run.path / "log.txt").write_text("".join(f"line {number}\n" for number in range(20_000)))
    study = optuna.create_study()
    trial = study.ask()
    for word in ("first", "second"):
        run.finish("crashed", word)
        attach(trial, run, tmp_path, failed=True)
    store = artifact_store(tmp_path)
    held = {meta.filename: store.open_reader(meta.artifact_id).read() for meta in get_all_artifact_meta(trial)}
    assert set(held) == {"run.json", "result.json", "log.txt"} and b"second" in held["result.json"]
    assert held["log.txt"].startswith(b"line ") and held["log.txt"].endswith(b"line 19999\n")
    assert len(held["log.txt"]) <= LOG_END and len(list((tmp_path / "artifacts").iterdir())) == 3


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_optuna_dashboard_lists_and_hands_out_artifacts(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    run = RunFolder.create(tmp_path / "run", RunRecord(arm="full"))
    study = optuna.create_study(storage=open_storage(tmp_path, 5))
    trial = study.ask()
    attach(trial, run, tmp_path, failed=False)
    study.tell(trial, 1.0)
    app = dashboard.wsgi(study._storage, artifact_store=artifact_store(tmp_path))

    def get(path: str) -> bytes:
        environment: dict[str, object] = {"PATH_INFO": path}
        setup_testing_defaults(environment)
        answered: list[str] = []
        body = b"".join(app(environment, lambda status, headers, *rest: answered.append(status)))
        assert answered == ["200 OK"], (answered, body)
        return body

    (told,) = json.loads(get(f"/api/studies/{study._study_id}"))["trials"]
    (artifact,) = told["artifacts"]
    assert artifact["filename"] == "run.json" and artifact["mimetype"] == "application/json"
    handed = get(f"/artifacts/{study._study_id}/{told['trial_id']}/{artifact['artifact_id']}")
    assert json.loads(handed) == {"arm": "full"}


def runs(worker: Worker) -> list[RunFolder]:
    return [RunFolder(path) for path in worker.run.folder.glob("runs/*")]


def lone_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: Callable[..., object], **launch: Any) -> Worker:
    """A worker with one tuning trial to do, whose process runs ``trial`` instead of training."""
    fields = ablation_fields(
        write_corpus(tmp_path / "corpus"),
        arms={"full": {}},
        confirmation={"seeds": [0]},
        tuning={"trials": 1, "sampler": "random"},
        launch=launch,
    )
    worker = Worker(Ablation.parse(fields, tmp_path / "results").create())
    worker.processes = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers, "_trial", trial)
    return worker
