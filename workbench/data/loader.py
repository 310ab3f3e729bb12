"""A loader with exact resume.

Its state is one integer, and what the batch plan has learned in the last steps, if it learns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from workbench.data.batching import Assignment, BatchPlan, GlobalBatch
from workbench.data.batching.balanced import documents_of
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
        self.states: dict[int, Any] = {}
        """Step -> what the plan had learned after it, of as many steps as plans look back."""
        self._planned: tuple[int, Assignment] | None = None
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
                        pending.append(background.submit(self._prepare, submitted, self._state(submitted)))
                        submitted += 1
                    batch = pending.popleft().result()
                    self.position += 1  # before the yield: a checkpoint after this batch must not repeat it
                    yield batch
            finally:
                background.shutdown(cancel_futures=True)

    def record(self, step: int, measurements: Mapping[str, Any]) -> None:
        """Let the plan learn from optimiser step ``step`` (from 0); nothing with a plan that does not.

        Args:
            step: the step, before the first micro-batch of the next one is requested.
            measurements: plain data, gathered over ranks: equal on every rank.
        """
        if self.plan.learns:
            self.states[step] = self.plan.learn(self.states.get(step - 1), measurements)
            self.states = {s: state for s, state in self.states.items() if s >= step - self._delay}

    def lengths(self, step: int) -> list[list[np.ndarray]]:
        """Tokens of every document of optimiser step ``step`` (from 0), the padding of a row as a document of its own:
        [rank][micro-batch] -> (documents,). Equal on every rank.

        Args:
            step: the step whose micro-batches are requested next, or are the last requested.
        """
        batch = self._global_batch(step, self._state(step * self.accumulate))
        return [
            [documents_of(batch, rows) for rows in micro_batches]
            for micro_batches in self.plan.assign(batch, self.world)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Number of micro-batches handed out; what the plan has learned, if anything."""
        states = {str(step): state for step, state in self.states.items()}
        return {"position": self.position, **({"states": states} if states else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]
        self.states = {int(step): learned for step, learned in state.get("states", {}).items()}

    def _state(self, number: int) -> Any:
        """What the plan of micro-batch ``number`` may have learned, whatever was prefetched."""
        return self.states.get(number // self.accumulate - self._delay)

    def _prepare(self, number: int, state: Any) -> Batch:
        step, micro_batch = divmod(number, self.accumulate)
        if self._planned is None or self._planned[0] != step:
            self._planned = step, self.plan.assign(self._global_batch(step, state), self.world)
        batch = self.stream.batch(self._planned[1][self.rank][micro_batch])
        return Batch(*(part.pin_memory() for part in batch)) if torch.cuda.is_available() else batch

    def _global_batch(self, step: int, state: Any) -> GlobalBatch:
        count, stream = self.batch_size * self.accumulate, self.stream
        rows = range(step * count, (step + 1) * count)
        return GlobalBatch(step, rows, self.accumulate, stream.row_length, stream.segment_lengths, state)
