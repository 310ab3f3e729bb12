"""Workers as Slurm jobs, through submitit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from workbench.ablation.execution.launchers.base import JobState, Launcher, rejected, required_package
from workbench.ablation.execution.process import work
from workbench.ablation.execution.roster import JOB, Roster
from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import LauncherConfig, launchers

__all__ = ["Slurm"]


@launchers.register
class Slurm(Launcher):
    """Workers as Slurm jobs, one each, through submitit."""

    class Config(LauncherConfig):
        kind: Literal["slurm"] = "slurm"
        cluster: Literal["slurm", "local", "debug"] = "slurm"
        """slurm, or one of submitit's stand-ins for it on this machine."""
        parameters: dict[str, Any] = {}
        """Parameters of submitit: {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1, cpus_per_task: 8}."""

        assigns_gpus: ClassVar[bool] = True

        @property
        def one_machine(self) -> bool:
            return self.cluster != "slurm"

    def __init__(self, config: Config):
        super().__init__(config)
        self.submitit = required_package("submitit", "slurm")

    def submit(self, folder: AblationFolder, names: Sequence[str]) -> list[str]:
        try:
            executor = self.submitit.AutoExecutor(folder=self._logs(folder), cluster=self.config.cluster)
            executor.update_parameters(**{"name": "workbench", "timeout_min": 24 * 60, **self.config.parameters})
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise rejected(error) from None
        return [executor.submit(WorkerJob(str(folder.path), name)).job_id for name in names]

    def state(self, folder: AblationFolder, job: str) -> JobState:
        state = self._job(folder, job).state
        if state in ("PENDING", "REQUEUED", "CONFIGURING"):
            return JobState.QUEUED
        if state in ("RUNNING", "SUSPENDED"):
            return JobState.RUNNING
        # accounting lags behind; submitit's stand-in for Slurm knows other processes' jobs only once they have ended
        return JobState.UNKNOWN if state in ("UNKNOWN", "NO PROCESS AND NO RESULT") else JobState.ENDED

    def cancel(self, folder: AblationFolder, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._job(folder, job).cancel()

    def _job(self, folder: AblationFolder, job: str) -> Any:
        cls = self.submitit.SlurmJob if self.config.cluster == "slurm" else self.submitit.LocalJob
        return cls(self._logs(folder), job)

    @staticmethod
    def _logs(folder: AblationFolder) -> Any:
        return folder.workers_path / "jobs"


class WorkerJob:
    """The job of one worker. At Slurm's time limit it is queued again: its trial has written a checkpoint."""

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name

    def __call__(self) -> None:
        os.environ[JOB] = self.name
        work(self.folder)

    def checkpoint(self) -> Any:
        """What submitit submits again when the time limit is reached."""
        import submitit

        Roster(AblationFolder(self.folder)).mark_requeued(self.name)
        return submitit.helpers.DelayedSubmission(WorkerJob(self.folder, self.name))
