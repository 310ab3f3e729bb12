"""Replays the data-parallel ranks of a run one after another on one device.

Ranks are independent of each other between the collectives of a step. So one device that runs the micro-batches of all
ranks in turn, sums their gradients and makes one update trains as the distributed run does, up to the rounding of sums;
and the time of the distributed step, without that of its communication, is that of the rank whose micro-batches take
longest, or, with ranks that share the weights, the sum over micro-batches of the longest that run at the same time.
Times are :attr:`workbench.simulation.Origin.REPLAYED`.

Legend: R ranks, A micro-batches of a rank in a step, L layers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch

from workbench.data import Batch, RowStream, StepLoader
from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.budgets import StepLengths
from workbench.training.config import RunConfig
from workbench.training.step import build_step

__all__ = ["ReplayedStep", "replay"]


class ReplayedStep(NamedTuple):
    """One step of a replayed run."""

    seconds_RA: np.ndarray
    """(R, A) seconds of the forward and backward pass of every micro-batch."""
    lengths: StepLengths
    """[rank][micro-batch] -> (documents,) tokens of each."""
    blocks_RAL: np.ndarray
    """(R, A, L) blocks per query that were attended; NaN in layers without a budget."""
    coverage_lost_RAL: np.ndarray
    """(R, A, L) share of the selection scores that the configured number has and these do not; NaN as above."""
    ranks: Literal["sharded", "replicated"] = "replicated"
    """Whether ranks wait for each other in every micro-batch (:attr:`workbench.training.TrainingConfig.ranks`)."""

    @property
    def seconds(self) -> float:
        """Seconds of the ranks that the others wait for."""
        if self.ranks == "sharded":
            return float(self.seconds_RA.max(axis=0).sum())
        return float(self.seconds_RA.sum(axis=1).max())


class _Clock:
    """Times the micro-batches of a step; waits for the device after each."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, 0.0
        self.trained: list[float] = []
        """Seconds of every micro-batch, forward and backward."""
        self.counted: list[float] = []
        """The same of passes that only count, where a step has them: they come first."""

    def begin_step(self) -> None:
        self.trained, self.counted = [], []
        self._restart()

    @property
    def seconds(self) -> np.ndarray:
        """Of every micro-batch."""
        return np.array(self.trained) + np.array(self.counted or [0.0])

    def _restart(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def on_phase(self, phase: str) -> None:
        if phase in ("count", "backward"):
            self._wait()
            (self.counted if phase == "count" else self.trained).append(time.perf_counter() - self.start)
            self._restart()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def replay(
    run: RunConfig, stream: RowStream, ranks: int, steps: int, model: LanguageModel | None = None
) -> Iterator[ReplayedStep]:
    """Train the first steps of ``run`` as on ``ranks`` devices, on one.

    Args:
        run: the distributed run: ``batch_size`` rows of a micro-batch over all ranks, ``accumulate`` micro-batches A.
        stream: its training rows.
        ranks: R; divides ``batch_size``.
        steps: optimiser steps.
        model: default: random weights.

    Yields:
        every step, once it is done.
    """
    training = run.training
    assert training.batch_size % ranks == 0, "every rank takes the same number of rows"
    rows, micro_batches = training.batch_size // ranks, training.accumulate * ranks
    single = run.model_copy(update={"training": training.changed(batch_size=rows, accumulate=micro_batches)})
    model = model or LanguageModel(run.model, seed=run.seed_of("init"))
    fabric = parallel.launch(devices=1)
    clock = _Clock(fabric.device)
    step, _ = build_step(model, single, fabric, clock.on_phase)
    step.diagnose_at = set()
    loaders = [
        StepLoader(
            stream,
            run.batch_plan,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            steps=steps,
            rank=rank,
            world=ranks,
        )
        for rank in range(ranks)
    ]
    with contextlib.ExitStack() as stack:
        by_rank = [stack.enter_context(contextlib.closing(iter(loader))) for loader in loaders]
        for number in range(steps):
            lengths = loaders[0].lengths(number)
            # one rank with the micro-batches of all: the same budgets, since anchors are of the whole step
            step.step_lengths = lambda _, of_all=lengths: [[documents for of_rank in of_all for documents in of_rank]]
            batches: list[Batch] = [next(batches) for batches in by_rank for _ in range(training.accumulate)]
            clock.begin_step()
            step(number + 1, iter(batches))
            numbers = np.array(
                [
                    [(np.nan, np.nan) if c is None else (float(c.blocks), float(c.coverage_lost)) for c in layers]
                    for layers in step.choices
                ]
            )[:, : len(model.blocks)].reshape(ranks, training.accumulate, len(model.blocks), 2)
            seconds_RA = clock.seconds.reshape(ranks, training.accumulate)
            yield ReplayedStep(seconds_RA, lengths, numbers[..., 0], numbers[..., 1], training.ranks)
            measured = step.measurements(lengths)
            if "budgets" in measured:
                (of_all,) = measured["budgets"]
                A = training.accumulate
                measured["budgets"] = [of_all[rank * A : (rank + 1) * A] for rank in range(ranks)]
            for loader in loaders:
                loader.record(number, measured)
