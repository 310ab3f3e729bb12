"""What each arm costs, and its quality against that."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import polars as pl

from workbench.dashboards.snapshot import Snapshot
from workbench.results.tables import confirmed
from workbench.status import Stage, Status

CostAxis: TypeAlias = Literal["training_flops", "non_embedding", "active", "cache_bytes", "measured_rate"]
"""What quality is weighed against; larger is better for ``measured_rate``, smaller for all others."""


def cost_table(run: Snapshot) -> pl.DataFrame:
    """The cost card from before launch, and what was measured since.

    The columns of ``run.cost()``, then: measured_seconds (median training time of a finished run), measured_rate
    (median of its last tokens per second), spent_seconds and spent_flops (all runs, failed ones included).
    """
    done = pl.col("status") == Status.DONE
    measured = (
        run.runs()
        .group_by("arm", maintain_order=True)
        .agg(
            measured_seconds=pl.col("seconds").filter(done).median(),
            measured_rate=pl.col("tokens_per_second").filter(done).median(),
            spent_seconds=pl.col("seconds").sum(),
            spent_flops=pl.col("flops").sum(),
        )
    )
    card = run.cost()
    return card.join(measured, on="arm", how="left", maintain_order="left") if len(card.columns) > 1 else measured


def frontier_table(run: Snapshot, x: CostAxis = "training_flops") -> pl.DataFrame:
    """Quality against cost, one row per arm.

    Columns: arm; ``x`` under its name (of :func:`cost_table`); value (mean of the report value over confirmation runs),
    low and high (their smallest and largest); runs; stage (``tuning``: the selection value of the chosen trial is used
    while no confirmation run is done); best (no other arm is at least as good and at least as cheap). Arms without a
    value or a cost have no row.
    """
    schema = {
        "arm": pl.String,
        x: pl.Float64,
        "value": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "stage": pl.String,
        "best": pl.Boolean,
    }
    costs: dict[str, Any] = {row["arm"]: row.get(x) for row in cost_table(run).iter_rows(named=True)}
    rows: list[list[Any]] = []
    for arm in run.arms:
        quality = _quality(run.runs().filter(pl.col("arm") == arm))
        if quality is not None and costs.get(arm) is not None:
            rows.append([arm, float(costs[arm]), *quality])
    sign = -1 if x == "measured_rate" else 1
    for row in rows:
        dominated = any(
            sign * other[1] <= sign * row[1] and other[2] <= row[2] and (other[1] != row[1] or other[2] != row[2])
            for other in rows
        )
        row.append(not dominated)
    return pl.DataFrame(rows, schema=schema, orient="row")


def confirmed_values(run: Snapshot) -> pl.DataFrame:
    """One row per arm with finished confirmation runs: arm; value (mean of the report value), low and high (the
    smallest and the largest); runs."""
    rows: list[list[Any]] = []
    for arm in run.arms:
        quality = _quality(run.runs().filter(pl.col("arm") == arm))
        if quality is not None and quality[-1] == Stage.CONFIRMATION:
            rows.append([arm, *quality[:-1]])
    schema = {"arm": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "runs": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _quality(runs: pl.DataFrame) -> tuple[float, float, float, int, str] | None:
    """Mean, smallest and largest value of an arm, the number of runs and their stage."""
    values = confirmed(runs)["report_value"].drop_nulls()
    if len(values):
        return values.mean(), values.min(), values.max(), len(values), Stage.CONFIRMATION  # type: ignore[return-value]
    trials = runs.filter(pl.col("stage") == Stage.TUNING).filter(pl.col("selection_value").is_finite())
    chosen = trials.filter(pl.col("selected")) if trials["selected"].any() else trials.sort("selection_value").head(1)
    if not len(chosen):
        return None
    value = chosen["selection_value"][0]
    return value, value, value, 1, Stage.TUNING
