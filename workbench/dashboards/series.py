"""What a run records while it trains, as curves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from workbench.dashboards.figures.parts import loss_title
from workbench.dashboards.snapshot import Snapshot
from workbench.results.tables import Line

__all__ = ["SERIES", "recorded", "series_title"]


class Series(NamedTuple):
    """A recorded quantity."""

    label: str
    title: str
    """Of an axis."""


SERIES: dict[str, Series] = {
    "loss": Series("Training loss", ""),
    "selection_value": Series("Selection", ""),
    "learning_rate": Series("Learning rate", "learning rate"),
    "gradient_norm": Series("Gradient norm", "norm of the gradient before clipping"),
    "gradient_rms_median": Series("Gradient RMS", "root mean square of gradients, median over parameters"),
    "gradient_rms_min": Series("Gradient RMS, smallest", "root mean square of gradients, smallest of a parameter"),
    "gradient_rms_max": Series("Gradient RMS, largest", "root mean square of gradients, largest of a parameter"),
    "tokens_per_second": Series("Tokens/s", "training speed (tokens per second)"),
    "flops_per_second": Series("FLOP/s", "training speed (FLOPs per second)"),
    "memory_bytes": Series("Memory", "peak memory so far (bytes)"),
    "skipped": Series("Steps skipped", "steps skipped by guards so far"),
    "rolled_back": Series("Roll-backs", "windows rolled back by guards so far"),
    "step_seconds": Series("Step time", "time of a step (s)"),
    "rank_imbalance": Series("Imbalance of ranks", "slowest rank divided by the mean"),
    "waiting": Series("Waiting", "share of the ranks' time spent waiting"),
    "budget": Series("Blocks per query", "blocks per query that the budget tuner chose"),
    "coverage_lost": Series("Coverage lost", "share of the selection scores lost to the budgets"),
}
"""Column of a run's points (:data:`workbench.results.tables.POINT_SCHEMA`) -> what it is."""


def series_title(run: Snapshot, name: str) -> str:
    """Title of an axis along a recorded quantity."""
    return SERIES[name].title or loss_title(run, name)


def recorded(lines: Iterable[Line]) -> list[str]:
    """The quantities that any of the runs has recorded."""
    names: set[str] = set()
    for line in lines:
        names |= line.points.recorded
    return [name for name in SERIES if name in names]
