"""Metrics and diagnostics of a run, written while training continues on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.optimisers import optimisers
from workbench.results import RunFolder
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.health import EPSILON_FRACTION, FIELDS, Health


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
        self.epsilon_warned = False

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
        row |= dict(zip(names, further[len(FIELDS) :]))
        if self.config.training.spike_factor is not None:
            row["skipped"] = int(health["skipped"])
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
            self.folder.add_diagnostics(
                {"step": step, "layer": layer, "values": {name: _plain(next(values), named[name]) for name in named}}
                for layer, named in layers.items()
            )

    def flush(self) -> None:
        """Write the staged line, if there is one.

        Raises:
            Diverged: when its values show it.
        """
        if self.staged is not None:
            self.write(self.complete())

    def _check_epsilon(self, row: dict[str, Any]) -> None:
        """Warn once when the optimiser's epsilon is near the smallest gradients."""
        smallest, epsilon = row.get("gradient_rms_min", 0.0), self.epsilon
        if self.epsilon_warned or not smallest or epsilon is None or not parallel.is_rank_zero():
            return
        if epsilon > EPSILON_FRACTION * smallest:
            self.epsilon_warned = True
            self.folder.event("epsilon_near_gradients", step=row["step"], epsilon=epsilon, gradient_rms_min=smallest)


def _plain(values: Tensor, like: Tensor) -> float | list[float | None] | None:
    """A number where ``like`` is a scalar, else a list; None where a value is not finite."""
    numbers = [number if math.isfinite(number) else None for number in values.tolist()]
    return numbers if like.dim() else numbers[0]
