"""Accuracy on the examples of a task."""

from __future__ import annotations

from typing import Any

import polars as pl

from workbench.dashboards.snapshot import Snapshot


def recall_table(run: Snapshot, *labels: str) -> pl.DataFrame:
    """Accuracy on the report examples by their labels.

    Columns: arm; the ``labels`` under their names; accuracy (1 − Σ errors / Σ answers, mean over confirmation runs),
    low and high (smallest and largest of a run); runs; answers (in one run). No row where no confirmation run is done,
    or where the examples do not carry these labels.

    Args:
        run: the run.
        labels: columns of the runs' report.parquet, such as ``pairs``, ``length`` or ``depth`` (per cent).
    """
    schema: dict[str, Any] = {
        "arm": pl.String,
        **dict.fromkeys(labels, pl.Float64),
        "accuracy": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "answers": pl.Int64,
    }
    frames = []
    for arm, _, frame in run.reports():
        if {"errors", "answers", *labels} <= set(frame.columns):
            sums = frame.group_by(*labels, maintain_order=True).agg(pl.col("errors", "answers").sum())
            frames.append(
                sums.select(
                    arm=pl.lit(arm),
                    answers="answers",
                    accuracy=1 - pl.col("errors") / pl.col("answers"),
                    **{label: pl.col(label).cast(pl.Float64) for label in labels},
                )
            )
    if not frames:
        return pl.DataFrame(schema=schema)
    accuracy = pl.col("accuracy")
    table = (
        pl.concat(frames)
        .group_by("arm", *labels, maintain_order=True)
        .agg(
            accuracy=accuracy.mean(),
            low=accuracy.min(),
            high=accuracy.max(),
            runs=pl.len(),
            answers=pl.col("answers").first(),
        )
    )
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return table.sort(order, *labels).select(*schema).cast(schema)  # type: ignore[arg-type]
