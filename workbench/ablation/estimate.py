"""How long the runs of an ablation take: start-up, training and evaluation. Nothing else estimates it.

Until runs have ended, from the cost card; then from the wall times of those that have, by arm and stage. What is known
of one arm or stage carries over to the others in the ratio of their cards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from workbench.formatting import duration
from workbench.status import ENDED, Stage, Status

if TYPE_CHECKING:
    import polars as pl

__all__ = ["RunTimes", "card_seconds", "describe_total", "makespan", "total_seconds"]

MEASURED = (Status.DONE, Status.PRUNED)
"""Ends that say how long further runs take; a failed run may have ended at once."""


def _overhead(row: Mapping[str, Any], stage: str) -> float | None:
    """Start-up and evaluation of one run by its row of the cost card; None where they were not measured."""
    parts = [row.get("startup_seconds"), row.get("evaluation_seconds")]
    parts += [row.get("report_seconds")] if stage == Stage.CONFIRMATION else []
    return None if None in parts else sum(filter(None, parts))


def card_seconds(row: Mapping[str, Any], stage: str) -> float | None:
    """Wall time of one run by its row of the cost card (:func:`workbench.ablation.cost.card.cost_table`), in seconds;
    None where it was not measured."""
    training, overhead = row.get("seconds_per_trial"), _overhead(row, stage)
    return None if training is None or overhead is None else training + overhead


def makespan(seconds: Iterable[float], workers: int) -> float:
    """When the last run ends, if every worker takes the next one as soon as it is free.

    Args:
        seconds: of each run, in the order in which they are taken.
        workers: their number, at least 1.
    """
    busy = [0.0] * max(1, workers)
    for one in seconds:
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)


def total_seconds(card: Sequence[Mapping[str, Any]], workers: int) -> float | None:
    """Time of all planned runs of all arms by the cost card; None where it was not measured."""
    totals = [row.get("seconds_total") for row in card]
    return None if None in totals else sum(filter(None, totals)) / max(1, workers)


def describe_total(card: Sequence[Mapping[str, Any]], workers: int) -> str:
    """The time of all planned runs in one sentence; empty where nothing was measured."""
    with_workers = f"with {workers} worker{'s' * (workers != 1)}"
    total, runs = total_seconds(card, workers), sum(row["trials"] for row in card)
    if total is not None and all("evaluation_seconds" in row for row in card):
        suites = ", without evaluation suites" if any(row.get("suites") for row in card) else ""
        what = f"start-up, training and evaluation of {runs} runs{suites}"
        return f"Total time: about {duration(total)} {with_workers} ({what})."
    training = [row.get("seconds_per_trial") for row in card]
    if None in training:
        return ""
    alone = sum(seconds * row["trials"] for seconds, row in zip(filter(None, training), card)) / max(1, workers)
    return f"Training alone: about {duration(alone)} {with_workers}; start-up and evaluation were not measured."


class RunTimes:
    """Wall times of the runs of an ablation, measured where possible.

    Args:
        runs: columns in :data:`workbench.results.tables.RUN_SCHEMA`.
        card: rows of the cost card; missing columns count as not measured.
    """

    def __init__(self, runs: pl.DataFrame, card: Iterable[Mapping[str, Any]]):
        self._card = {row["arm"]: row for row in card}
        walls: dict[tuple[str, str], list[float]] = {}
        overheads: dict[str, list[float]] = {}
        training: dict[str, list[float]] = {}
        so_far = 0.0  # the largest overhead of a run that has not ended
        columns = ("arm", "stage", "status", "step", "steps", "seconds", "wall_seconds")
        for arm, stage, status, step, steps, seconds, wall in runs.select(columns).iter_rows():
            if step and seconds:
                training.setdefault(arm, []).append(seconds / step * steps)
            if status not in ENDED and wall is not None:
                so_far = max(so_far, wall - (seconds or 0.0))
            elif status in MEASURED and wall is not None:
                walls.setdefault((arm, stage), []).append(wall)
                overheads.setdefault(stage, []).append(max(0.0, wall - (seconds or 0.0)))
        self._walls = {key: fmean(values) for key, values in walls.items()}
        self._overheads = {stage: fmean(values) for stage, values in overheads.items()}
        self._overhead_so_far = so_far
        self._training = {arm: fmean(values) for arm, values in training.items()}

    def of(self, arm: str, stage: str) -> float | None:
        """Expected wall time of one run in seconds; None while it is unknown."""
        if (arm, stage) in self._walls:
            return self._walls[arm, stage]
        training, overhead = self._training_of(arm), self._overhead_of(arm, stage)
        if overhead is None and self._training:  # the card does not know; more than this is known when a run has ended
            overhead = self._overhead_so_far
        return None if training is None or overhead is None else training + overhead

    def left(self, row: Mapping[str, Any]) -> float | None:
        """Expected time that a run still takes, in seconds: 0 once it has ended, None while it is unknown.

        Args:
            row: its row of the table of runs.
        """
        if row["status"] in ENDED:
            return 0.0
        whole = self.of(row["arm"], row["stage"])
        share = (row["step"] or 0) / row["steps"] if row["steps"] else 0.0
        if row["status"] != Status.RUNNING:  # it resumes from its checkpoint
            return None if whole is None else whole * (1 - share)
        steps_left = row["seconds_left"]
        if whole is None:
            return None
        return max(whole - (row["wall_seconds"] or 0.0), steps_left or 0.0)

    def _training_of(self, arm: str) -> float | None:
        """Training time of one run."""
        if arm in self._training:
            return self._training[arm]
        card = {name: row.get("seconds_per_trial") for name, row in self._card.items()}
        if not self._training:
            return card.get(arm)
        if card.get(arm) and all(card.get(other) for other in self._training):
            ratio = fmean(self._training.values()) / fmean(card[other] or 0.0 for other in self._training)
            return (card[arm] or 0.0) * ratio
        return fmean(self._training.values())

    def _overhead_of(self, arm: str, stage: str) -> float | None:
        """Start-up and evaluation of one run."""
        if stage in self._overheads:
            return self._overheads[stage]
        row = self._card.get(arm)
        known = None if row is None else _overhead(row, stage)
        for other, seconds in self._overheads.items():
            other_known = None if row is None else _overhead(row, other)
            return seconds * known / other_known if known and other_known else seconds
        return known
