"""What an ablation costs, before anything runs: parameters, FLOPs, cache bytes, memory, time; and what does not match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import polars as pl
import torch
from torch.overrides import TorchFunctionMode

from workbench.ablation.matching.solver import quantity
from workbench.ablation.spec.ablation import AblationConfig
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.contract import AuxOutputs
from workbench.data import Source
from workbench.model import LanguageModel
from workbench.training.checkpointer import RETAINED
from workbench.training.config import RunConfig
from workbench.training.optimiser import optimiser_bytes
from workbench.training.probe import Measured, measure_shrunken, shrunken

LARGEST_MEASURED_STEP = 2e12
"""FLOPs of a micro-batch beyond which it is not run on a CPU; the time is then left open. Our choice."""


def activation_bytes(config: RunConfig) -> int:
    """Bytes that autograd keeps for one micro-batch's backward pass, traced on the meta device without computing.

    Our estimate: tensors saved by the forward pass, each storage once, parameters left out; with ``recompute`` the inputs of
    all blocks and the mean block's own, there while it is computed again. Temporaries of single operations are not in it.
    Compiled code keeps much less (full 340M, 16 × 4096, bf16: 145 GiB by this estimate, 66 GiB of peak memory in all measured on
    an H100).
    """
    if config.training.recompute:
        plain = config.changed(training=config.training.changed(recompute=False))
        return _saved_bytes(config) + _saved_bytes(plain) // len(config.model.layers)
    return _saved_bytes(config)


class _Attention(torch.autograd.Function):
    """Keeps for the backward pass what fused kernels keep."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        raise AssertionError("nothing is computed on the meta device")


class _FusedAttention(TorchFunctionMode):
    """Scores are not kept: on the meta device torch has no fused kernel, on every other it has."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def _saved_bytes(config: RunConfig) -> int:
    training = config.training
    counts = Counter(config.model.spans)  # spans of one configuration keep as much: one of each is traced
    with torch.device("meta"):
        model = LanguageModel(config.model.with_spans(tuple(counts)))
        model.recompute = training.recompute
        pairs = len(model.shortcuts) > 0
        ends = (
            model.shortcuts
            if model.config.shortcut_parity and pairs
            else model.blocks[1 if pairs else 0 :: 2 if pairs else 1]
        )
        tokens = torch.zeros(training.batch_size, training.context, dtype=torch.long)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, int] = {}
        alive: list[Any] = []  # meta storages are told apart by identity only while they live
        times = [1]  # what is kept from the end of one span to the end of the next counts for all of that kind
        for module, count in zip((model.embedding, *ends), (*counts.values(), 1)):
            module.register_forward_hook(lambda *_, count=count: times.append(count))

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in kept:
                kept[storage._cdata] = storage.nbytes() * times[-1]
                alive.append(storage)
            return tensor

        with (
            _FusedAttention(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"),
        ):
            model.loss(tokens, tokens, segments=torch.zeros_like(tokens), objective_aux=AuxOutputs())
    return sum(kept.values())


def measure_arms(
    config: AblationConfig,
    *,
    threads: int = 1,
    data: Mapping[str, Source] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Arm -> what a step of it takes on this device (:mod:`workbench.training.probe`); an arm is left out where that would be
    long (on a CPU) or does not fit.

    Where seconds are the budget, every arm is measured three times, in turns, and the median is taken.

    Args:
        threads: of one trial.
        data: prepared data by arm, whose rows are trained on; without it rows of two documents each are made up.
    """
    found: dict[str, list[Measured]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(3 if config.budget.axis == "seconds" and not config.solved else 1):
            for arm in config.order:
                if progress:
                    progress(f"cost of {arm}" + (f", turn {turn + 1}" if turn else ""))
                run = first_run(config, arm)
                training = run.training
                largest = run.model.with_spans(max((spans for spans, _, _ in shrunken(run.model.spans)), key=len))
                step = account(largest, training.context).training_flops * training.batch_size
                if not torch.cuda.is_available() and step * training.context > LARGEST_MEASURED_STEP:
                    continue
                stream = None
                if data:
                    stream = data[arm].stream(context=training.context, seed=run.seed)
                try:
                    found.setdefault(arm, []).append(measure_shrunken(run, stream))
                except torch.OutOfMemoryError:
                    continue
    finally:
        torch.set_num_threads(before)
    return {arm: Measured(median(one.seconds for one in several), several[0].peaks) for arm, several in found.items()}


def timed(config: AblationConfig, measured: Mapping[str, Measured]) -> AblationConfig:
    """The ablation with every arm's tokens such that it trains for as many seconds as the budget says.

    Raises:
        ConfigError: when an arm could not be measured.
    """
    if config.budget.axis != "seconds" or config.solved:
        return config
    for arm in config.order:
        if arm not in measured:
            raise ConfigError.at(
                f"arms.{arm}",
                got="no time that could be measured on this device",
                expected="seconds of a step, to turn the budget into tokens",
                do="Give a smaller model or batch, or match flops.",
            )
    target = config.budget.target
    if not isinstance(target, int | float):
        assert config.like is not None
        target = measured[config.like].seconds * config.run(config.like, seed=config.tuning.seed).training.steps
    solved = {}
    for arm in config.order:
        training = config.run(arm, seed=config.tuning.seed).training
        steps = max(1, round(target / measured[arm].seconds))
        if steps != training.steps:
            solved[arm] = {"training.tokens": steps * training.tokens_per_step}
    return config.fixed(solved)


def first_run(config: AblationConfig, arm: str) -> RunConfig:
    """An arm's run as its first tuning trial trains it."""
    points = config.points(arm)
    return config.run(arm, seed=config.tuning.seed, hyperparameters=points[0] if points else None)


def cost_table(config: AblationConfig, measured: Mapping[str, Measured] | None = None) -> pl.DataFrame:
    """One row an arm, the baseline first.

    Columns: parameters, embedding (looked up), auxiliary (for training alone), non_embedding, active (counts);
    flops_per_token (forward), training_flops (one trial);
    cache_bytes (one sequence at the training context), unevicted_bytes (the same if windows kept every token);
    tokens (one trial); trials (tuning and confirmation); tokens_per_second, seconds_per_trial, seconds_total (training
    alone, one worker; null where not measured); memory_bytes (the most that tensors take: weights, gradients, optimiser
    state, activations); memory_measured (whether on this device, or an estimate of what autograd keeps);
    disk_bytes (checkpoints of one trial while it runs); residual (relative difference of the matched quantity to the
    budget's target); off_parameters, off_active_parameters, off_flops, off_cache, off_seconds (to the baseline, on every
    axis); solved (what the budget's solver set, in words); mismatch (what is not matched, in words).
    """
    rows: list[dict[str, Any]] = []
    baseline: dict[str, Any] = {}
    for arm in config.order:
        run = first_run(config, arm)
        training = run.training
        cost = account(run.model, training.context, element_bytes=4 if training.precision == "fp32" else 2)
        found = (measured or {}).get(arm)
        trials = config.tuning.trials + len(config.confirmation.seeds)
        seconds = None if found is None else found.seconds * training.steps
        state_bytes = optimiser_bytes(run)
        seen = found.peak_bytes if found is not None else 0
        # weights and gradients in fp32
        memory = seen or 8 * cost.parameters + state_bytes + activation_bytes(run)
        row: dict[str, Any] = {
            "arm": arm,
            "parameters": cost.parameters,
            "embedding": cost.embedding,
            "auxiliary": cost.auxiliary,
            "non_embedding": cost.non_embedding,
            "active": cost.active,
            "flops_per_token": cost.forward_flops,
            "training_flops": cost.training_flops * training.steps * training.tokens_per_step,
            "cache_bytes": cost.cache_bytes,
            "unevicted_bytes": cost.unevicted_bytes,
            "tokens": training.steps * training.tokens_per_step,
            "trials": trials,
            "tokens_per_second": None if found is None else training.tokens_per_step / found.seconds,
            "seconds_per_trial": seconds,
            "seconds_total": None if seconds is None else seconds * trials,
            "memory_bytes": memory,
            "memory_measured": seen > 0,
            # weights in fp32 and optimiser state, in the retained checkpoints and the one being written
            "disk_bytes": (4 * cost.parameters + state_bytes) * (RETAINED + 1),
        }
        baseline = baseline or row
        row["residual"] = _residual(config, row, baseline, run)
        row |= _off(row, baseline)
        row["solved"] = ", ".join(
            f"{'.'.join(path.split('.')[-2:])}={v}" for path, v in config.solved.get(arm, {}).items()
        )
        row["mismatch"] = _mismatch(row, baseline)
        if leaks := run.model.lacking("causal"):
            words = f"not causal, sees later tokens: {', '.join(leaks)}"
            row["mismatch"] = f"{words}; {row['mismatch']}" if row["mismatch"] else words
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def residual_table(config: AblationConfig) -> pl.DataFrame:
    """The columns arm and residual of :func:`cost_table` alone, at once; on axes that need no measuring."""
    return pl.DataFrame(
        [{"arm": arm, "residual": _residual(config, {}, {}, first_run(config, arm))} for arm in config.order]
    )


AXES = {
    "parameters": "non_embedding",
    "active_parameters": "active",
    "flops": "training_flops",
    "cache": "cache_bytes",
    "seconds": "seconds_per_trial",
}
"""Axis of a budget -> column of the cost table."""


def _residual(config: AblationConfig, row: dict[str, Any], baseline: dict[str, Any], run: RunConfig) -> float | None:
    """The relative difference to the budget's target."""
    if config.budget.axis != "seconds":
        return quantity(config.budget, run) / config.target - 1
    target = config.budget.target if config.like is None else baseline["seconds_per_trial"]
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
        share = row[column] / baseline[column] - 1 if baseline[column] else 0.0
        if abs(share) > 0.005:
            differences.append(f"{words} {share:+.1%}")
    return ", ".join(differences)


def check_budget(config: AblationConfig, table: pl.DataFrame) -> None:
    """Refuse arms that differ on the matched axis.

    Raises:
        ConfigError: naming the first arm beyond the tolerance, unless ``budget.allow_mismatch`` gives a reason.
    """
    if config.budget.allow_mismatch:
        return
    for row in table.iter_rows(named=True):
        if row["residual"] is None or abs(row["residual"]) > config.budget.tolerance:
            off = "not known" if row["residual"] is None else f"{row['residual']:+.1%}"
            against = "the baseline" if config.budget.target is None else f"budget.target={config.budget.target}"
            free = ", ".join(config.budget.free)
            raise ConfigError.at(
                f"arms.{row['arm']}",
                got=f"{config.budget.axis} {off} against {against}",
                expected=f"within {config.budget.tolerance:.1%} (budget.axis={config.budget.axis})",
                do=(
                    f"Turning {free} comes no nearer; free another field"
                    if free
                    else "Let the solver turn a width (budget.free=[model.feedforwards.swiglu.hidden])"
                )
                + ", or give a reason in budget.allow_mismatch.",
            )
