"""Workers placed by engines: submitit's stand-in for Slurm for real, a queue and a Ray cluster that are made up."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation import run as ablation_run
from workbench.ablation.ablation import Ablation
from workbench.ablation.execution import launchers
from workbench.ablation.run import JOB, AblationRun
from workbench.config import ConfigError

FEW: dict[str, Any] = {
    "arms": {"full": {}},
    "tuning": {"trials": 1, "sampler": "random"},
    "confirmation": {"seeds": [0]},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def create(corpus: Path, results: Path, **launch: Any) -> AblationRun:
    return Ablation.parse(ablation_fields(corpus, launch={"workers": 2, **launch}, **FEW), results).create()


def test_the_same_workers_run_as_jobs_of_submitit(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    run = create(corpus, tmp_path, launcher="slurm", options={"cluster": "local", "timeout_min": 10})
    assert run.start_workers(1) == []
    assert run.waiting_workers() or run.workers() or run.finished  # from the moment on at which it has been asked for
    assert run.wait(500) and set(run.runs()["status"]) == {"done"} and run.runs().height == 2
    with pytest.raises(ConfigError, match=r"launch.options: got .*nonsense"):
        create(corpus, tmp_path / "two", launcher="slurm", options={"cluster": "local", "nonsense": 1}).start_workers(1)


class Queue:
    """An engine in which nothing happens by itself."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.states: dict[str, str] = {}

    def submit(self, folder: Path, names: list[str]) -> list[str]:
        new = [str(len(self.states) + k) for k in range(len(names))]
        self.names |= dict(zip(new, names))
        self.states |= dict.fromkeys(new, "queued")
        return new

    def state(self, folder: Path, job: str) -> str:
        return self.states.get(job, "ended")

    def cancel(self, folder: Path, jobs: list[str]) -> None:
        for job in jobs:
            del self.states[job]


def test_waiting_jobs_count_and_are_taken_back(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(launchers, "launcher", lambda launch: queue)
    run = create(corpus, tmp_path)
    run.start_workers(2)
    run.start_workers(3)  # a second call asks for what is missing only
    assert list(queue.states) == run.waiting_workers() == ["0", "1", "2"] and not run.workers()
    assert not run.wait(timeout=0.3)  # jobs in the queue are waited for
    # a job that the engine has begun is on its way until its worker is at work
    queue.states["0"] = queue.states["1"] = "running"
    monkeypatch.setenv(JOB, queue.names["0"])
    with run.enlisted():
        assert run.waiting_workers() == ["1", "2"] and run.workers() == [os.getpid()]
        run.start_workers(3)
        assert len(queue.states) == 3
    assert run.waiting_workers() == ["1", "2"]
    queue.states["0"] = "queued"  # a time limit has put it back
    assert run.waiting_workers() == ["0", "1", "2"]
    queue.states["2"] = "unknown"  # one that was just asked for may not be known yet
    assert run.waiting_workers() == ["0", "1", "2"]
    monkeypatch.setattr(ablation_run, "ANSWERED", 0.0)
    assert run.waiting_workers() == ["0", "1"]
    queue.states["1"] = "ended"
    assert run.stop(0) == [] and not run.waiting_workers() and list(queue.states) == ["1", "2"]


class Client:
    """What the Ray launcher uses of ``ray.job_submission.JobSubmissionClient``."""

    submitted: list[dict[str, Any]] = []
    status = "PENDING"

    def __init__(self, address: str):
        if address != "http://head:8265":
            raise ConnectionError(f"Failed to connect to Ray at address: {address}.")

    def submit_job(self, *, entrypoint: str, entrypoint_num_gpus: float = 0) -> str:
        self.submitted.append({"entrypoint": entrypoint, "gpus": entrypoint_num_gpus})
        return f"job{len(self.submitted)}"

    def get_job_status(self, job: str) -> Any:
        return types.SimpleNamespace(value=self.status)

    def stop_job(self, job: str) -> bool:
        raise RuntimeError("it has ended")


def test_ray_is_given_the_worker_command_and_a_share_of_a_gpu(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("ray.job_submission")
    module.JobSubmissionClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)
    ray = launchers.Ray({"address": "http://head:8265", "entrypoint_num_gpus": 0.5})
    jobs = ray.submit(tmp_path / "a b", ["one", "two"])
    assert jobs == ["job1", "job2"] and ray.state(tmp_path, "job1") == "queued"
    call = Client.submitted[0]["entrypoint"]
    assert (
        Client.submitted[0]["gpus"] == 0.5
        and call.endswith(f"worker '{tmp_path}/a b'")
        and call.startswith(f"{JOB}=one ")
    )
    ray.cancel(tmp_path, jobs)
    for status, state in (("RUNNING", "running"), ("SUCCEEDED", "ended"), ("FAILED", "ended"), ("STOPPED", "ended")):
        monkeypatch.setattr(Client, "status", status)
        assert ray.state(tmp_path, "job1") == state
    with pytest.raises(ConfigError, match=r"launch.options: got 'Failed to connect"):
        launchers.Ray({})
    with pytest.raises(ConfigError, match=r"launch.options"):
        launchers.Ray({"address": "http://head:8265", "nonsense": 1}).submit(tmp_path, ["one"])


def test_an_engine_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'workbench\[slurm\]'"):
        launchers.launcher({"launcher": "slurm", "options": {}})


def test_how_the_work_is_carried_out_may_change_between_two_calls(corpus: Path, tmp_path: Path) -> None:
    run = create(corpus, tmp_path)
    again = create(corpus, tmp_path, workers=5, heartbeat=3)
    assert again.about["workers"] == 5 and again.about["config"]["launch"]["heartbeat"] == 3
    assert again.about["identity"] == run.about["identity"] and AblationRun(run.folder).about == again.about
