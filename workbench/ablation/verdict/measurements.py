"""From the runs of an ablation to its verdict: the join of documents, seeds and failures in front of the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.control import control_variates, sentences
from workbench.ablation.verdict.disclosure import disclose, relabelled
from workbench.ablation.verdict.effort import reservations
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.scores import secondary
from workbench.ablation.verdict.sequential import Look, Reading, arm_readings, decided, readings, seeds_needed_now
from workbench.ablation.verdict.subject import Subject
from workbench.ablation.verdict.verdict import Verdict
from workbench.config import ConfigError
from workbench.files import read_json
from workbench.results.store import RunFolder
from workbench.status import ENDED, Stage, Status

__all__ = ["looks_taken", "measurements", "subject", "take_look", "verdict"]


def measurements(
    folder: AblationFolder, record: LaunchRecord, needed: Mapping[str, int], ended: bool = False
) -> dict[str, ArmMeasurements] | None:
    """Arm -> what its confirmation runs measured, every arm on the same seeds, failures included.

    Args:
        needed: arm -> number of confirmation seeds, from the first; others are left out.
        ended: whether every run of these seeds has ended, so that one without a run counts as failed.

    Returns:
        None while confirmation runs are missing. In a finished ablation a seed without a run counts as failed.
    """
    ended = ended or folder.is_finished  # read before the runs: one that ends in between is not missing
    if damaged := folder.damaged_runs():
        raise ConfigError.at(
            str(folder.runs_path / damaged[0]),
            got="a run whose run.json is missing or damaged",
            expected="every run of the ablation",
            do="`workbench run` with the ablation's file restores it; nothing is trained again.",
        )
    confirmations = folder.runs().filter(pl.col("stage") == Stage.CONFIRMATION)
    unconfirmed, metric = folder.failures(), record.metric
    sizes: dict[str, Any] = {}
    clusters: Any = None
    joined: dict[str, tuple[dict[int, Any], dict[int, str]]] = {}
    done: dict[str, dict[int, RunFolder]] = {}
    for arm in record.order:
        seeds = record.config.planned_seeds[: needed[arm]]
        amounts: dict[int, Any] = {}
        failed = {seed: unconfirmed[arm] for seed in seeds} if arm in unconfirmed else {}
        for row in confirmations.filter((pl.col("arm") == arm) & pl.col("seed").is_in(seeds)).iter_rows(named=True):
            if row["status"] == Status.DONE:
                run = done.setdefault(arm, {})[row["seed"]] = RunFolder(row["folder"])
                documents = run.report(metric)
                amounts[row["seed"]] = metric.scale * documents[metric.numerator].to_numpy()
                sizes[arm] = documents[metric.denominator].to_numpy()
                if "cluster" in documents.columns and documents["cluster"].null_count() == 0:
                    clusters = documents["cluster"].to_numpy()
            elif row["status"] in ENDED or ended:
                failed[row["seed"]] = row["reason"] or row["status"]
        if not ended and len(amounts) + len(failed) < len(seeds):
            return None
        joined[arm] = amounts, failed
    adjusting = control_variates(record, done)
    any_sizes = next(iter(sizes.values()), np.ones(1))  # not used for an arm without a finished run
    return {
        arm: ArmMeasurements(arm, amounts, sizes.get(arm, any_sizes), failed, clusters, adjusting.get(arm))
        for arm, (amounts, failed) in joined.items()
    }


def looks_taken(folder: AblationFolder) -> list[Look]:
    """The looks of a sequential design that were taken, oldest first."""
    return [Look(look["seeds"], look["words"]) for look in folder.looks()]


def take_look(folder: AblationFolder, record: LaunchRecord) -> bool:
    """Take the next look of a sequential design, and record it. Call it with the plan's lock held, when every run that
    the look needs has ended.

    Returns:
        whether more seeds are to be run.
    """
    config, taken = record.config, looks_taken(folder)
    declared = readings(config, taken)
    is_over = len(taken) >= len(declared) or set(decided(taken)) == set(record.order[1:])
    if not config.protocol.stopping.is_sequential or is_over:
        return False
    seeds = declared[len(taken)].seeds
    arms = measurements(folder, record, seeds_needed_now(config, taken), ended=True)
    assert arms is not None
    rows = _judge(record, arms, [*taken, Look(seeds, {})], replicates=0).rows[1:]
    look = Look(seeds, {row.arm: row.verdict for row in rows})
    folder.add_look(look.seeds, look.words)
    return len(taken) + 1 < len(declared) and set(decided([*taken, look])) < set(record.order[1:])


def verdict(folder: AblationFolder, record: LaunchRecord) -> Verdict | None:
    """The verdict, or None while confirmation runs are missing. A sequential design has one from its first look on."""
    disclosure = disclose(folder, record)
    if folder.is_archived:
        path = folder.path / "verdict.json"
        try:
            return relabelled(Verdict.from_plain(read_json(path)), disclosure)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"a damaged file ({type(error).__name__}: {error})"
            raise ConfigError.at(str(path), got=reason, expected="an archived verdict") from None
    config, taken = record.config, looks_taken(folder)
    if config.protocol.stopping.is_sequential and not taken:
        return None
    read = {arm: reading.seeds for arm, reading in arm_readings(config, taken).items()}
    longest = max(read.values(), default=len(config.planned_seeds))
    arms = measurements(folder, record, {record.order[0]: longest, **read})
    if arms is None:
        return None
    look = disclosure.look
    judged = _judge(
        record,
        arms,
        taken,
        exploratory=disclosure.exploratory,
        declared=(*disclosure.sentences, *sentences(record, {arm: part.control for arm, part in arms.items()})),
        reservations=reservations(folder, record),
        subject=subject(folder, record, arms, look.number if look and look.documents else None),
    )
    return replace(judged, secondary=secondary(folder, record, arms, _readings(record, taken), disclosure.exploratory))


def _readings(record: LaunchRecord, taken: Sequence[Look]) -> dict[str, Reading] | None:
    """Arm -> the look at which it is read; None of a fixed design."""
    return arm_readings(record.config, taken) if record.config.protocol.stopping.is_sequential else None


def _judge(record: LaunchRecord, arms: Mapping[str, ArmMeasurements], taken: Sequence[Look], **options: Any) -> Verdict:
    """The verdict at the looks so far."""
    config = record.config
    return judge(
        arms[record.order[0]],
        [arms[arm] for arm in record.order[1:]],
        alpha=config.alpha,
        margin=config.margin,
        seeds=config.confirmation.independent_seeds,
        unit=record.metric.unit,
        effect=config.protocol.effect,
        readings=_readings(record, taken),
        upper=record.metric.upper,
        comparisons=config.protocol.comparisons,
        **options,
    )


def subject(
    folder: AblationFolder, record: LaunchRecord, arms: Mapping[str, ArmMeasurements], look: int | None
) -> Subject:
    """What the verdict is about: the chosen settings, and the measured documents as their data card describes them.

    Args:
        look: how many times these documents have been opened; None if looks were not counted.
    """
    split, baseline = record.config.confirmation.split, arms[record.order[0]]
    card = record.data_cards.get(record.order[0], {})
    corpus = card.get("corpus")
    part = card.get("splits", {}).get(split, {})
    source = corpus.get("kind") if isinstance(corpus, Mapping) else card.get("kind")
    settings = {arm: choice.hyperparameters for arm, choice in folder.choices().items() if choice.hyperparameters}
    return Subject(
        settings=settings,
        source=source or "",
        split=split,
        documents=int(np.size(baseline.sizes_D)) if any(arm.amounts for arm in arms.values()) else None,
        clusters=baseline.num_clusters,
        size=int(np.sum(baseline.sizes_D)),
        size_unit=record.metric.denominator,
        overlap=part.get("overlap"),
        look=look,
    )
