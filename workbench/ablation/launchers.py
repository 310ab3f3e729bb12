"""Where worker processes run: on this machine, as Slurm jobs, or on a Ray cluster. The workers are the same everywhere.

A launcher only places workers. What is to be done, who does it and what has been done stand in the storage and in the
ablation's folder, which every machine must see (a shared file system whose locks work).
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

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
    {address: http://head:8265} and parameters of a job, {entrypoint_num_gpus: 0.5, entrypoint_num_cpus: 4}."""

    def model_post_init(self, _context: Any) -> None:
        if self.storage is not None:
            if not re.fullmatch(r"postgresql(\+\w+)?://.+", self.storage):
                raise ConfigError.at("storage", got=self.storage, expected="postgresql://user@host/database",
                                     do="Leave it out for SQLite in the ablation's folder.")  # fmt: skip
            if re.match(r"[^/]+//[^/@]*:[^/@]*@", self.storage):
                raise ConfigError.at("storage", got="an address with a password", expected="one without, for it is written down",
                                     do="Put the password into ~/.pgpass or PGPASSWORD.")  # fmt: skip
        if self.launcher == "local" and self.options:
            raise ConfigError.at("options", got=self.options, expected="nothing for local processes")
        # submitit's own stand-ins for Slurm run on this machine
        beyond = self.launcher == "ray" or (
            self.launcher == "slurm" and self.options.get("cluster") not in ("local", "debug")
        )
        if beyond and self.storage is None:
            raise ConfigError.at("storage", got="none", expected=f"postgresql://… for {self.launcher}",
                                 do="SQLite's file can be shared by the processes of one machine only.")  # fmt: skip


class Launcher(Protocol):
    """Places workers as jobs of some engine, which queues them."""

    def submit(self, folder: Path, count: int) -> Sequence[str]:
        """Ask for ``count`` more workers on the ablation in ``folder``. Returns the names of their jobs."""

    def waiting(self, folder: Path, jobs: Sequence[str]) -> list[str]:
        """Those of ``jobs`` that have not begun."""

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        """Take jobs back that have not begun."""


class Work:
    """The job of one worker. Slurm's time limit puts it back into the queue: its trial has written a checkpoint."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self) -> None:
        from workbench.ablation.run import AblationRun

        AblationRun(self.folder).work()

    def checkpoint(self) -> Any:
        """What submitit submits again when the time limit is reached."""
        import submitit

        return submitit.helpers.DelayedSubmission(Work(self.folder))


class Slurm:
    """Workers as Slurm jobs, one a worker, through submitit."""

    def __init__(self, options: dict[str, Any]):
        self.submitit = _needed("submitit", "slurm")
        self.options = {"name": "workbench", "timeout_min": 24 * 60, **options}
        self.cluster = self.options.pop("cluster", None)

    def submit(self, folder: Path, count: int) -> list[str]:
        try:
            executor = self.submitit.AutoExecutor(folder=folder / "workers" / "jobs", cluster=self.cluster or "slurm")
            executor.update_parameters(**self.options)
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise _refused(error) from None
        return [executor.submit(Work(str(folder))).job_id for _ in range(count)]

    def waiting(self, folder: Path, jobs: Sequence[str]) -> list[str]:
        if self.cluster in ("local", "debug"):
            return []
        return [job for job in jobs if self._job(folder, job).state in ("PENDING", "REQUEUED")]

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        for job in jobs:
            self._job(folder, job).cancel()

    def _job(self, folder: Path, job: str) -> Any:
        return self.submitit.SlurmJob(folder / "workers" / "jobs", job)


class Ray:
    """Workers as jobs of a Ray cluster, which live on when the process that asked for them ends."""

    def __init__(self, options: dict[str, Any]):
        _needed("ray", "ray")
        jobs = _needed("ray.job_submission", "ray")
        self.options = dict(options)
        address = self.options.pop("address", "http://127.0.0.1:8265")
        try:
            self.client = jobs.JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _refused(error) from None

    def submit(self, folder: Path, count: int) -> list[str]:
        command = shlex.join([sys.executable, "-m", "workbench", "worker", str(folder)])
        try:
            return [self.client.submit_job(entrypoint=command, **self.options) for _ in range(count)]
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refused(error) from None

    def waiting(self, folder: Path, jobs: Sequence[str]) -> list[str]:
        return [job for job in jobs if self._status(job) == "PENDING"]

    def cancel(self, folder: Path, jobs: Sequence[str]) -> None:
        for job in jobs:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self.client.stop_job(job)

    def _status(self, job: str) -> str:
        try:
            return str(self.client.get_job_status(job).value)
        except RuntimeError:  # the cluster has been started anew and does not know it
            return "UNKNOWN"


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
        raise ConfigError.at("launch.launcher", got=f"{extra}, which fails to import ({error})", expected="its package",
                             do=f"pip install 'workbench[{extra}]'.") from None  # fmt: skip


def _refused(error: Exception) -> ConfigError:
    return ConfigError.at("launch.options", got=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
                          expected="what the engine takes, and an engine that answers")  # fmt: skip
