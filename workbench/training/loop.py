"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from workbench.data import Batch
from workbench.training import parallel
from workbench.training.checkpointer import Checkpointer
from workbench.training.config import TrainingConfig
from workbench.training.memory import peak_memory
from workbench.training.metric_log import HostCopy, MetricLog
from workbench.training.step import TrainStep
from workbench.training.throughput import Throughput


class Stopped(RuntimeError):
    """The run was asked to stop and has written a checkpoint."""


def train_loop(
    training: TrainingConfig,
    train_step: TrainStep,
    batches: Iterator[Batch],
    *,
    after: int,
    until: int,
    record: Callable[[int], None],
    throughput: Throughput,
    log: MetricLog,
    checkpointer: Checkpointer,
    weight_transforms: Callable[[int], None],
    evaluate: Callable[[int], dict[str, float]],
    measure: Callable[[int], None],
    measure_at: Collection[int],
    should_stop: Callable[[], bool],
    on_first_step: Callable[[], None],
) -> None:
    """Train from the step after ``after`` to step ``until``.

    Steps do not synchronise with the device; logged steps copy their values to the host beside it. Only evaluations and
    checkpoints wait. A scheduled checkpoint falls on a logged step; one that a stop request causes anywhere else adds
    no line, and carries what has been summed for the next one. So a resumed run writes the same lines.

    Args:
        batches: micro-batches, from the first of step ``after`` + 1.
        after: steps already trained.
        record: called after every step with its number.
        until: last step; that of the run, or the last of a phase, after which its model is replaced.
        weight_transforms: called after every step with its number, and with 0 before the first.
        evaluate: step -> values on the selection split, by the names that the line gives them.
        measure: runs the suites that are due after a step.
        measure_at: steps after which some are.
        should_stop: asked after every step; with several ranks, after every ``log_every`` steps, where they wait for
            each other.
        on_first_step: called after the first step of this process.

    Raises:
        Stopped: after a checkpoint, when asked to stop.
        Diverged: when the logged values show it.
    """
    evaluate_at = {round(training.steps * i / training.evaluations) for i in range(1, training.evaluations + 1)}
    if after == 0:
        weight_transforms(0)
    throughput.start(after)
    for step in range(after + 1, until + 1):
        train_step(step, batches)
        record(step)
        weight_transforms(step)
        if train_step.diagnostics:
            log.add_diagnostics(step, train_step.diagnostics)
        if step == after + 1:
            on_first_step()

        asks = parallel.world_size() == 1 or step % training.log_every == 0
        stops = asks and parallel.any_rank(should_stop(), train_step.device)
        is_due, evaluates = checkpointer.due(step), step in evaluate_at
        if step % training.log_every == 0 or evaluates or is_due:
            log.flush()
            values, names = train_step.take_log_values()
            copy = HostCopy(values)
            if evaluates or is_due or stops:
                copy.wait()  # the time of the line includes the work on the device
            row = throughput.row(step) | train_step.rank_times.take()
            row["memory_bytes"] = parallel.largest(peak_memory(train_step.device), train_step.device)
            row["learning_rate"] = training.learning_rate * train_step.lr_factor
            log.stage(row, copy, names)
        if evaluates:
            row = log.complete()  # raises if the run diverged: neither evaluated nor saved
            with throughput.paused():
                row |= evaluate(step)
            log.write(row)
        if step in measure_at:
            if train_step.device.type == "cuda":
                torch.cuda.synchronize()  # the step's work on the device is training time
            with throughput.paused():
                measure(step)
        if is_due or stops:
            log.flush()  # raises as well
            log.write_diagnostics(step)
            throughput.tick(step)
            checkpointer.save(step)
        if stops and step < training.steps:
            raise Stopped(f"asked to stop; step {step} is saved")
