"""Which report values may be read before an ablation has ended: none, except at declared looks."""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.verdict.measurements import looks_taken
from workbench.status import Stage

__all__ = ["readable_seeds", "sealed"]


def readable_seeds(folder: AblationFolder, record: LaunchRecord) -> Collection[int] | None:
    """Seeds whose report values may be read; None if all may."""
    if folder.is_finished or record.config.confirmation.split != "report":
        return None
    looks = looks_taken(folder)
    return record.config.planned_seeds[: looks[-1].seeds] if looks else ()


def sealed(runs: pl.DataFrame, seeds: Collection[int] | None) -> pl.DataFrame:
    """A table of runs without the report values that may not be read yet.

    Args:
        runs: columns in :data:`workbench.results.tables.RUN_SCHEMA`.
        seeds: those of :func:`readable_seeds`.
    """
    if seeds is None:
        return runs
    hidden = (pl.col("stage") == Stage.CONFIRMATION) & ~pl.col("seed").is_in(list(seeds))
    return runs.with_columns(report_value=pl.when(~hidden).then("report_value"))
