"""Everything about one run: how its configuration differs from another run's, its events, where it ran, its files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from workbench.config import difference
from workbench.results.store import RunFolder
from workbench.status import Stage

__all__ = ["RunFiles", "baseline_run", "differences", "event_rows", "log_end"]

MAX_LOG_BYTES = 20_000
"""Only the end of a longer log is read."""
SEEDS = ("seed", "seeds")
"""Fields that differ between any two seeds of one arm."""


class RunFiles(NamedTuple):
    """Files of a run that a person may want to open."""

    folder: Path
    checkpoint: Path | None
    """Folder of the newest checkpoint."""

    @classmethod
    def of(cls, folder: Path) -> RunFiles:
        """Those of the run in ``folder``."""
        checkpoints = folder / "checkpoint"
        return cls(folder, checkpoints if checkpoints.is_dir() else None)


def baseline_run(runs: pl.DataFrame, baseline: str, seed: int) -> dict[str, Any] | None:
    """The run of the baseline that another run is compared with: its confirmation run, of the same seed if there is
    one; before there is any, its chosen tuning trial, or else its first.

    Args:
        runs: rows of :data:`workbench.results.tables.RUN_SCHEMA`.
        baseline: the arm.
        seed: of the other run.
    """
    is_confirmation, has_seed = pl.col("stage") == Stage.CONFIRMATION, pl.col("seed") == seed
    of_arm = runs.filter(pl.col("arm") == baseline)
    ordered = of_arm.sort(~is_confirmation, ~has_seed, ~pl.col("selected"), "run", maintain_order=True)
    return ordered.row(0, named=True) if len(ordered) else None


def differences(config: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted fields of two configurations that differ, with the baseline's value and the other; None where a
    configuration has no such field. Seeds are left out."""
    pairs = [(field, _given(a), _given(b)) for field, (a, b) in difference(baseline, config).items()]
    return [(field, a, b) for field, a, b in pairs if field and field.partition(".")[0] not in SEEDS and a != b]


def _given(value: Any) -> Any:
    """A value, or None where it is empty: fields below it are listed instead."""
    return None if value in ({}, []) else value


def event_rows(folder: RunFolder) -> list[tuple[float, str, str]]:
    """The events of a run: time in seconds since 1970, name, and what else is known of it."""
    rows = []
    for event in folder.events():
        about = [f"{name} {_short(v)}" for name, v in event.items() if name not in ("event", "at") and v is not None]
        at = event.get("at")
        when = float(at) if isinstance(at, int | float) else 0.0
        rows.append((when, str(event.get("event", "")).replace("_", " "), ", ".join(about)))
    return rows


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def clock(at: float) -> str:
    """A time as date and clock of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "–"


def log_end(folder: Path) -> str | None:
    """The end of a run's log; None if there is no log."""
    path = folder / "log.txt"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - MAX_LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return None
