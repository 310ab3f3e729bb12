"""What a reader of a verdict should look at beside it: drift of the machine, tuning effort, best of k trials. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import stats

from workbench.ablation.verdict.statistics import expected_best_of
from workbench.files import read_json, read_jsonl
from workbench.status import ENDED, Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

DRIFT_ALPHA = 0.01
"""Level at which a trend of the baseline's metric over time is told as one."""
FEWEST = 6
"""Runs from which on even a perfect trend can reach that level."""
SLOWER = 0.1
"""Change of the baseline's speed that is told."""


def best_of_table(run: Any) -> pl.DataFrame:
    """Expected best selection value of k tuning trials, for every arm and k; trials that failed or were pruned count as
    infinitely bad, so that an arm pays for them.

    Crossing curves say that the order of the arms depends on the tuning effort. Columns: arm, k, best (null where fewer than
    one of the k can be expected to have finished), trials, finished.
    """
    rows: list[dict[str, Any]] = []
    held = run.runs().filter((pl.col("stage") == Stage.TUNING) & pl.col("status").is_in(ENDED))
    for arm in run.arms:
        values = [
            math.inf if status != Status.DONE or value is None else value
            for status, value in held.filter(pl.col("arm") == arm).select("status", "selection_value").iter_rows()
        ]
        for k in range(1, len(values) + 1):
            best = expected_best_of(values, k)
            rows.append(
                {
                    "arm": arm,
                    "k": k,
                    "best": best if math.isfinite(best) else None,
                    "trials": len(values),
                    "finished": sum(map(math.isfinite, values)),
                }
            )
    return pl.DataFrame(
        rows, schema={"arm": pl.String, "k": pl.Int64, "best": pl.Float64, "trials": pl.Int64, "finished": pl.Int64}
    )


def drift_table(run: AblationRun) -> pl.DataFrame:
    """The baseline's confirmation runs in the order they began; every batch of seeds holds one, so they tell of the machine.

    Columns: run, seed, began (seconds since the first), tokens_per_second (median over the run), value (the metric), device,
    code, torch.
    """
    rows = []
    done = (pl.col("arm") == run.baseline) & (pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE)
    for row in run.runs().filter(done).iter_rows(named=True):
        folder = Path(row["folder"])
        began = [e["at"] for e in read_jsonl(folder / "events.jsonl") if e["event"] in ("started", "resumed")]
        speeds = [m["tokens_per_second"] for m in read_jsonl(folder / "metrics.jsonl")]
        where = read_json(folder / "environment.json")
        rows.append(
            {
                "run": row["run"],
                "seed": row["seed"],
                "began": began[0] if began else None,
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
        "began": pl.Float64,
        "tokens_per_second": pl.Float64,
        "value": pl.Float64,
        "device": pl.String,
        "code": pl.String,
        "torch": pl.String,
    }
    return (
        pl.DataFrame(rows, schema=schema, orient="row")
        .sort("began")
        .with_columns(pl.col("began") - pl.col("began").min())
    )


def drift(table: pl.DataFrame) -> list[str]:
    """What :func:`drift_table` says, in sentences: trend of the metric over time (Kendall's rank test, ours), change of speed
    between the first and the second half, and machines or versions that differ."""
    sentences = []
    held = table.drop_nulls(["began", "value", "tokens_per_second"])
    if len(held) >= 3:
        half = len(held) // 2
        speeds = held["tokens_per_second"].to_numpy()
        early, late = np.median(speeds[:half]), np.median(speeds[-half:])
        change = late / early - 1
        values = held["value"].to_numpy()
        if len(held) < FEWEST or np.ptp(values) == 0:
            told = f"{len(held)} runs of the baseline are too few, or too equal, to tell a trend of its metric"
        else:
            trend = stats.kendalltau(held["began"].to_numpy(), values)
            drifts = trend.pvalue < DRIFT_ALPHA
            told = (
                f"{'DRIFT: a trend' if drifts else 'No trend'} of the baseline's metric over its {len(held)} runs "
                f"(Kendall's tau {trend.statistic:+.2f}, p {trend.pvalue:.2g})"
            )
        speed = f"speed of the later half {change:+.1%} against the earlier"
        sentences.append(f"{told}; {'DRIFT: ' if abs(change) > SLOWER else ''}{speed}.")
    for name in ("device", "code", "torch"):
        if len(found := sorted(set(table[name].drop_nulls()))) > 1:
            sentences.append(f"The baseline ran on more than one {name}: {', '.join(found)}.")
    return sentences


def notes(run: AblationRun) -> list[str]:
    """Beside the verdict: tuning effort, best of k, drift."""
    lines = []
    table = best_of_table(run)
    for arm in run.arms:
        mine = table.filter(pl.col("arm") == arm)
        if len(mine):
            best = ", ".join(
                f"{k}: {'–' if b is None else f'{b:.4f}'}" for k, b in mine.select("k", "best").iter_rows()
            )
            lines.append(
                f"{arm}: {mine['finished'][0]} of {mine['trials'][0]} tuning trials finished; expected best of k ({run.metric.unit}, "
                f"selection): {best}."
            )
    return lines + drift(drift_table(run))
