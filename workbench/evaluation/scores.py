"""What a suite measured, before it becomes rows of the long table. Legend: D documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

__all__ = ["Measured", "Score"]


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    metric: str
    """Unit ("bits per byte"), or the published name ("acc_norm")."""
    values: Sequence[float] | np.ndarray | None = None
    """(D,) the metric of every document; None of a metric that single documents do not have, such as a macro F1."""
    counts: Sequence[float] | np.ndarray | None = None
    """(D,) denominators: what the documents weigh in the mean. Default: 1 each."""
    total: float | None = None
    """The metric of all documents together. Default: the weighted mean of ``values``."""
    higher_is_better: bool = False
    upper: float | None = None
    """Largest value of a rate, whose least is 0: arms are compared by exact tests then, otherwise by t
    (:attr:`workbench.metric.Metric.upper`)."""


@dataclass(frozen=True)
class Measured:
    """What a suite measured on one task."""

    scores: Sequence[Score]
    documents: pl.DataFrame = field(default_factory=pl.DataFrame)
    """(D, labels) labels of the documents in tables. ``cluster`` numbers groups of documents that are alike, which
    resampling keeps together; default: every document alone."""

    def frame(self) -> pl.DataFrame:
        """Rows of the long table: for every metric that of all documents (``document`` is null), then every document.

        Raises:
            ValueError: for a metric without documents and without total.
        """
        frames = []
        for score in self.scores:
            values = np.asarray([] if score.values is None else score.values, np.float64)
            counts = np.ones(len(values)) if score.counts is None else np.asarray(score.counts, np.float64)
            if score.total is None and not counts.sum() > 0:
                raise ValueError(f"{score.metric}: no documents to take the mean of")
            total = score.total if score.total is not None else float(np.average(values, weights=counts))
            whole = pl.DataFrame(
                {"document": [None], "value": [total], "count": [float(counts.sum()) or float(len(self.documents))]},
                schema={"document": pl.Int64, "value": pl.Float64, "count": pl.Float64},
            )
            single = pl.DataFrame(
                {"document": np.arange(len(values)), "value": values, "count": counts},
                schema={"document": pl.Int64, "value": pl.Float64, "count": pl.Float64},
            )
            if len(values) and self.documents.width:
                single = pl.concat([single, self.documents], how="horizontal")
            frames.append(
                pl.concat([whole, single], how="diagonal").with_columns(
                    pl.lit(score.metric).alias("metric"),
                    pl.lit(score.higher_is_better).alias("higher_is_better"),
                    pl.lit(score.upper, pl.Float64).alias("upper"),
                )
            )
        return pl.concat(frames, how="diagonal")
