"""The cost card: parameters, FLOPs, cache bytes, memory and time of every arm, and what does not match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import torch

from workbench.ablation.arms import Arms
from workbench.ablation.cost.balance import latency_tables, seconds_imbalance, token_imbalance
from workbench.ablation.cost.memory import activation_bytes
from workbench.ablation.cost.printed import CostCard
from workbench.ablation.estimate import card_seconds
from workbench.ablation.matching.solver import quantity
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.data import Source, num_evaluation_batches
from workbench.formatting import share
from workbench.status import Stage
from workbench.training.checkpointer import RETAINED
from workbench.training.config import RunConfig
from workbench.training.optimiser import training_state_bytes
from workbench.training.probe import Measured

__all__ = ["check_budget", "cost_table", "residual_table"]


def cost_table(
    arms: Arms, measured: Mapping[str, Measured] | None = None, data: Mapping[str, Source] | None = None
) -> CostCard:
    """One row per arm, the baseline first.

    Args:
        arms: the arms.
        measured: time and memory of a step, by arm.
        data: prepared data, by arm.

    Columns: parameters, embedding (looked up), auxiliary (for training alone), non_embedding, active (counts);
    flops_per_token (forward), training_flops (one trial, that of a smaller model which grows included);
    cache_bytes (one sequence at the training context; of a run with a decoding policy, its indices included, in the
    type of its cache, without what is on the host), unevicted_bytes (the same if windows kept every token; null with a
    decoding policy);
    tokens (one trial); epochs (how often a trial reads its training text; null where the data are not prepared, and
    for tasks, whose rows are all new); tuned (fields that the arm tunes); searched (its trials before any repeat);
    trials (all runs: tuning, repeats and confirmation); tokens_per_second, seconds_per_trial (training alone);
    startup_seconds (of a run), evaluation_seconds (of a run on the selection split), report_seconds (of a confirmation
    run on the documents that it is judged by), seconds_total (all of these, all runs, one worker), each null where not
    measured; suites (evaluation suites, whose time is not included); memory_bytes (peak of all tensors: weights,
    gradients, optimiser state, activations); memory_measured (whether measured on this device; else estimated); of a
    run on several devices, times and memory are those of a rank that stores all weights, without communication;
    token_imbalance (of a run on several devices: tokens of the ranks that the others wait for, divided by the mean, as
    its plan deals out the first steps; null without data, and on one device); seconds_imbalance (the same of predicted
    seconds, by a latency table that an arm names; null without one);
    disk_bytes (checkpoints of one trial while it runs); residual (relative difference of the matched quantity to the
    budget's target); off_parameters, off_active_parameters, off_flops, off_cache, off_seconds (to the baseline, on
    every axis); solved (what the budget's solver set, in words); mismatch (what is not matched, in words).
    """
    rows: list[dict[str, Any]] = []
    baseline: dict[str, Any] = {}
    devices = arms.config.launch.devices
    tables = latency_tables(arm.first_run() for arm in arms.values()) if devices > 1 else []
    for name, arm in arms.items():
        run = arm.first_run()
        training = run.training
        source = (data or {}).get(name)
        dtype, decoding = torch.float32 if training.precision == "fp32" else torch.bfloat16, run.decoding
        cost = account(run.model, training.context, element_bytes=dtype.itemsize)
        step = (measured or {}).get(name)
        trials = sum(arm.planned.values())
        seconds = 0.0 if not training.steps else None if step is None else step.seconds * training.steps
        peak = step.peak_bytes if step is not None else 0
        state_bytes = training_state_bytes(run) if training.steps else 0
        memory = peak or 4 * cost.parameters  # fp32
        if training.steps and not peak:
            of_rank = run.model_copy(update={"training": training.changed(batch_size=training.batch_size // devices)})
            memory += 4 * cost.trainable + state_bytes + activation_bytes(of_rank)  # with gradients
        row: dict[str, Any] = {
            "arm": name,
            "parameters": cost.parameters,
            "embedding": cost.embedding,
            "auxiliary": cost.auxiliary,
            "non_embedding": cost.non_embedding,
            "active": cost.active,
            "flops_per_token": cost.forward_flops,
            "training_flops": run.training_flops,
            "cache_bytes": decoding.cache_bytes(run.model, training.context, dtype) if decoding else cost.cache_bytes,
            "unevicted_bytes": None if decoding else cost.unevicted_bytes,
            "tokens": training.steps * training.tokens_per_step,
            "epochs": None if source is None else run.epochs(source),
            "tuned": len(arm.space),
            "searched": arm.planned[Stage.TUNING],
            "trials": trials,
            "tokens_per_second": None if step is None else training.tokens_per_step / step.seconds,
            "seconds_per_trial": seconds,
            "startup_seconds": None if step is None else step.startup,
            **_evaluation(run, source, step, arms.config.confirmation.split),
            "suites": len(run.evaluation),
            "memory_bytes": memory,
            "memory_measured": peak > 0,
            "token_imbalance": None if source is None or devices == 1 else token_imbalance(run, source, devices),
            "seconds_imbalance": (
                None if source is None or devices == 1 else seconds_imbalance(run, source, devices, tables)
            ),
            # weights in fp32 and what training keeps, in the retained checkpoints and the one being written
            "disk_bytes": (4 * cost.parameters + state_bytes) * (RETAINED + 1) if training.steps else 0,
        }
        times = {stage: card_seconds(row, stage) for stage, planned in arm.planned.items() if planned}
        known = None not in times.values()
        row["seconds_total"] = sum((times[stage] or 0.0) * arm.planned[stage] for stage in times) if known else None
        baseline = baseline or row
        row["residual"] = _residual(arms, row, baseline, run)
        row |= _off(row, baseline)
        row["solved"] = ", ".join(f"{'.'.join(path.split('.')[-2:])}={value}" for path, value in arm.solved.items())
        row["mismatch"] = _mismatch(row, baseline)
        if leaks := run.model.lacking("causal"):
            words = f"not causal, sees later tokens: {', '.join(leaks)}"
            row["mismatch"] = f"{words}; {row['mismatch']}" if row["mismatch"] else words
        rows.append(row)
    return CostCard(rows, infer_schema_length=None)


def _evaluation(run: RunConfig, source: Source | None, step: Measured | None, split: str) -> dict[str, float | None]:
    """Seconds of the evaluations of one run: ``evaluation_seconds`` and ``report_seconds``."""
    if source is None or step is None or step.evaluation is None:
        return {"evaluation_seconds": None, "report_seconds": None}
    training, judged = run.training, source.judged
    selection, report = (
        step.evaluation * num_evaluation_batches(documents, batch_size=training.batch_size, context=training.context)
        for documents in (judged.selection, getattr(judged, split))
    )
    times = training.evaluations * (2 if training.ema is not None and training.ema.evaluate == "beside" else 1)
    return {"evaluation_seconds": selection * times, "report_seconds": report}


def residual_table(arms: Arms) -> pl.DataFrame:
    """The columns arm and residual of :func:`cost_table` alone, without delay; for axes that need no measurement."""
    return pl.DataFrame(
        [{"arm": name, "residual": _residual(arms, {}, {}, arm.first_run())} for name, arm in arms.items()]
    )


AXES = {
    "parameters": "non_embedding",
    "active_parameters": "active",
    "flops": "training_flops",
    "cache": "cache_bytes",
    "seconds": "seconds_per_trial",
}
"""Axis of a budget -> column of the cost table."""


def _residual(arms: Arms, row: dict[str, Any], baseline: dict[str, Any], run: RunConfig) -> float | None:
    """The relative difference to the budget's target."""
    if arms.target is not None:
        return quantity(arms.config.budget, run) / arms.target - 1
    given = arms.config.budget.target
    target = given if arms.config.reference_arm is None else baseline["seconds_per_trial"]
    if row["seconds_per_trial"] is None or not isinstance(target, int | float):
        return None
    return row["seconds_per_trial"] / target - 1


def _off(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float | None]:
    """``off_<axis>``: the relative difference to the baseline on every axis, the primary one or not."""
    off: dict[str, float | None] = {}
    for axis, column in AXES.items():
        known = baseline[column] and row[column] is not None
        off[f"off_{axis}"] = row[column] / baseline[column] - 1 if known else None
    return off


def _mismatch(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Every axis that differs by more than half a per cent, in words."""
    axes = {
        "non_embedding": "non-embedding parameters",
        "active": "active parameters",
        "training_flops": "training FLOPs",
        "tokens": "tokens",
        "cache_bytes": "cache bytes",
    }
    differences = []
    for column, words in axes.items():
        off = row[column] / baseline[column] - 1 if baseline[column] else 0.0
        if abs(off) > 0.005:
            differences.append(f"{words} {share(off)}")
    return ", ".join(differences)


def check_budget(arms: Arms, table: pl.DataFrame) -> None:
    """Refuse arms that differ on the matched axis.

    Raises:
        ConfigError: naming the first arm beyond the tolerance, unless ``budget.allow_mismatch`` gives a reason.
    """
    budget = arms.config.budget
    if budget.allow_mismatch:
        return
    for row in table.iter_rows(named=True):
        if row["residual"] is None or abs(row["residual"]) > budget.tolerance:
            mismatch = "unknown" if row["residual"] is None else share(row["residual"])
            against = "the baseline" if budget.target is None else f"budget.target={budget.target}"
            free = ", ".join(budget.free)
            raise ConfigError.at(
                f"arms.{row['arm']}",
                got=f"{budget.axis} {mismatch} against {against}",
                expected=f"within {budget.tolerance:.1%} (budget.axis={budget.axis})",
                do=(
                    f"Changing {free} comes no nearer; free another field"
                    if free
                    else "Let the solver change a width (budget.free=[model.feedforwards.swiglu.hidden])"
                )
                + ", or give a reason in budget.allow_mismatch.",
            )
