"""A loader with exact resume.

Its state is one integer, and the measurements of the last steps if the batch plan reads them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from workbench.data.batching import BatchPlan, GlobalBatch
from workbench.data.streams import Batch, RowStream

PREFETCH = 2
"""Micro-batches prepared in the background, or as many as a step has: it requests them at once."""


class StepLoader:
    """The micro-batches of one rank. Resumes exactly at any of them.

    A background thread prepares the next micro-batches, in pinned memory on a machine with a CUDA device.

    Args:
        stream: training rows.
        plan: distributes the rows of every global batch over ranks and micro-batches.
        batch_size: rows of a micro-batch over all ranks, a multiple of ``world``.
        accumulate: micro-batches per optimiser step.
        steps: optimiser steps of the run.
        rank: rank of this process.
        world: number of ranks.
    """

    def __init__(
        self,
        stream: RowStream,
        plan: BatchPlan,
        *,
        batch_size: int,
        steps: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        assert batch_size % world == 0, "every rank takes the same number of rows"
        self.stream, self.plan, self.rank, self.world = stream, plan, rank, world
        self.batch_size, self.accumulate, self.steps = batch_size, accumulate, steps
        self.position = 0
        self.history: dict[int, dict[str, Any]] = {}
        self._prefetch = max(PREFETCH, accumulate)
        # a step is planned as many micro-batches early, when the steps in between have not been measured
        self._delay = -(-self._prefetch // accumulate) + 1

    def __len__(self) -> int:
        """Micro-batches of the run."""
        return self.steps * self.accumulate

    def __iter__(self) -> Generator[Batch, None, None]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as background:
            pending: deque[Future[Batch]] = deque()
            submitted = self.position
            try:
                while self.position < len(self):
                    while submitted < min(len(self), self.position + self._prefetch + 1):
                        pending.append(background.submit(self._prepare, submitted, self._history(submitted)))
                        submitted += 1
                    batch = pending.popleft().result()
                    self.position += 1  # before the yield: a checkpoint after this batch must not repeat it
                    yield batch
            finally:
                background.shutdown(cancel_futures=True)

    def record(self, step: int, measurements: Mapping[str, Any]) -> None:
        """Store measurements of optimiser step ``step`` (from 0) for plans that read them.

        Args:
            step: the step, before the first micro-batch of the next one is requested.
            measurements: plain data fit for JSON, gathered over ranks: equal on every rank.
        """
        self.history[step] = dict(measurements)
        oldest = step + 1 - self._delay - self.plan.history_steps
        self.history = {s: values for s, values in self.history.items() if s >= oldest}

    def state_dict(self) -> dict[str, Any]:
        """Number of micro-batches handed out; measurements of earlier steps, if any."""
        history = {str(step): values for step, values in self.history.items()}
        return {"position": self.position, **({"history": history} if history else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]
        self.history = {int(step): values for step, values in state.get("history", {}).items()}

    def _history(self, number: int) -> dict[int, dict[str, Any]]:
        """Measurements that the plan of micro-batch ``number`` may read, whatever was prefetched."""
        last = number // self.accumulate - self._delay
        return {s: values for s, values in self.history.items() if last - self.plan.history_steps < s <= last}

    def _prepare(self, number: int, history: Mapping[int, Mapping[str, Any]]) -> Batch:
        step, micro_batch = divmod(number, self.accumulate)
        count = self.batch_size * self.accumulate
        rows = range(step * count, (step + 1) * count)
        planned = GlobalBatch(step, rows, self.accumulate, self.stream.segment_lengths, history)
        batch = self.stream.batch(self.plan.rows(planned, self.rank, self.world)[micro_batch])
        return Batch(*(part.pin_memory() for part in batch)) if torch.cuda.is_available() else batch
