"""Scores of evaluation suites as what arms measured: from the long table to the judge.

The same reading serves secondary metrics, which are judged, and all other scores, which are described.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.spec.protocol import ScoreMetric
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import Score, judge_in_order
from workbench.ablation.verdict.sequential import Reading
from workbench.ablation.verdict.verdict import Verdict
from workbench.results.tables import confirmed

__all__ = ["NOT_MEASURED", "final_scores", "measured_score", "secondary"]

NOT_MEASURED = "not measured"
"""Why a finished run has no value of a score: its suite failed, or was never run."""


def final_scores(scores: pl.DataFrame, runs: pl.DataFrame) -> pl.DataFrame:
    """What suites measured at the end of the confirmation runs that are done.

    Args:
        scores: columns in :data:`workbench.results.tables.SCORES_SCHEMA`, then labels of documents.
        runs: columns in :data:`workbench.results.tables.RUN_SCHEMA`.
    """
    last = confirmed(runs).select("run", pl.col("steps").alias("step"))
    return scores.join(last, on=["run", "step"], how="semi", maintain_order="left")


def measured_score(
    scores: pl.DataFrame,
    metric: ScoreMetric,
    arms: Sequence[str],
    seeds: Sequence[int],
    failures: Mapping[str, Mapping[int, str]] | None = None,
) -> Score:
    """What arms measured in a score, as a loss: a rate of which more is better counts as the rest up to its upper end,
    any other such score with its sign changed, as the unit states.

    The value of a run is the mean over documents, weighted by their denominators; of several tasks, the mean over tasks
    (documents are weighted so that every task has the same weight). Documents are kept, for the bootstrap, where every
    run has the same ones; a score that only whole tasks have, such as a macro F1, counts as one document.

    Args:
        scores: of the ends of runs (:func:`final_scores`).
        metric: the score.
        arms: the baseline first.
        seeds: of confirmation runs; one without a value counts as not measured.
        failures: arm -> seed -> why its run did not finish.

    Returns:
        the score; without arms if no run measured it.
    """
    rows = scores.filter((pl.col("suite") == metric.suite) & (pl.col("metric") == metric.metric))
    rows = rows.filter(pl.col("arm").is_in(list(arms)) & (pl.col("count") > 0) & pl.col("value").is_finite())
    if metric.task is not None:
        rows = rows.filter(pl.col("task") == metric.task)
    for name, value in metric.where.items():
        rows = rows.filter(_is(rows, name, value))
    tables = _tables(rows, whole=not metric.where)
    if not tables:
        return Score((), metric.metric, None, metric.margin, metric.effect, metric.label)
    is_better, upper = bool(rows["higher_is_better"][0]), rows["upper"][0]
    sizes_D, clusters_D = _sizes(next(iter(tables.values())))
    reasons = {arm: (failures or {}).get(arm, {}) for arm in arms}
    measured = []
    for arm in arms:
        amounts = {
            seed: _loss(tables[arm, seed]["value"].to_numpy(), is_better, upper) * sizes_D
            for seed in seeds
            if (arm, seed) in tables and seed not in reasons[arm]
        }
        failed = {seed: reasons[arm].get(seed, NOT_MEASURED) for seed in seeds if seed not in amounts}
        measured.append(ArmMeasurements(arm, amounts, sizes_D, failed, clusters_D))
    unit = metric.metric
    if is_better:
        unit = f"−{unit}" if upper is None else f"{upper:g} − {unit}"
    return Score(measured, unit, upper, metric.margin, metric.effect, f"{metric.subject}: {unit}")


def secondary(
    folder: AblationFolder,
    record: LaunchRecord,
    arms: Mapping[str, ArmMeasurements],
    readings: Mapping[str, Reading] | None,
    exploratory: str | None,
) -> tuple[Verdict, ...]:
    """The verdicts by the declared secondary metrics, in their order.

    Args:
        folder: of the ablation.
        record: of its launch.
        arms: what the arms measured in the primary metric; their seeds and failures are those that count.
        readings: arm -> the look of a sequential design at which it is read, as for the primary metric.
        exploratory: the reason, if the ablation deviated from what was declared.
    """
    config = record.config
    if not config.protocol.secondary:
        return ()
    seeds, scores = config.confirmation.independent_seeds, final_scores(folder.scores(), folder.runs())
    failures = {arm: part.failures for arm, part in arms.items()}
    return judge_in_order(
        [measured_score(scores, metric, record.order, seeds, failures) for metric in config.protocol.secondary],
        baseline=record.order[0],
        alpha=config.alpha,
        exploratory=exploratory,
        seeds=seeds,
        comparisons=config.protocol.comparisons,
        readings=readings,
    )


def _is(rows: pl.DataFrame, name: str, value: int | float | str) -> pl.Expr:
    """Whether documents have a label of this value."""
    if name not in rows.columns:
        return pl.lit(False)
    if isinstance(value, str) or rows.schema[name] == pl.String:
        return pl.col(name).cast(pl.String) == str(value)
    return pl.col(name) == value


def _tables(rows: pl.DataFrame, whole: bool) -> dict[tuple[str, int], pl.DataFrame]:
    """(Arm, seed) -> its documents in one order, where all runs have the same ones, otherwise its tasks as a whole.
    Runs that lack a task are left out.

    Args:
        rows: of one metric.
        whole: whether rows of whole tasks are among them; of a part of the documents they are the mean of that part.
    """
    tasks = rows["task"].n_unique()

    def by_run(frame: pl.DataFrame) -> dict[tuple[str, int], pl.DataFrame]:
        parts = frame.sort("task", "document").partition_by("arm", "seed", as_dict=True)
        return {(arm, seed): part for (arm, seed), part in parts.items() if part["task"].n_unique() == tasks}

    documents, totals = rows.filter(pl.col("document").is_not_null()), rows.filter(pl.col("document").is_null())
    if not whole:
        mean = (pl.col("value") * pl.col("count")).sum() / pl.col("count").sum()
        groups = documents.group_by("arm", "seed", "task").agg(mean.alias("value"), pl.col("count").sum())
        totals = groups.with_columns(document=pl.lit(None, pl.Int64))
    by_document, by_task = by_run(documents), by_run(totals)
    keys = [part.select("task", "document", "count") for part in by_document.values()]
    alike = len(by_document) == len(by_task) and all(key.equals(keys[0]) for key in keys)
    return by_document if alike else by_task


def _sizes(documents: pl.DataFrame) -> tuple[np.ndarray, np.ndarray | None]:
    """(D,) sizes of documents, with which every task has the same weight, and (D,) their clusters, if they have any."""
    tasks, count = pl.col("task"), pl.col("count")
    shares = documents.select(count / count.sum().over("task") * count.sum() / tasks.n_unique())
    clusters: np.ndarray | None = None
    if "cluster" in documents.columns and not documents["cluster"].null_count():
        clusters = documents.select(pl.struct("task", "cluster").rank("dense")).to_series().to_numpy()
    return shares.to_series().to_numpy(), clusters


def _loss(value_D: np.ndarray, is_better: bool, upper: float | None) -> np.ndarray:
    """Values of which less is better."""
    return value_D if not is_better else (upper or 0.0) - value_D
