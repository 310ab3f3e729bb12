"""What a launcher is.

A launcher only places workers, which are the same everywhere. What is to be done, who does it and what has been done is
in the studies' database and the ablation's folder, which every machine must see (a shared file system with working
locks).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, ClassVar

from workbench.ablation.folder import AblationFolder
from workbench.ablation.spec.launch import LauncherConfig
from workbench.config import ConfigError
from workbench.distribution import install_extra

__all__ = ["JobState", "Launcher", "rejected", "required_package"]


class JobState(StrEnum):
    """The state of a job, as the launcher's system reports it."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"
    """The system does not know the job, or does not know it yet."""


class Launcher(ABC):
    """Runs workers as jobs of some system.

    Args:
        config: the launcher's own settings.

    Raises:
        ConfigError: if its package is not installed, or its system does not answer.
    """

    Config: ClassVar[type[LauncherConfig]]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def submit(self, folder: AblationFolder, names: Sequence[str]) -> Sequence[str]:
        """Submit one job per name, each a worker of ``folder``: ``python -m workbench worker FOLDER``, or
        :func:`workbench.ablation.execution.process.work`.

        Args:
            folder: the ablation.
            names: the worker finds its name in the environment variable
                :data:`workbench.ablation.execution.roster.JOB`.

        Returns:
            the system's identifiers of the jobs, in order.

        Raises:
            ConfigError: if the system rejects the settings.
        """

    @abstractmethod
    def state(self, folder: AblationFolder, job: str) -> JobState:
        """The state of the job with identifier ``job``."""

    @abstractmethod
    def cancel(self, folder: AblationFolder, jobs: Sequence[str]) -> None:
        """Cancel jobs whose workers have not started."""


def required_package(module: str, extra: str) -> Any:
    """Import ``module``, or raise a ConfigError that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError.at(
            "launch.launcher",
            got=f"{extra}, which fails to import ({error})",
            expected="its package",
            do=f"{install_extra(extra)}.",
        ) from None


def rejected(error: Exception) -> ConfigError:
    """The ConfigError for settings that the launcher's system rejects."""
    message = str(error).strip()
    return ConfigError.at(
        "launch.launcher",
        got=message.splitlines()[0] if message else repr(error),
        expected="settings that the system accepts, and a system that answers",
    )
