"""The workers of an ablation, seen from outside: start, count, stop and wait for them."""

from __future__ import annotations

import math
import secrets
import time
from typing import Any

from workbench.ablation.execution.launchers.base import JobState, Launcher
from workbench.ablation.execution.roster import Roster
from workbench.ablation.execution.timing import DEFAULT_TIMING, Timing
from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import launchers

__all__ = ["WorkerPool"]


class WorkerPool:
    """The workers of one ablation, wherever the launcher places them.

    Args:
        folder: the ablation.
        timing: time limits.
        launcher: default the one in the launch record.
    """

    def __init__(self, folder: AblationFolder, timing: Timing = DEFAULT_TIMING, launcher: Launcher | None = None):
        self.folder, self.timing, self.roster = folder, timing, Roster(folder)
        self._launcher = launcher

    @property
    def launcher(self) -> Launcher:
        """The launcher; created when it is first used.

        Raises:
            ConfigError: if its package is not installed, or its system does not answer.
        """
        if self._launcher is None:
            config = self.folder.record().config.launch.launcher
            self._launcher = launchers[config.kind](config)
        return self._launcher

    def workers(self) -> list[int]:
        """Process numbers of the workers that are alive."""
        return self.roster.process_ids()

    def waiting(self) -> list[str]:
        """Identifiers of jobs whose workers have not started: queued, or running without a registered worker."""
        return [
            job["id"]
            for name, job in self._jobs().items()
            if job["state"] == JobState.QUEUED or not self.roster.has_started(name)
        ]

    def start(self, count: int, asked_at: float | None = None) -> list[str]:
        """Start workers until there are ``count``, live and waiting ones included.

        Concurrent calls wait for one another, so that together they start no more than one would.

        Args:
            count: the number.
            asked_at: when the launch began; after a stop since then no worker is started.

        Returns:
            the launcher's identifiers of the new jobs.
        """
        with self.roster.start_lock():
            if asked_at is not None and self.roster.stopped_at() > asked_at:
                return []
            jobs = self._jobs()
            missing = max(0, count - len(self.workers()) - len(self.waiting()))
            if not missing:
                return []
            names = [secrets.token_hex(4) for _ in range(missing)]
            submitted = list(self.launcher.submit(self.folder, names))
            new = {name: {"id": job, "at": time.time()} for name, job in zip(names, submitted)}
            self.roster.write_jobs({name: {"id": job["id"], "at": job["at"]} for name, job in (jobs | new).items()})
            return submitted

    def stop(self, wait: float) -> list[int]:
        """Ask every worker to stop, wherever it runs, and cancel jobs that have not started.

        Args:
            wait: seconds to wait for them to end.

        Returns:
            process numbers of the workers that have not ended yet.
        """
        with self.roster.start_lock():  # workers that are being started are there when it is acquired
            if waiting := self.waiting():
                self.launcher.cancel(self.folder, waiting)
            self.roster.request_stop()
        deadline = time.monotonic() + wait
        while (workers := self.workers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return workers

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the ablation is finished or no worker is left. Returns whether it is finished.

        Args:
            timeout: seconds; default without limit.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self.folder.is_finished and (self.workers() or self.waiting()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.folder.is_finished

    def _jobs(self) -> dict[str, dict[str, Any]]:
        """Name -> ``id``, ``at`` and ``state`` of submitted jobs that may still run."""
        jobs = {}
        for name, job in self.roster.jobs().items():
            state = self.launcher.state(self.folder, job["id"])
            is_recent = abs(time.time() - job["at"]) < self.timing.job_lookup
            if state in (JobState.QUEUED, JobState.RUNNING) or (state == JobState.UNKNOWN and is_recent):
                jobs[name] = {**job, "state": state}
        return jobs
