"""What an ablation costs, before anything runs: parameters, FLOPs, cache bytes, memory, time; and what does not match."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import polars as pl
import torch
from torch.overrides import TorchFunctionMode

from workbench.ablation.config import AblationConfig
from workbench.accounting import ModelCost, account
from workbench.config import ConfigError
from workbench.contract import Side
from workbench.model import LanguageModel
from workbench.training.config import RunConfig
from workbench.training.optimiser import build_optimiser

MEASURED_STEPS = 3
LARGEST_MEASURED_STEP = 2e12
"""FLOPs of a step beyond which a step is not run for timing; the time is then left open. Our choice."""


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
    counts = Counter(config.model.spans)  # layers (pairs) of one configuration keep as much: one of each is traced
    with torch.device("meta"):
        model = LanguageModel(config.model.with_spans(tuple(counts)))
        model.recompute = training.recompute
        length = len(model.blocks) // len(counts)
        ends = model.shortcuts if len(model.shortcuts) and model.source else model.blocks[length - 1 :: length]
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
            model.loss(tokens, tokens, segments=torch.zeros_like(tokens), own=Side())
    return sum(kept.values())


def seconds_per_step(config: RunConfig, cost: ModelCost, threads: int) -> float | None:
    """Seconds of one optimiser step on this machine, the median of a few real ones; None where that would be long."""
    training = config.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and cost.training_flops * training.tokens_per_step > LARGEST_MEASURED_STEP:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = LanguageModel(config.model, seed=0).to(device)
        model.recompute = training.recompute
        optimiser = build_optimiser(model, training)
        shape = (training.batch_size, training.context)
        tokens = torch.randint(0, config.model.vocabulary or 2, shape, device=device,
                               generator=torch.Generator(device).manual_seed(0))  # fmt: skip
        targets = tokens
        if (share := config.data.target_share(training.context)) < 1:
            targets = torch.where(
                torch.arange(tokens.numel(), device=device).view(shape) % round(1 / share) == 0, tokens, -100
            )
        segments = (torch.arange(training.context, device=device) > training.context // 2).long().expand(shape)
        times = []
        for _ in range(1 + MEASURED_STEPS):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                own = Side(watch=False)
                loss = model.loss(tokens, targets, segments=segments, own=own)
            torch.stack([loss, *own.losses]).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[1:])[MEASURED_STEPS // 2] * training.accumulate
    finally:
        torch.set_num_threads(before)


def cost_table(
    config: AblationConfig, *, threads: int = 1, measure: bool = True, progress: Callable[[str], None] | None = None
) -> pl.DataFrame:
    """One row an arm, the baseline first.

    Columns: parameters, embedding (looked up), auxiliary (for training alone), non_embedding, active (counts);
    flops_per_token (forward), training_flops (one trial);
    cache_bytes (one sequence at the training context), unevicted_bytes (the same if windows kept every token);
    tokens (one trial); trials (tuning and confirmation);
    seconds_per_trial, seconds_total (training alone, one worker; null where not measured); memory_bytes (weights,
    gradients, AdamW's moments and saved activations: our estimate); residual (relative difference of the matched
    quantity to the baseline); mismatch (what is not matched, in words).
    """
    rows: list[dict[str, Any]] = []
    baseline: dict[str, Any] = {}
    for arm in config.order:
        if progress:
            progress(f"cost of {arm}")
        points = config.points(arm)
        run = config.run(arm, seed=config.tuning.seed, hyperparameters=points[0] if points else None)
        training = run.training
        cost = account(run.model, training.context, element_bytes=4 if training.precision == "fp32" else 2)
        per_step = seconds_per_step(run, cost, threads) if measure else None
        trials = config.tuning.trials + len(config.confirmation.seeds)
        seconds = None if per_step is None else per_step * training.steps
        row: dict[str, Any] = {
            "arm": arm, "parameters": cost.parameters, "embedding": cost.embedding, "auxiliary": cost.auxiliary,
            "non_embedding": cost.non_embedding, "active": cost.active,
            "flops_per_token": cost.forward_flops,
            "training_flops": cost.training_flops * training.steps * training.tokens_per_step,
            "cache_bytes": cost.cache_bytes, "unevicted_bytes": cost.unevicted_bytes, "tokens": training.steps * training.tokens_per_step, "trials": trials,
            "seconds_per_trial": seconds, "seconds_total": None if seconds is None else seconds * trials,
            # weights, gradients and two moments, all fp32
            "memory_bytes": 16 * cost.parameters + activation_bytes(run),
        }  # fmt: skip
        baseline = baseline or row
        row["residual"] = _residual(config, row, baseline)
        row["mismatch"] = _mismatch(row, baseline)
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


AXES = {"parameters": "non_embedding", "active_parameters": "active", "flops": "training_flops"}


def _residual(config: AblationConfig, row: dict[str, Any], baseline: dict[str, Any]) -> float:
    column = AXES[config.budget.axis]
    return row[column] / baseline[column] - 1


def _mismatch(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Every axis that differs by more than half a per cent, in words."""
    axes = {"non_embedding": "non-embedding parameters", "active": "active parameters", "training_flops": "training FLOPs",
            "tokens": "tokens", "cache_bytes": "cache bytes"}  # fmt: skip
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
        if abs(row["residual"]) > config.budget.tolerance:
            raise ConfigError.at(
                f"arms.{row['arm']}", got=f"{config.budget.axis} {row['residual']:+.1%} against the baseline",
                expected=f"within {config.budget.tolerance:.1%} (budget.axis={config.budget.axis})",
                do="Change a width (model.feedforwards.swiglu.hidden), or give a reason in budget.allow_mismatch.",
            )  # fmt: skip
