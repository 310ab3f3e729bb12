"""How the work is carried out: workers, time limits, storage, launcher."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from workbench.config import Config, require
from workbench.notifiers import NotifierConfig
from workbench.notifiers import parse as parse_notifier
from workbench.registry import Registry
from workbench.results.loggers import LoggerName

__all__ = ["Launch", "LauncherConfig", "launchers"]

launchers: Registry[Any] = Registry("launcher", "workbench.ablation.execution.launchers")
"""Launchers by name (:class:`workbench.ablation.execution.launchers.base.Launcher`)."""


def _notifier(data: object) -> Any:
    config = parse_notifier(data)
    config.refuse_in_files()
    return config


ADDRESS = re.compile(
    r"postgresql(\+psycopg)?://([\w.%-]+@)?([\w.-]*|\[[\da-f:]+\])(:\d{1,5})?/[\w.%-]+"
    r"(\?((?!password|sslpassword)[a-z_]+=[^&\s]*&?)+)?",
    re.ASCII | re.IGNORECASE,
)
"""Addresses of PostgreSQL databases without a password."""


class LauncherConfig(Config):
    """Base of a launcher's configuration; a launcher's nested ``Config`` adds ``kind`` and its own fields."""

    kind: str

    assigns_gpus: ClassVar[bool] = False
    """Whether the launcher assigns GPUs to its workers. If not, workers spread over the GPUs of their machine."""

    @property
    def one_machine(self) -> bool:
        """Whether all workers run on the machine that launches them, so that a local SQLite file can hold the
        studies."""
        return False


class Launch(Config):
    """How the work is carried out. Does not change the result and is not part of the identity."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Worker processes; 0 means one per GPU, or group of GPUs with ``devices``; or two on a CPU with two cores or more.
    More workers than GPUs share them evenly: small models fill a GPU only several at a time
    (benchmarks/trials_per_gpu.py)."""
    devices: Annotated[int, Field(ge=1, le=1024)] = 1
    """GPUs (or CPU processes) that train a run together and share every batch. The workers of a machine spread over its
    groups of so many GPUs, unless a launcher assigns GPUs. Changes results by rounding only."""
    heartbeat: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """Seconds between a worker's heartbeats; after three missed ones its trial is given to another worker."""
    hung_after: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without progress (no line of metrics, no checkpoint) after which a trial counts as hung: it is killed and
    resumed from its checkpoint, up to three attempts in all. Longer for a trial whose lines come slowly: 20 times their
    median interval."""
    measure: bool = True
    """Whether a launch first measures time and memory of every arm; if not, the cost card estimates memory and leaves
    time open."""
    loggers: tuple[LoggerName, ...] = ()
    """Where the metrics of every run are copied to while it trains: tensorboard, wandb, mlflow, trackio. Values of the
    report split are not."""
    notify: tuple[Annotated[SerializeAsAny[NotifierConfig], BeforeValidator(_notifier)], ...] = ()
    """Where notifications go when the ablation has ended, when the first run diverges or fails, and when workers cannot
    go on: desktop, or https://… (a POST request). ``--notify`` of `workbench run` takes commands as well and is not
    saved; an address with a key in it belongs there."""
    storage: str | None = None
    """Optuna's database. Default: study.db (SQLite) in the ablation's folder, for one machine. For several machines:
    postgresql://user@host/database; the password belongs in ~/.pgpass or PGPASSWORD, because this address is saved."""
    launcher: Annotated[SerializeAsAny[LauncherConfig], BeforeValidator(launchers.parse)] = Field(
        default="local",
        validate_default=True,
    )
    """Where workers run: local (processes of this machine), slurm (jobs, through submitit) or ray (jobs of a Ray
    cluster); with settings as a mapping: {kind: slurm, parameters: {slurm_partition: gpu}}. `workbench variants` lists
    them."""

    def model_post_init(self, _context: Any) -> None:
        require(
            self.storage is None or ADDRESS.fullmatch(self.storage),
            "storage",
            got="an address of another form, or one with a password",  # not repeated, as it may hold one
            expected="postgresql://user@host/database, without a password, because the address is saved",
            do="Put the password in ~/.pgpass or PGPASSWORD. Leave storage out for SQLite in the ablation's folder.",
        )
        require(
            self.launcher.one_machine or self.storage is not None,
            "storage",
            got="none",
            expected=f"postgresql://… for {self.launcher.kind}",
            do="A SQLite file can be shared by processes of one machine only.",
        )
