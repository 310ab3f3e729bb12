"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Literal

from workbench.ablation.execution.launchers.base import JobState, Launcher
from workbench.ablation.execution.roster import JOB, Roster
from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import LauncherConfig, launchers
from workbench.registry import import_variables

__all__ = ["Local"]


@launchers.register
class Local(Launcher):
    """Workers as processes of this machine, which outlive the process that starts them."""

    class Config(LauncherConfig):
        kind: Literal["local"] = "local"

        @property
        def one_machine(self) -> bool:
            return True

    def submit(self, folder: AblationFolder, names: Sequence[str]) -> list[str]:
        """Start the processes and wait until each has registered, or ended."""
        jobs = {name: f"{socket.gethostname()}-{_start(folder, name)}" for name in names}
        roster = Roster(folder)
        while any(
            not roster.has_started(name) and self.state(folder, job) != JobState.ENDED for name, job in jobs.items()
        ):
            time.sleep(0.05)
        return list(jobs.values())

    def state(self, folder: AblationFolder, job: str) -> JobState:
        host, _, number = job.rpartition("-")
        if host != socket.gethostname():
            return JobState.UNKNOWN
        try:
            ended, _ = os.waitpid(int(number), os.WNOHANG)  # collects a process that this one started
            return JobState.ENDED if ended else JobState.RUNNING
        except ChildProcessError:  # started by another process, or collected before
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                return JobState.ENDED
            except PermissionError:
                pass
            return JobState.UNKNOWN  # perhaps a newer process with this number

    def cancel(self, folder: AblationFolder, jobs: Sequence[str]) -> None:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(job.rpartition("-")[2]), signal.SIGTERM)


def _start(folder: AblationFolder, name: str) -> int:
    """Start a worker in a session of its own; its process number."""
    log = os.open(folder.workers_path / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "workbench", "worker", str(folder.path)],
            {**os.environ, JOB: name, **import_variables()},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(log)
