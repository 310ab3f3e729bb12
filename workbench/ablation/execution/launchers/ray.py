"""Workers as jobs of a Ray cluster."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from workbench.ablation.execution.launchers.base import JobState, Launcher, rejected, required_package
from workbench.ablation.execution.roster import JOB
from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import LauncherConfig, launchers

__all__ = ["Ray"]


@launchers.register
class Ray(Launcher):
    """Workers as jobs of a Ray cluster, which outlive the process that submits them."""

    class Config(LauncherConfig):
        kind: Literal["ray"] = "ray"
        address: str = "http://127.0.0.1:8265"
        """Of the cluster's job server."""
        parameters: dict[
            Literal["entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory", "entrypoint_resources"],
            Annotated[float, Field(ge=0)] | dict[str, Annotated[float, Field(ge=0)]],
        ] = {}
        """Resources of a job: {entrypoint_num_gpus: 0.5, entrypoint_num_cpus: 4}; one CPU if none is given, because a
        job without resources runs on the head. Nothing here can name a command or an environment. Ray drops a job that
        waits for more than RAY_JOB_START_TIMEOUT_SECONDS (15 minutes): do not ask for more workers than there is room
        for."""
        one_host: bool = False
        """Whether the cluster is this machine alone, so that a local SQLite file can hold the studies."""

        assigns_gpus: ClassVar[bool] = True

        @property
        def one_machine(self) -> bool:
            return self.one_host

    def __init__(self, config: Config):
        super().__init__(config)
        required_package("ray", "ray")
        job_submission = required_package("ray.job_submission", "ray")
        self.parameters: dict[str, Any] = {str(name): value for name, value in config.parameters.items()}
        if not any(name.startswith("entrypoint_") for name in self.parameters):
            self.parameters["entrypoint_num_cpus"] = 1
        try:
            self.client = job_submission.JobSubmissionClient(config.address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise rejected(error) from None

    def submit(self, folder: AblationFolder, names: Sequence[str]) -> list[str]:
        command = shlex.join([sys.executable, "-P", "-m", "workbench", "worker", str(folder.path)])
        try:
            return [self.client.submit_job(entrypoint=f"{JOB}={name} {command}", **self.parameters) for name in names]
        except (RuntimeError, TypeError, ValueError) as error:
            raise rejected(error) from None

    def state(self, folder: AblationFolder, job: str) -> JobState:
        try:
            state = str(self.client.get_job_status(job).value)
        except (OSError, RuntimeError):  # it does not answer, or was restarted and does not know the job
            return JobState.UNKNOWN
        return {"PENDING": JobState.QUEUED, "RUNNING": JobState.RUNNING}.get(state, JobState.ENDED)

    def cancel(self, folder: AblationFolder, jobs: Sequence[str]) -> None:
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self.client.stop_job(job)
