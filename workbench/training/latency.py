"""Measures the latency table of a model's layers on this device.

One row with one document per length; a layer is timed alone, forward and backward, as it is in training (precision,
compilation, recomputation). Layers of one configuration are measured once.

Activations are random, and alike within :data:`RUN` positions: kernels read the blocks of neighbouring queries
together, and neighbours in a trained model select overlapping blocks (65 to 82 % in arXiv 2608.01662), while those of
independent activations would share almost none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from workbench.accounting import layer_flops
from workbench.config import ConfigError, hash_of, require
from workbench.contract import AuxOutputs, Budget, feedforwards, mixers
from workbench.environment import choose_device, environment
from workbench.latency import LatencyTable, LayerLatency, TableConfig
from workbench.layers import INIT_SCALE
from workbench.model.block import Block
from workbench.model.config import Layer
from workbench.training.config import RunConfig
from workbench.training.fp8 import use_fp8
from workbench.training.step import autocast

MIN_REPEATS, MAX_REPEATS, MIN_SECONDS = 5, 30, 0.2
"""A case is timed until it has run this often and for this long in total."""
RUN, ALIKE = 16, 0.9
"""Positions that share a random part of their activations, and its share of the variance: our choice."""


def layer_key(layer: Layer) -> str:
    """What identifies the times of a layer: its configuration without the number of blocks per query."""
    return hash_of(_described(layer))


def _described(layer: Layer) -> dict[str, Any]:
    plain = layer.canonical()  # options that are off are left out, so that tables stay valid when some are added
    if (per_query := mixers[layer.mixer.kind].blocks_per_query(layer.mixer)) is not None:
        plain["mixer"].pop(per_query.field)
    return plain


@dataclass(frozen=True)
class LayerFlops:
    """Counted cost of one layer, as :class:`LayerLatency` has measured times: its training FLOPs by the formulas of its
    components (:func:`workbench.accounting.layer_flops`), the same on every device."""

    layer: Layer
    width: int
    """Of the model."""

    @cached_property
    def _of_document(self) -> Callable[[int, int | None], float]:
        return lru_cache(maxsize=65_536)(lambda length, blocks: layer_flops(self.layer, self.width, length, blocks))

    def at(self, lengths: np.ndarray, blocks: int | None) -> np.ndarray:
        """(documents,) FLOPs of every document. Arguments as of :meth:`LayerLatency.seconds_of`."""
        return np.array([self._of_document(int(length), blocks) for length in lengths])


def timing_conditions(run: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the times of a layer depend on beside its configuration."""
    training, where = run.training, environment()
    compiled = device.type == "cuda" if training.compile is None else training.compile
    conditions = {
        "device": where["device"] if device.type == "cuda" else "cpu",
        "width": run.model.width,
        "precision": training.precision,
        "fp8": training.fp8,
        "compile": compiled,
        "recompute": training.recompute,
    }
    return conditions if device.type == "cuda" else {**conditions, "platform": where["platform"]}


def with_current_keys(table: LatencyTable) -> LatencyTable:
    """The table with the keys that its layers have now: those of its file are older than options that variants have got
    since."""
    keys = {key: _current_key(layer.layer) or key for key, layer in table.layers.items()}
    layers = {keys[key]: layer for key, layer in table.layers.items()}
    return replace(table, layers=layers, order=tuple(keys[key] for key in table.order))


def _current_key(described: Mapping[str, Any]) -> str | None:
    """The key of a layer as a table describes it; None where it is no layer of this version."""
    try:
        return layer_key(Layer(mixers.parse(described["mixer"]), feedforwards.parse(described["feedforward"])))
    except (ConfigError, KeyError):
        return None


def table_of(config: TableConfig, run: RunConfig, device: torch.device, field: str) -> LatencyTable:
    """The table that a part of a run's configuration names.

    Args:
        config: the part.
        run: the run.
        device: that it trains on.
        field: path of ``config`` in the run, for messages.

    Raises:
        ConfigError: when it cannot be read, has changed since the run began, or was measured under other conditions.
    """
    try:
        table = config.read()
    except ConfigError as error:
        raise error.under(field) from None
    conditions = timing_conditions(run, device)
    differing = {name: table.conditions.get(name) for name in conditions}
    differing = {name: value for name, value in differing.items() if value != conditions[name]}
    require(
        not differing,
        f"{field}.table",
        got=f"{config.table}, measured with {', '.join(f'{name}: {value}' for name, value in differing.items())}",
        expected=", ".join(f"{name}: {conditions[name]}" for name in differing),
        do="Measure one on this device: workbench latency-table CONFIG --output FILE.",
    )
    return with_current_keys(table)


def check_loads(run: RunConfig, device: torch.device) -> None:
    """Check that the table by which a batch plan measures loads is one of this run on this device.

    Raises:
        ConfigError: when it is not.
    """
    loads = getattr(run.training.batch_plan, "loads", None)
    if not isinstance(loads, TableConfig):
        return
    field = "training.batch_plan.loads"
    table = table_of(loads, run, device, field)
    require(
        table.order == tuple(map(layer_key, run.model.layers)),
        f"{field}.table",
        got=f"{loads.table}, of {len(table.order)} layers of another model",
        expected=f"times of the {len(run.model.layers)} layers of this model as configured",
        do="Measure a table of this model: workbench latency-table CONFIG --output FILE.",
    )


def measure_latencies(
    run: RunConfig,
    lengths: Sequence[int],
    budgets: Sequence[int] = (),
    report: Callable[[str], None] = lambda line: None,
    device: torch.device | None = None,
) -> LatencyTable:
    """Times of the layers of a run's model on this device.

    Args:
        run: the run; its data and steps do not matter.
        lengths: tokens of the documents.
        budgets: blocks per query. Default: powers of two from the smallest to twice the configured number of every
            layer, and the configured number.
        report: called with a line per measured case.
        device: default: the GPU where there is one.

    Lengths that do not fit in the memory of the device are left out, with a line to ``report``.

    Raises:
        ConfigError: for lengths or budgets that cannot be measured.
    """
    lengths, budgets = sorted(set(lengths)), sorted(set(budgets))
    require(lengths and lengths[0] >= 1, "lengths", got=lengths, expected="numbers of tokens, at least 1")
    device = device or choose_device()
    layers: dict[str, LayerLatency] = {}
    order = [layer_key(layer) for layer in run.model.layers]
    for key, layer in zip(order, run.model.layers):
        if key in layers:
            continue
        per_query = mixers[layer.mixer.kind].blocks_per_query(layer.mixer)
        numbers: list[int | None] = [None]
        if per_query is not None:
            chosen = budgets or _default_budgets(per_query.smallest, per_query.configured)
            require(
                chosen[0] >= per_query.smallest,
                "budgets",
                got=chosen[0],
                expected=f"at least the {per_query.smallest} blocks that every query of {layer.mixer.kind!r} attends",
            )
            numbers = list(chosen)
        seconds = []
        for length in lengths:
            try:
                row = _time_row(run, layer, length, numbers, device)
            except torch.OutOfMemoryError:  # what has been measured is kept
                report(f"{layer.mixer.kind}, {length:,} tokens: left out, they do not fit in the memory of {device}")
                break
            seconds.append(tuple(row))
            times = ", ".join(f"{second * 1e3:.3g}" for second in row)
            report(f"{layer.mixer.kind}, {length:,} tokens: {times} ms")
        require(
            seconds,
            "lengths",
            got=lengths[0],
            expected=f"tokens of which a layer with {layer.mixer.kind!r} fits in the memory of {device}",
            do="Set training.recompute, or measure shorter documents.",
        )
        measured = tuple(lengths[: len(seconds)])
        layers[key] = LayerLatency(
            measured, tuple(k for k in numbers if k is not None), tuple(seconds), _described(layer)
        )
    where = {**environment(), "date": time.strftime("%Y-%m-%d")}
    return LatencyTable(timing_conditions(run, device), layers, tuple(order), where)


def _default_budgets(smallest: int, configured: int) -> list[int]:
    numbers = {smallest, configured, 2 * configured}
    power = 1
    while power < 2 * configured:
        numbers |= {power} if power >= smallest else set()
        power *= 2
    return sorted(numbers)


def _time_row(
    run: RunConfig, layer: Layer, length: int, numbers: Sequence[int | None], device: torch.device
) -> list[float]:
    """Median seconds of forward and backward at one length, for every number of blocks."""
    training = run.training
    generator = torch.Generator().manual_seed(0)
    block = Block(layer, run.model.width)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=INIT_SCALE, generator=generator)
            else:
                parameter.fill_(1.0)
    block.to(device)
    if training.fp8 is not None:
        use_fp8(block, training.fp8)
    compiled = timing_conditions(run, device)["compile"]
    if compiled:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    common = torch.randn(1, -(-length // RUN), run.model.width, generator=generator).to(device)
    own_1TD = torch.randn(1, length, run.model.width, generator=generator).to(device)
    x_1TD = (ALIKE**0.5 * common.repeat_interleave(RUN, dim=1)[:, :length] + (1 - ALIKE) ** 0.5 * own_1TD).detach()
    x_1TD.requires_grad_()
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    dy_1TD = torch.randn(1, length, run.model.width, generator=generator).to(device, dtype)
    segments = torch.zeros(1, length, dtype=torch.int32, device=device)
    largest = max((number for number in numbers if number is not None), default=0)

    def once(number: int | None) -> float:
        budget = None
        if number is not None:
            budget = Budget(largest, torch.tensor(number, dtype=torch.int32, device=device))
        _wait(device)
        start = time.perf_counter()
        inputs: dict[str, Any] = {"segments": segments, "aux": AuxOutputs(False), "budget": budget}
        with autocast(device, training.precision):
            if training.recompute:
                y_1TD = checkpoint(block, x_1TD, use_reentrant=False, preserve_rng_state=False, **inputs)
            else:
                y_1TD = block(x_1TD, **inputs)
        y_1TD.backward(dy_1TD.to(y_1TD.dtype))
        _wait(device)
        return time.perf_counter() - start

    medians = []
    for number in numbers:
        once(number)  # compiles, allocates
        times: list[float] = []
        while len(times) < MIN_REPEATS or (sum(times) < MIN_SECONDS and len(times) < MAX_REPEATS):
            times.append(once(number))
        medians.append(float(np.median(times)))
    return medians


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
