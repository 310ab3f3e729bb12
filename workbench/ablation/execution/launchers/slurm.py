"""Workers as Slurm jobs, through submitit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from workbench.ablation.execution.launchers.base import (
    JobState,
    Launcher,
    rejected,
    required_package,
)
from workbench.ablation.execution.process import work
from workbench.ablation.execution.roster import JOB, Roster
from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import LauncherConfig, launchers
from workbench.config import require
from workbench.registry import import_variables

__all__ = ["Slurm"]

RUNS_COMMANDS = re.compile(r".*(setup|python|srun_args|additional_parameters).*")
"""Parameters of submitit that end up as commands in a shell script."""


@launchers.register
class Slurm(Launcher):
    """Workers as Slurm jobs, one each, through submitit."""

    class Config(LauncherConfig):
        kind: Literal["slurm"] = "slurm"
        cluster: Literal["slurm", "local", "debug"] = "slurm"
        """slurm, or one of submitit's stand-ins for it on this machine."""
        parameters: dict[str, Any] = {}
        """Parameters of submitit: {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1, cpus_per_task: 8}. Those
        that run commands (`slurm_setup`, `slurm_srun_args` …) are refused, because reading a configuration must not run
        code: load modules in the shell that launches, whose environment the jobs inherit."""

        assigns_gpus: ClassVar[bool] = True

        def model_post_init(self, _context: Any) -> None:
            for name, value in self.parameters.items():
                require(
                    re.fullmatch(r"[a-z_]+", name) and not RUNS_COMMANDS.fullmatch(name),
                    f"parameters.{name}",
                    got="a parameter that can run commands",
                    expected="resources of a job, such as slurm_partition or timeout_min",
                    do="Set up the environment in the shell that launches; jobs inherit it.",
                )
                require(
                    isinstance(value, bool | int | float)
                    or (isinstance(value, str) and re.fullmatch(r"[\w.,:=@/+\[\]() -]*", value, re.ASCII)),
                    f"parameters.{name}",
                    got=value,
                    expected="a number, or a text of letters, digits and . , : = @ / + - [ ] ( )",
                )

        @property
        def one_machine(self) -> bool:
            return self.cluster != "slurm"

    def __init__(self, config: Config):
        super().__init__(config)
        self.submitit = required_package("submitit", "slurm")

    def submit(self, folder: AblationFolder, names: Sequence[str]) -> list[str]:
        require(
            "%" not in str(folder.path),
            "launch.launcher",
            got=f"slurm, for the folder {folder.path}",
            expected="a path without %, which Slurm replaces in names of logs",
            do="Choose another --results.",
        )
        try:
            executor = self.submitit.AutoExecutor(folder=self._logs(folder), cluster=self.config.cluster)
            executor.update_parameters(**{"name": "workbench", "timeout_min": 24 * 60, **self.config.parameters})
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise rejected(error) from None
        with _environment(import_variables()):
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


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is submitted inside: sbatch, and submitit's stand-ins, pass theirs on."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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
