"""Diagnostics to read beside a verdict: drift of the machine, tuning effort, expected best of k trials."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import stats

from workbench.ablation.spec.tuning import EXCHANGEABLE
from workbench.ablation.verdict.statistics import expected_best_of
from workbench.files import read_json, read_jsonl
from workbench.formatting import share
from workbench.results.tables import confirmed
from workbench.status import ENDED, Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

DRIFT_ALPHA = 0.01
"""Level at which a trend of the baseline's metric over time is reported as drift."""
MIN_RUNS_FOR_TREND = 6
"""With fewer runs even a perfect trend does not reach that level."""
SPEED_ALERT = 0.1
"""Relative change of the baseline's speed that is reported as drift."""


BEST_OF_DRAWS = 200
"""Bootstrap draws behind the interval of a best of k."""


def best_of_table(run: Any) -> pl.DataFrame:
    """Expected best selection value of k tuning trials, for every arm and k (Tang et al. 2020, arXiv 2004.13705).

    Trials must be exchangeable: a grid, or a sampler that learns, has no rows, since a random part of its trials is no
    shorter search. Trials that failed count as infinitely bad, so that an arm pays for them. Pruned ones are left out:
    their values at the end are unknown, and the last ones before it are no bounds.

    If curves cross, the order of the arms depends on the tuning effort. The interval, the middle 90 % over a bootstrap
    of the trials, is too narrow where k is near their number (Dodge et al. 2021, arXiv 2110.00613, on the variance).
    Columns: arm, k, best (null if it is infinite), low, high (null likewise), trials, finished, pruned.
    """
    schema: dict[str, Any] = {
        "arm": pl.String,
        "k": pl.Int64,
        "best": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "trials": pl.Int64,
        "finished": pl.Int64,
        "pruned": pl.Int64,
    }
    if run.tuning.sampler not in EXCHANGEABLE:
        return pl.DataFrame(schema=schema)
    rows: list[tuple[Any, ...]] = []
    ended = run.runs().filter((pl.col("stage") == Stage.TUNING) & pl.col("status").is_in(ENDED))
    for arm in run.arms:
        trials = ended.filter(pl.col("arm") == arm).select("status", "selection_value").rows()
        values = tuple(
            math.inf if status != Status.DONE or value is None else value
            for status, value in trials
            if status != Status.PRUNED
        )
        counts = len(values), sum(map(math.isfinite, values)), len(trials) - len(values)
        for k, numbers in enumerate(_best_of(values), start=1):
            rows.append((arm, k, *(number if math.isfinite(number) else None for number in numbers), *counts))
    return pl.DataFrame(rows, schema=schema, orient="row")


@lru_cache
def _best_of(values: tuple[float, ...]) -> list[tuple[float, float, float]]:
    """Expected best of k = 1, 2, … n values, with the middle 90 % over a bootstrap. Slow, so each is computed once."""
    values_n, n, random = np.array(values), len(values), np.random.default_rng(0)
    drawn_Bn = values_n[random.integers(0, n, (BEST_OF_DRAWS, n))] if n else values_n
    return [
        (expected_best_of(values_n, k), *_middle([expected_best_of(drawn, k) for drawn in drawn_Bn]))
        for k in range(1, n + 1)
    ]


def _middle(values: list[float]) -> tuple[float, float]:
    """The middle 90 % of values, some of which may be infinite."""
    ordered = sorted(values)
    return ordered[int(0.05 * len(ordered))], ordered[int(0.95 * len(ordered))]


def _spread(best: float | None, low: float | None, high: float | None) -> str:
    if best is None:
        return "–"
    return f"{best:.4f}" if low is None or high is None else f"{best:.4f} ({low:.4f} to {high:.4f})"


def drift_table(run: AblationRun) -> pl.DataFrame:
    """The baseline's confirmation runs by start time; every seed has one, so they show drift of the machine.

    Columns: run, seed, started (seconds since the first), tokens_per_second (median over the run), value (the metric),
    device, code, torch.
    """
    rows = []
    for row in confirmed(run.runs()).filter(pl.col("arm") == run.baseline).iter_rows(named=True):
        folder = Path(row["folder"])
        events = read_jsonl(folder / "events.jsonl")
        starts = [event["at"] for event in events if event["event"] in ("started", "resumed")]
        logged = (row.get("tokens_per_second") for row in read_jsonl(folder / "metrics.jsonl"))
        speeds = [speed for speed in logged if speed is not None]  # a run that trains nothing has none
        where = read_json(folder / "environment.json")
        rows.append(
            {
                "run": row["run"],
                "seed": row["seed"],
                "started": starts[0] if starts else None,
                "tokens_per_second": float(np.median(speeds)) if speeds else None,
                "value": row["report_value"],
                "device": where.get("device"),
                "code": where.get("code"),
                "torch": where.get("libraries", {}).get("torch"),
            }
        )
    schema = {
        "run": pl.String,
        "seed": pl.Int64,
        "started": pl.Float64,
        "tokens_per_second": pl.Float64,
        "value": pl.Float64,
        "device": pl.String,
        "code": pl.String,
        "torch": pl.String,
    }
    return (
        pl.DataFrame(rows, schema=schema, orient="row")
        .sort("started")
        .with_columns(pl.col("started") - pl.col("started").min())
    )


def drift(table: pl.DataFrame) -> list[str]:
    """The findings of :func:`drift_table` in sentences: trend of the metric over time (Kendall's rank test, our
    choice), change of speed between the first and the second half, and machines or versions that differ."""
    sentences = []
    runs = table.drop_nulls(["started", "value", "tokens_per_second"])
    if len(runs) >= 3:
        half = len(runs) // 2
        speeds = runs["tokens_per_second"].to_numpy()
        early, late = np.median(speeds[:half]), np.median(speeds[-half:])
        change = late / early - 1
        values = runs["value"].to_numpy()
        if len(runs) < MIN_RUNS_FOR_TREND or np.ptp(values) == 0:
            finding = f"{len(runs)} runs of the baseline are too few, or too equal, to show a trend of its metric"
        else:
            trend = stats.kendalltau(runs["started"].to_numpy(), values)
            drifts = trend.pvalue < DRIFT_ALPHA
            finding = (
                f"{'DRIFT: a trend' if drifts else 'No trend'} of the baseline's metric over its {len(runs)} runs "
                f"(Kendall's tau {trend.statistic:+.2f}, p {trend.pvalue:.2g})"
            )
        speed = f"speed of the later half {share(change)} against the earlier"
        sentences.append(f"{finding}; {'DRIFT: ' if abs(change) > SPEED_ALERT else ''}{speed}.")
    for name in ("device", "code", "torch"):
        if len(names := sorted(set(table[name].drop_nulls()))) > 1:
            sentences.append(f"The baseline ran on more than one {name}: {', '.join(names)}.")
    return sentences


def notes(run: AblationRun) -> list[str]:
    """Lines to print beside the verdict: tuning effort, expected best of k, drift."""
    lines = [f"Tuning: {run.tuning.describe()}."]
    table = best_of_table(run)
    for arm in run.arms:
        trials = table.filter(pl.col("arm") == arm)
        if len(trials):
            best = ", ".join(
                f"{k}: {_spread(*row)}" for k, *row in trials.select("k", "best", "low", "high").iter_rows()
            )
            pruned = f", {trials['pruned'][0]} pruned ones left out" if trials["pruned"][0] else ""
            lines.append(
                f"{arm}: {trials['finished'][0]} of {trials['trials'][0]} tuning trials finished{pruned}; "
                f"expected best of k ({run.metric.unit}, selection): {best}."
            )
    return lines + drift(drift_table(run))
