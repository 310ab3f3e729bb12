"""How far an ablation has come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from workbench.dashboards.snapshot import Snapshot
from workbench.status import ENDED, Stage, Status


def progress_table(run: Snapshot) -> pl.DataFrame:
    """Progress of each arm, one row per arm and stage.

    Columns: arm, stage, planned, done, failed, pruned, running, left (runs that have not ended), share (of the planned
    steps; a run that ended early counts as a whole one; null where none is planned), seconds_left (training time on one
    worker; null while unknown).
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
    seconds_of: dict[str, list[float]] = {}
    for arm, stage, status, step, steps, seconds in (
        run.runs().select("arm", "stage", "status", "step", "steps", "seconds").iter_rows()
    ):
        runs_of.setdefault((arm, stage), []).append((status, (step or 0) / steps if steps else 0.0))
        if step and seconds is not None:
            seconds_of.setdefault(arm, []).append(seconds / step * steps)
    all_seconds = [seconds for values in seconds_of.values() for seconds in values]
    unconfirmed = run.failures()
    rows = []
    for arm in run.arms:
        estimates = seconds_of.get(arm) or all_seconds
        seconds_per_run = float(np.median(estimates)) if estimates else None
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
            remaining = None if seconds_per_run is None else seconds_per_run * max(left - started, 0.0)
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
                    "seconds_left": remaining if left else 0.0,
                }
            )
    return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass(frozen=True)
class Progress:
    """Progress of a whole ablation."""

    state: str
    """``not launched``, ``running``, ``not running``, ``finished`` or ``gone`` (its folder was deleted)."""
    ended: int
    planned: int
    share: float
    """Of the planned steps."""
    seconds_left: float | None
    """Training time with the workers that are alive; None where unknown or not running."""


def overall_progress(run: Snapshot) -> Progress:
    """Progress of the whole ablation."""
    if not run.exists:
        return Progress("gone", 0, run.total, 0.0, None)
    table, workers = progress_table(run), len(run.workers())
    planned, left = int(table["planned"].sum()), int(table["left"].sum())
    state = "finished" if run.finished else "running" if workers else "not running" if run.launched else "not launched"
    share = float((table["share"] * table["planned"]).sum()) / planned if planned else 0.0
    seconds = table["seconds_left"]
    known = state == "running" and seconds.null_count() == 0
    return Progress(
        state,
        ended=planned - left,
        planned=planned,
        share=1.0 if run.finished else share,
        seconds_left=float(seconds.sum()) / min(workers, max(left, 1)) if known else None,
    )
