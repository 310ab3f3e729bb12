"""From the runs of an ablation to its verdict: the join of documents, seeds and failures in front of the judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.spec.registration import Deviation, describe
from workbench.ablation.verdict.judge import ArmMeasurements, Verdict, judge
from workbench.files import read_json
from workbench.results.store import RunFolder
from workbench.status import ENDED, Stage, Status

__all__ = ["deviations", "measurements", "verdict"]


def measurements(folder: AblationFolder, record: LaunchRecord) -> dict[str, ArmMeasurements] | None:
    """Arm -> what its confirmation runs measured, every arm on the same seeds, failures included.

    Returns:
        None while confirmation runs are missing. In a finished ablation a seed without a run counts as failed.
    """
    finished = folder.is_finished  # read before the runs: one that ends in between is not missing
    confirmations = folder.runs().filter(pl.col("stage") == Stage.CONFIRMATION)
    unconfirmed, seeds, metric = folder.failures(), record.config.confirmation.seeds, record.metric
    sizes: dict[str, Any] = {}
    clusters: Any = None
    joined: dict[str, tuple[dict[int, Any], dict[int, str]]] = {}
    for arm in record.order:
        amounts: dict[int, Any] = {}
        failed = {seed: unconfirmed[arm] for seed in seeds} if arm in unconfirmed else {}
        for row in confirmations.filter(pl.col("arm") == arm).iter_rows(named=True):
            if row["status"] == Status.DONE:
                documents = RunFolder(row["folder"]).report(metric)
                amounts[row["seed"]] = metric.scale * documents[metric.numerator].to_numpy()
                sizes[arm] = documents[metric.denominator].to_numpy()
                if "cluster" in documents.columns and documents["cluster"].null_count() == 0:
                    clusters = documents["cluster"].to_numpy()
            elif row["status"] in ENDED or finished:
                failed[row["seed"]] = row["reason"] or row["status"]
        if not finished and len(amounts) + len(failed) < len(seeds):
            return None
        joined[arm] = amounts, failed
    any_sizes = next(iter(sizes.values()), np.ones(1))  # of no importance for an arm without a finished run
    return {
        arm: ArmMeasurements(arm, amounts, sizes.get(arm, any_sizes), failed, clusters)
        for arm, (amounts, failed) in joined.items()
    }


def verdict(folder: AblationFolder, record: LaunchRecord) -> Verdict | None:
    """The verdict, or None while confirmation runs are missing."""
    declared = describe(record.registration, record.all_deviations())
    if folder.is_archived:
        archived = Verdict.from_plain(read_json(folder.path / "verdict.json"))
        return replace(archived, exploratory=_exploratory(folder, record), declared=declared)
    arms = measurements(folder, record)
    if arms is None:
        return None
    config = record.config
    return judge(
        arms[record.order[0]],
        [arms[arm] for arm in record.order[1:]],
        alpha=config.alpha,
        margin=config.margin,
        seeds=config.confirmation.independent_seeds,
        exploratory=_exploratory(folder, record),
        unit=record.metric.unit,
        effect=config.protocol.effect,
        declared=declared,
    )


def deviations(folder: AblationFolder, record: LaunchRecord) -> list[Deviation]:
    """What was changed after launch in how the runs are read."""
    if folder.is_archived and not record.is_registered:  # archived before ablations were registered
        return []
    return record.all_deviations()


def _exploratory(folder: AblationFolder, record: LaunchRecord) -> str | None:
    """Why the verdict is exploratory; None if it is a confirmation."""
    config = record.config
    reasons = [config.exploratory, config.budget.allow_mismatch]
    if config.confirmation.split != "report":
        reasons.append(f"measured on the {config.confirmation.split} split")
    reasons += [f"deviation: {deviation.why}" for deviation in deviations(folder, record)]
    return "; ".join(reason for reason in reasons if reason) or None
