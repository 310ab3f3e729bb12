"""The database of the studies: SQLite in the ablation's folder, or a PostgreSQL server."""

from __future__ import annotations

import contextlib
import sqlite3
import textwrap
import time
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from workbench.ablation.search.samplers import allow_experimental
from workbench.config import ConfigError, Problem
from workbench.distribution import install_extra
from workbench.files import apply_umask

__all__ = ["ATTEMPTS", "open_storage", "quarantine_corrupt_storage"]

CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR_SHORT_READ)
"""Codes of SQLite for a damaged or truncated file; others are those of a locked one, or of one that cannot be read."""
ATTEMPTS = 3
"""Times that a trial is started whose process or worker died, or that hung, before it counts as killed."""


def open_storage(folder: Path, heartbeat: float, url: str | None = None) -> RDBStorage:
    """The studies' database, with heartbeat and retry.

    Args:
        folder: of the ablation. Without ``url`` the database is SQLite in it: write-ahead log, a lock time-out of a
            minute.
        heartbeat: seconds between a worker's heartbeats.
        url: address of a PostgreSQL database.

    Raises:
        ConfigError: if the database does not answer, or its driver is not installed.
    """
    interval = max(1, round(heartbeat))
    if url is None:
        path = folder / "study.db"
        try:
            is_new = not path.exists()
            with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            if is_new:  # SQLite gives nobody else the right to write, whatever the umask
                apply_umask(path)
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from None
        engine: dict[str, Any] = {"connect_args": {"timeout": 60}}
        url = URL.create("sqlite", database=str(path)).render_as_string()
    else:  # connections that the server has dropped in the meantime are opened again
        engine = {"pool_pre_ping": True, "pool_size": 2}
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        with allow_experimental():
            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=interval,
                grace_period=3 * interval,
                # a resumed trial reports its evaluations again, from the run's own file
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(
                    ATTEMPTS, inherit_intermediate_values=False
                ),
            )
    except ImportError as error:
        raise ConfigError.at(
            "launch.storage",
            got=str(error),
            expected="the driver of the database",
            do=f"{install_extra('postgresql')}.",
        ) from None
    except (SQLAlchemyError, StorageInternalError) as error:
        if url.startswith("sqlite"):
            raise _unusable(folder / "study.db", error) from None
        raise ConfigError(
            [
                Problem(
                    "launch.storage",
                    _reason(error),
                    "a database that answers and accepts this user",
                    "Start the server, or correct the address.",
                )
            ]
        ) from None


def _unusable(path: Path, error: Exception) -> ConfigError:
    return ConfigError.at(
        str(path),
        got=_reason(error),
        expected="a database that this user may write, on a disk with space left",
        do="Nothing is lost; the same command resumes.",
    )


def _reason(error: Exception) -> str:
    """The driver's own words, from the end of its message: the beginning repeats the address."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    lines = [line for line in str(getattr(cause, "orig", None) or cause).splitlines() if line.strip()]
    return textwrap.shorten(lines[-1] if lines else repr(cause), 300)


def quarantine_corrupt_storage(folder: Path) -> None:
    """Rename a corrupt study.db. The studies can be rebuilt from the run folders.

    Call it with the plan's lock held and no live worker.

    Raises:
        ConfigError: if it cannot be read, which says nothing of its content.
    """
    path = folder / "study.db"
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            intact = connection.execute("PRAGMA quick_check").fetchone()[0] == "ok"
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        intact = intact and (not tables or "studies" in tables)
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code not in CORRUPT and code & 0xFF not in CORRUPT:  # the low byte of an extended code is its kind
            raise _unusable(path, error) from None
        intact = False
    if not intact:
        for part in folder.glob("study.db*"):
            part.rename(folder / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{part.name}")
