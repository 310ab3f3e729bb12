"""Metrics and diagnostics of a run, written while training continues on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.optimisers import optimisers
from workbench.results import RunFolder
from workbench.results.alarms import alarms_of
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.health import EPSILON_FRACTION, FIELDS, Health, guard_names


class HostCopy:
    """A copy of a tensor to the host that runs beside the device's work."""

    def __init__(self, values: Tensor):
        self.values = values.to("cpu", non_blocking=True)
        self.done: torch.cuda.Event | None = None
        if values.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record()

    def wait(self) -> Tensor:
        """The values, once they have arrived."""
        if self.done is not None:
            self.done.synchronize()
        return self.values


class MetricLog:
    """Writes metrics.jsonl and diagnostics.jsonl (rank 0), one line late.

    A line is staged while its values are copied from the device, and written when the next line is due; so no step
    waits for its own numbers.

    Args:
        folder: of the run.
        config: the run.
        on_row: called with every line as it is written.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, on_row: Callable[[dict[str, Any]], None] | None = None):
        self.folder, self.config, self.on_row = folder, config, on_row
        self.staged: tuple[dict[str, Any], HostCopy, list[str]] | None = None
        self.diagnostics: list[tuple[int, dict[int, dict[str, Tensor]], HostCopy]] = []
        self.epsilon = optimisers[config.training.optimiser.kind](config.training.optimiser).epsilon
        self.raised: set[str] = set()
        """Names of the alarms that this process has raised."""
        self.guards = guard_names(config.training.guards)

    def add_diagnostics(self, step: int, layers: dict[int, dict[str, Tensor]]) -> None:
        """Copy a snapshot (values by name, by layer); written with the next line."""
        values = [value for layer in layers.values() for value in layer.values()]
        self.diagnostics.append((step, layers, HostCopy(torch.cat([value.flatten() for value in values]))))

    def stage(self, row: dict[str, Any], values: HostCopy, names: list[str]) -> None:
        """Set the next line: what is known of it, and the copy of :meth:`TrainStep.take_log_values`."""
        self.staged = row, values, names

    def complete(self) -> dict[str, Any]:
        """The staged line with its values, to be passed to :meth:`write`.

        Raises:
            Diverged: when the values show it.
        """
        assert self.staged is not None
        (row, copy, names), self.staged = self.staged, None
        loss_sum, targets, norm, *further = copy.wait().tolist()
        health = dict(zip(FIELDS, further))
        Health.check(health)
        row |= {"loss": loss_sum / targets if targets else math.nan, "gradient_norm": norm}
        metrics, rejections = further[len(FIELDS) :][: len(names)], further[len(FIELDS) + len(names) :]
        row |= dict(zip(names, metrics))
        if self.guards:
            row |= {name: int(health[name]) for name in ("skipped", "rolled_back", "undone")}
            row["rejected"] = self._rejected(row["step"], rejections)
        self._check_epsilon(row)
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append a complete line, and the snapshots up to its step."""
        if parallel.is_rank_zero():
            self.folder.add_metrics(row)
        self.write_diagnostics(row["step"])
        if self.on_row is not None and parallel.is_rank_zero():
            self.on_row(row)

    def write_diagnostics(self, until: int) -> None:
        """Append the snapshots up to a step."""
        ready = [snapshot for snapshot in self.diagnostics if snapshot[0] <= until]
        self.diagnostics = [snapshot for snapshot in self.diagnostics if snapshot[0] > until]
        if not parallel.is_rank_zero():
            return
        for step, layers, copy in ready:
            values = iter(copy.wait().split([value.numel() for layer in layers.values() for value in layer.values()]))
            rows: list[dict[str, Any]] = [
                {"step": step, "layer": layer, "values": {name: _plain(next(values), named[name]) for name in named}}
                for layer, named in layers.items()
            ]
            self.folder.add_diagnostics(rows)
            for row in rows:
                for alarm in alarms_of(row["values"]):
                    self._raise(alarm.diagnostic, step=step, layer=row["layer"], limit=alarm.limit, means=alarm.meaning)

    def flush(self) -> None:
        """Write the staged line, if there is one.

        Raises:
            Diverged: when its values show it.
        """
        if self.staged is not None:
            self.write(self.complete())

    def _rejected(self, step: int, rejections: list[float]) -> dict[str, list[int]]:
        """Steps that guards have rejected, by guard: those of the line of ``step``."""
        count = len(self.guards)
        first = step - len(rejections) // count + 1
        flags = {name: rejections[index::count] for index, name in enumerate(self.guards)}
        steps = {name: [first + i for i, flag in enumerate(of_guard) if flag] for name, of_guard in flags.items()}
        return {name: numbers for name, numbers in steps.items() if numbers}

    def _check_epsilon(self, row: dict[str, Any]) -> None:
        """Raise an alarm when the optimiser's epsilon is near the smallest gradients."""
        smallest, epsilon = row.get("gradient_rms_min", 0.0), self.epsilon
        if smallest and epsilon is not None and epsilon > EPSILON_FRACTION * smallest:
            means = f"the optimiser's epsilon {epsilon:g} is near the smallest gradients {smallest:.3g}"
            self._raise("gradient_rms_min", step=row["step"], limit=epsilon / EPSILON_FRACTION, means=means)

    def _raise(self, name: str, **about: Any) -> None:
        """Write an alarm as an event, each once per process."""
        if name not in self.raised and parallel.is_rank_zero():
            self.raised.add(name)
            self.folder.event("alarm", of=name, **about)


def _plain(values: Tensor, like: Tensor) -> float | list[float | None] | None:
    """A number where ``like`` is a scalar, else a list; None where a value is not finite."""
    numbers = [number if math.isfinite(number) else None for number in values.tolist()]
    return numbers if like.dim() else numbers[0]
