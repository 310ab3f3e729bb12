"""Counting and starting workers with a launcher in which nothing happens by itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.launchers.base import JobState, Launcher
from workbench.ablation.execution.pool import WorkerPool
from workbench.ablation.execution.roster import JOB
from workbench.ablation.execution.timing import Timing
from workbench.ablation.folder import AblationFolder

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]


class Queue(Launcher):
    """A launcher whose jobs change their state only by hand."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.states: dict[str, JobState] = {}

    def submit(self, folder: AblationFolder, names: Sequence[str]) -> list[str]:
        jobs = [str(len(self.states) + k) for k in range(len(names))]
        self.names |= dict(zip(jobs, names))
        self.states |= dict.fromkeys(jobs, JobState.QUEUED)
        return jobs

    def state(self, folder: AblationFolder, job: str) -> JobState:
        return self.states.get(job, JobState.ENDED)

    def cancel(self, folder: AblationFolder, jobs: Sequence[str]) -> None:
        for job in jobs:
            del self.states[job]


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def pool(ablation: Callable[..., Ablation], queue: Queue) -> WorkerPool:
    fields: dict[str, Any] = {"arms": {"full": {}}, "tuning": {"trials": 0}, "confirmation": {"seeds": [0]}}
    return WorkerPool(ablation(**fields).create().files, launcher=queue)


def test_queued_jobs_count_as_workers(pool: WorkerPool, queue: Queue) -> None:
    pool.start(2)
    assert pool.start(3) == ["2"]
    assert pool.waiting() == ["0", "1", "2"]
    assert not pool.workers()


def test_queued_jobs_are_waited_for(pool: WorkerPool) -> None:
    pool.start(1)
    assert not pool.wait(timeout=0.3)


def test_a_running_job_waits_until_its_worker_registers(
    pool: WorkerPool, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.start(2)
    queue.states = dict.fromkeys(queue.states, JobState.RUNNING)
    assert pool.waiting() == ["0", "1"]
    monkeypatch.setenv(JOB, queue.names["0"])
    with pool.roster.registered():
        assert pool.waiting() == ["1"]
        assert pool.workers() == [os.getpid()]
        assert pool.start(2) == []


def test_a_requeued_job_is_waiting_again(pool: WorkerPool, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.start(1)
    monkeypatch.setenv(JOB, queue.names["0"])
    with pool.roster.registered():
        assert pool.waiting() == ["0"], "queued"
    queue.states["0"] = JobState.RUNNING
    assert pool.waiting() == []
    queue.states["0"] = JobState.QUEUED
    assert pool.waiting() == ["0"]


def test_a_job_that_is_not_known_yet_is_waiting(pool: WorkerPool, queue: Queue) -> None:
    pool.start(1)
    queue.states["0"] = JobState.UNKNOWN
    assert pool.waiting() == ["0"]


def test_a_job_that_stays_unknown_is_lost(pool: WorkerPool, queue: Queue) -> None:
    pool.start(1)
    queue.states["0"] = JobState.UNKNOWN
    impatient = WorkerPool(pool.folder, replace(Timing(), job_lookup=0.0), queue)
    assert impatient.waiting() == []


def test_stopping_cancels_jobs_that_have_not_started(pool: WorkerPool, queue: Queue) -> None:
    pool.start(2)
    queue.states["1"] = JobState.ENDED
    assert pool.stop(wait=0) == []
    assert list(queue.states) == ["1"]
    assert pool.waiting() == []


def test_a_launch_that_is_stopped_before_it_starts_workers_starts_none(
    ablation: Callable[..., Ablation], queue: Queue
) -> None:
    run = ablation(arms={"full": {}}, tuning={"trials": 0}, confirmation={"seeds": [0]}).create()
    run.pool = WorkerPool(run.files, launcher=queue)
    WorkerPool(run.files, launcher=Queue()).stop(0)
    assert run.start_workers(2) == []
    assert len(run.start_workers(2)) == 2, "asked for after the stop"
