"""How far an ablation has come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from workbench.ablation.estimate import RunTimes, makespan
from workbench.config import ConfigError
from workbench.dashboards.snapshot import Snapshot
from workbench.formatting import duration
from workbench.status import ENDED, Stage, Status


def progress_table(run: Snapshot) -> pl.DataFrame:
    """Progress of each arm, one row per arm and stage.

    Columns: arm, stage, planned, done, failed, pruned, running, left (runs that have not ended), share (of the planned
    steps; a run that ended early counts as a whole one; null where none is planned), seconds_left (on one worker:
    start-up, training and evaluation of the runs that have not ended; null while unknown).
    """
    schema = {
        "arm": pl.String,
        "stage": pl.String,
        "planned": pl.Int64,
        "done": pl.Int64,
        "failed": pl.Int64,
        "pruned": pl.Int64,
        "running": pl.Int64,
        "left": pl.Int64,
        "share": pl.Float64,
        "seconds_left": pl.Float64,
    }
    runs_of: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for arm, stage, status, step, steps in run.runs().select("arm", "stage", "status", "step", "steps").iter_rows():
        runs_of.setdefault((arm, stage), []).append((status, (step or 0) / steps if steps else 0.0))
    unconfirmed = run.failures()
    rows = []
    for arm in run.arms:
        is_tuned = arm in unconfirmed or (arm, Stage.CONFIRMATION) in runs_of
        for stage, planned in run.planned[arm].items():
            runs = runs_of.get((arm, stage), [])
            if stage == Stage.REPEAT and (is_tuned or not planned):  # fewer settings finished than were to be repeated
                planned = len(runs)
                if not planned:
                    continue
            elif stage == Stage.CONFIRMATION and arm in unconfirmed:
                planned = 0
            count = Counter(status for status, _ in runs)
            ended = sum(count[status] for status in ENDED)
            started = sum(share for status, share in runs if status not in ENDED)
            left = max(planned - ended, 0)
            rows.append(
                {
                    "arm": arm,
                    "stage": stage,
                    "planned": planned,
                    "done": count[Status.DONE],
                    "failed": count[Status.DIVERGED] + count[Status.OUT_OF_MEMORY] + count[Status.CRASHED],
                    "pruned": count[Status.PRUNED],
                    "running": count[Status.RUNNING],
                    "left": left,
                    "share": min((ended + started) / planned, 1.0) if planned else None,
                }
            )
    table = pl.DataFrame(rows, schema={name: kind for name, kind in schema.items() if name != "seconds_left"})
    parts = list(_seconds_left(run, table))
    totals = [None if None in part else sum(filter(None, part)) for part in parts]
    return table.with_columns(pl.Series("seconds_left", totals, pl.Float64))


def _seconds_left(run: Snapshot, table: pl.DataFrame) -> Iterator[list[float | None]]:
    """For each row of the table without its last column, the time that every run that has not ended still takes."""
    times, runs = RunTimes(run.runs(), run.cost().iter_rows(named=True)), run.runs()
    begun: dict[tuple[str, str], list[float | None]] = {}
    for row in runs.filter(~pl.col("status").is_in(ENDED)).iter_rows(named=True):
        begun.setdefault((row["arm"], row["stage"]), []).append(times.left(row))
    for arm, stage, left in table.select("arm", "stage", "left").iter_rows():
        started = begun.get((arm, stage), [])[:left]
        yield [*started, *[times.of(arm, stage)] * (left - len(started))]


@dataclass(frozen=True)
class Progress:
    """Progress of a whole ablation."""

    state: str
    """``not launched``, ``starting`` (workers that have not begun), ``running``, ``not running``, ``finished`` or
    ``gone`` (its folder was deleted)."""
    ended: int
    planned: int
    share: float
    """Of the planned steps."""
    seconds_left: float | None
    """Until the last run ends, with the workers that are alive or about to start: start-up, training and evaluation of
    every run. None where unknown or where no worker is at work."""
    elapsed: float | None
    """Seconds since the launch, up to the last sign of work where no worker is alive; None where unknown."""

    @property
    def times(self) -> str:
        """Time elapsed and left, in words; empty where both are unknown."""
        parts = [] if self.elapsed is None else [f"{duration(self.elapsed)} elapsed"]
        parts += [] if self.seconds_left is None else [f"about {duration(self.seconds_left)} left"]
        return ", ".join(parts)


def overall_progress(run: Snapshot) -> Progress:
    """Progress of the whole ablation."""
    if not run.exists:
        return Progress("gone", 0, run.total, 0.0, None, None)
    table, workers = progress_table(run), len(run.workers())
    waiting = 0 if workers or run.finished or not run.launched else _num_waiting(run)
    planned, left = int(table["planned"].sum()), int(table["left"].sum())
    state = "running" if workers else "starting" if waiting else "not running" if run.launched else "not launched"
    state = "finished" if run.finished else state
    share = float((table["share"] * table["planned"]).sum()) / planned if planned else 0.0
    at_work = state in ("running", "starting")
    in_order = table.sort("stage", descending=True, maintain_order=True)  # tuning, repeat, confirmation
    parts = [seconds for row in _seconds_left(run, in_order) for seconds in row]
    known = at_work and None not in parts
    return Progress(
        state,
        ended=planned - left,
        planned=planned,
        share=1.0 if run.finished else share,
        seconds_left=makespan(filter(None, parts), workers or waiting) if known else None,
        elapsed=_elapsed(run, at_work),
    )


def _num_waiting(run: Snapshot) -> int:
    try:
        return len(run.waiting_workers())
    except ConfigError:  # this machine does not reach the launcher
        return 0


def _elapsed(run: Snapshot, at_work: bool) -> float | None:
    """Seconds from the launch to now, or to the last sign of work."""
    try:
        began = datetime.strptime(run.provenance().get("created", ""), "%Y-%m-%d %H:%M:%S %z").timestamp()
    except ValueError:
        return None
    if at_work:
        return max(0.0, time.time() - began)
    if run.archived:
        return None
    signs = [*run.folder.glob("runs/*/status.json"), *run.folder.glob("runs/*/metrics.jsonl")]
    return max((path.stat().st_mtime for path in signs), default=began) - began
