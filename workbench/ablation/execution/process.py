"""The entry point of a worker's process."""

from __future__ import annotations

from pathlib import Path

from workbench.ablation.execution.roster import Roster
from workbench.ablation.folder import AblationFolder

__all__ = ["work"]


def work(path: str | Path) -> None:
    """Be a worker of the ablation in folder ``path``: run trials until none is left.

    Raises:
        ConfigError: if there is no ablation in the folder.
    """
    folder = AblationFolder(path)
    folder.record()
    with Roster(folder).registered():  # before the import, which takes seconds
        from workbench.ablation.execution.worker import Worker

        Worker(folder).work()
