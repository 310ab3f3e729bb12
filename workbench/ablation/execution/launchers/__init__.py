"""Where worker processes run: on this machine, as Slurm jobs, or on a Ray cluster. The workers are the same everywhere.

A launcher only places workers. What is to be done, who does it and what has been done stand in the storage and in the
ablation's folder, which every machine must see (a shared file system whose locks work).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from workbench.ablation.run import JOB
from workbench.config import Config, ConfigError


class Launch(Config):
    """How the work is carried out. Changes nothing about the result, and is not part of the identity."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes; 0 takes one a GPU, or two on a CPU with two cores or more. More than there are GPUs share them evenly:
    small models fill a GPU only several at a time (benchmarks/trials_per_gpu.py)."""
    heartbeat: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Seconds between a worker's signs of life; after three missed ones its trial goes to another worker."""
    hung_after: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without progress (no line of metrics, no checkpoint) after which a trial is stopped as hung and taken up again from
    its checkpoint, three times in all; longer where the trial's own lines come slowly: 20 times their median interval."""
    measure: bool = True
    """Whether a launch first measures time and memory of every arm; without it the card estimates memory and leaves time open."""
    storage: str | None = None
    """Where Optuna keeps its studies. Default: study.db (SQLite) in the ablation's folder, for one machine. For more:
    postgresql://user@host/database; the password belongs into ~/.pgpass or PGPASSWORD, for this address is written down."""
    launcher: Literal["local", "slurm", "ray"] = "local"
    """Where workers run: processes of this machine, jobs of Slurm (through submitit), or jobs of a Ray cluster."""
    options: dict[str, Any] = {}
    """For slurm: parameters of submitit, {slurm_partition: gpu, timeout_min: 600, gpus_per_node: 1, cpus_per_task: 8}. For ray:
    {address: http://head:8265} and parameters of a job, {entrypoint_num_gpus: 0.5, entrypoint_num_cpus: 4}; one CPU where none is
    given, for a job that asks for nothing runs on the head. Ray gives a job up that waits for more than
    RAY_JOB_START_TIMEOUT_SECONDS (15 minutes): ask for no more workers than there is room for."""

    def model_post_init(self, _context: Any) -> None:
        if self.storage is not None:
            if not re.fullmatch(r"postgresql(\+\w+)?://.+", self.storage):
                raise ConfigError.at(
                    "storage",
                    got=self.storage,
                    expected="postgresql://user@host/database",
                    do="Leave it out for SQLite in the ablation's folder.",
                )
            if re.match(r"[^/]+//[^/@]*:[^/@]*@", self.storage):
                raise ConfigError.at(
                    "storage",
                    got="an address with a password",
                    expected="one without, for it is written down",
                    do="Put the password into ~/.pgpass or PGPASSWORD.",
                )
        if self.launcher == "local" and self.options:
            raise ConfigError.at("options", got=self.options, expected="nothing for local processes")
        # submitit's own stand-ins for Slurm run on this machine
        beyond = self.launcher == "ray" or (
            self.launcher == "slurm" and self.options.get("cluster") not in ("local", "debug")
        )
        if beyond and self.storage is None:
            raise ConfigError.at(
                "storage",
                got="none",
                expected=f"postgresql://… for {self.launcher}",
                do="SQLite's file can be shared by the processes of one machine only.",
            )


State = Literal["queued", "running", "ended", "unknown"]
"""Of a job, as its engine tells it."""


class Launcher(Protocol):
    """Places workers as jobs of some engine, which queues them."""

    def submit(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        """Ask for one more worker on the ablation in ``folder`` for each of ``names``, which the worker finds in its environment as
        :data:`workbench.ablation.run.JOB`. Returns what the engine calls their jobs."""

    def state(self, folder: Path, job: str) -> State:
        """How a job stands."""

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        """Take jobs back whose workers are not at work yet."""


class Work:
    """The job of one worker. Slurm's time limit puts it back into the queue: its trial has written a checkpoint."""

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name

    def __call__(self) -> None:
        from workbench.ablation.run import AblationRun

        os.environ[JOB] = self.name
        AblationRun(self.folder).work()

    def checkpoint(self) -> Any:
        """What submitit submits again when the time limit is reached."""
        import submitit

        from workbench.ablation.run import AblationRun

        AblationRun(self.folder).forget_begun(self.name)
        return submitit.helpers.DelayedSubmission(Work(self.folder, self.name))


class Slurm:
    """Workers as Slurm jobs, one a worker, through submitit."""

    def __init__(self, options: dict[str, Any]):
        self.submitit = _needed("submitit", "slurm")
        self.options = {"name": "workbench", "timeout_min": 24 * 60, **options}
        self.cluster = self.options.pop("cluster", None)

    def submit(self, folder: Path, names: Sequence[str]) -> list[str]:
        try:
            executor = self.submitit.AutoExecutor(folder=folder / "workers" / "jobs", cluster=self.cluster or "slurm")
            executor.update_parameters(**self.options)
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise _refused(error) from None
        return [executor.submit(Work(str(folder), name)).job_id for name in names]

    def state(self, folder: Path, job: str) -> State:
        told = self._job(folder, job).state
        if told in ("PENDING", "REQUEUED", "CONFIGURING"):
            return "queued"
        if told in ("RUNNING", "SUSPENDED"):
            return "running"
        # accounting lags behind; and submitit's stand-in for Slurm knows of other processes' jobs only when they have ended
        return "unknown" if told in ("UNKNOWN", "NO PROCESS AND NO RESULT") else "ended"

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._job(folder, job).cancel()

    def _job(self, folder: Path, job: str) -> Any:
        kind = self.submitit.LocalJob if self.cluster in ("local", "debug") else self.submitit.SlurmJob
        return kind(folder / "workers" / "jobs", job)


class Ray:
    """Workers as jobs of a Ray cluster, which live on when the process that asked for them ends."""

    def __init__(self, options: dict[str, Any]):
        _needed("ray", "ray")
        jobs = _needed("ray.job_submission", "ray")
        self.options = dict(options)
        address = self.options.pop("address", "http://127.0.0.1:8265")
        if not any(name.startswith("entrypoint_") for name in self.options):
            self.options["entrypoint_num_cpus"] = 1
        try:
            self.client = jobs.JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _refused(error) from None

    def submit(self, folder: Path, names: Sequence[str]) -> list[str]:
        command = shlex.join([sys.executable, "-m", "workbench", "worker", str(folder)])
        try:
            return [self.client.submit_job(entrypoint=f"{JOB}={name} {command}", **self.options) for name in names]
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refused(error) from None

    def state(self, folder: Path, job: str) -> State:
        try:
            told = str(self.client.get_job_status(job).value)
        except (OSError, RuntimeError):  # it does not answer, or has been started anew and does not know the job
            return "unknown"
        return {"PENDING": "queued", "RUNNING": "running"}.get(told, "ended")  # type: ignore[return-value]

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self.client.stop_job(job)


def launcher(launch: dict[str, Any]) -> Launcher | None:
    """The launcher of a configuration's ``launch``; None for processes of this machine.

    Raises:
        ConfigError: when its package is not installed, or its engine does not answer.
    """
    kind = launch.get("launcher", "local")
    return {"slurm": Slurm, "ray": Ray}[kind](launch["options"]) if kind != "local" else None  # type: ignore[return-value]


def _needed(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError.at(
            "launch.launcher",
            got=f"{extra}, which fails to import ({error})",
            expected="its package",
            do=f"pip install 'workbench[{extra}]'.",
        ) from None


def _refused(error: Exception) -> ConfigError:
    return ConfigError.at(
        "launch.options",
        got=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        expected="what the engine takes, and an engine that answers",
    )
