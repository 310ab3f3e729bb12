"""Which workers are alive, and requests that they stop.

workers/HOST-PID.json     pid, host, start time of a worker
workers/HOST-PID.lock     locked by the worker; the system unlocks it when the process dies
workers/HOST-PID.stop     asks the worker to stop
workers/JOB.begun         the worker of a launcher's job has registered
workers/EVENT.notified    a notification of this event was sent since the last launch
workers/jobs.json         jobs that were submitted
workers/stopped           its time of change is that of the last stop request
workers/log.txt           output of local workers
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.ablation.folder import AblationFolder
from workbench.files import locked, read_json, write_json

__all__ = ["JOB", "Roster"]

STOPPED = "stopped"
JOB = "WORKBENCH_JOB"
"""Environment variable with the name of the launcher's job that runs a worker."""


class Roster:
    """The workers of one ablation.

    Args:
        folder: the ablation.
    """

    def __init__(self, folder: AblationFolder):
        self.path = folder.workers_path

    def live_workers(self) -> set[str]:
        """Names of the workers that are alive."""
        alive = set()
        for path in self.path.glob("*-*.json"):
            if not path.with_suffix(".lock").exists():
                continue
            with locked(path.with_suffix(".lock"), timeout=0) as is_free:
                if not is_free:
                    alive.add(path.stem)
        return alive

    def process_ids(self) -> list[int]:
        """Process numbers of the workers that are alive. If two workers on two machines have the same number, it is
        listed twice."""
        return sorted(int(name.rpartition("-")[2]) for name in self.live_workers())

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Register this process as a worker while inside. Its death, of whatever kind, ends the registration."""
        path = self._path()
        path.parent.mkdir(exist_ok=True)
        with locked(path.with_suffix(".lock")):
            path.with_suffix(".stop").unlink(missing_ok=True)  # of an earlier process with this number
            write_json(path, {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()})
            if job := os.environ.get(JOB):
                self._mark(job).touch()
            try:
                yield
            finally:
                for suffix in (".json", ".stop", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)

    def request_stop(self) -> None:
        """Ask every live worker to stop, and a launch that has not started its workers to start none."""
        (self.path / STOPPED).touch()
        for name in self.live_workers():
            (self.path / f"{name}.stop").touch()

    def stopped_at(self) -> float:
        """When a stop was last requested, in seconds of ``time.time``; 0.0 if never."""
        try:
            return (self.path / STOPPED).stat().st_mtime
        except OSError:
            return 0.0

    def is_stop_requested(self) -> bool:
        """Whether the worker in this process has been asked to stop."""
        return self._path().with_suffix(".stop").exists()

    # -- notifications ---------------------------------------------------------------------------------------------

    def is_first(self, event: str) -> bool:
        """Whether this event is to be notified of: True once, for one worker."""
        self.path.mkdir(exist_ok=True)
        try:
            (self.path / f"{event}.notified").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def forget_notifications(self) -> None:
        """Notify of every event again, after a new launch."""
        for path in self.path.glob("*.notified"):
            path.unlink(missing_ok=True)

    # -- jobs of a launcher --------------------------------------------------------------------------------------

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Name -> ``id`` and ``at`` (time of submission) of submitted jobs."""
        return read_json(self.path / "jobs.json").get("asked", {})

    def write_jobs(self, jobs: dict[str, dict[str, Any]]) -> None:
        """Replace the submitted jobs. Call it with the start lock held."""
        write_json(self.path / "jobs.json", {"asked": jobs})

    def has_started(self, job: str) -> bool:
        """Whether the worker of a job has registered."""
        return self._mark(job).exists()

    def mark_requeued(self, job: str) -> None:
        """Record that a job is queued again: its worker has not started."""
        self._mark(job).unlink(missing_ok=True)

    def start_lock(self) -> contextlib.AbstractContextManager[bool]:
        """The lock of whoever starts workers, so that two calls together do not start more than one would."""
        self.path.mkdir(exist_ok=True)
        return locked(self.path / "start.lock")

    def _mark(self, job: str) -> Path:
        return self.path / f"{job}.begun"

    def _path(self) -> Path:
        # containers have the same process numbers
        return self.path / f"{socket.gethostname().replace('.', '_')}-{os.getpid()}.json"
