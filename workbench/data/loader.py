"""A loader whose whole state is one integer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from workbench.data.packing import Batch, RowStream

AHEAD = 2
"""Batches prepared in the background before they are asked for."""


class StepLoader:
    """Batches ``position`` to ``total`` of a stream. Resumes exactly at any step, with any number of ranks.

    A thread prepares the next batches meanwhile, in pinned memory where there is a CUDA device.

    Args:
        stream: where batches come from.
        total: batches in the whole training.
        rank, world: which share of every batch (:meth:`RowStream.batch`).
    """

    def __init__(self, stream: RowStream, total: int, rank: int = 0, world: int = 1):
        self.stream, self.total, self.rank, self.world = stream, total, rank, world
        self.position = 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as background:
            asked: deque[Future[Batch]] = deque()
            following = self.position
            try:
                while self.position < self.total:
                    while following < min(self.total, self.position + AHEAD + 1):
                        asked.append(background.submit(self._prepare, following))
                        following += 1
                    batch = asked.popleft().result()
                    self.position += 1  # before handing out: a checkpoint after this batch must not give it again
                    yield batch
            finally:
                background.shutdown(cancel_futures=True)

    def _prepare(self, k: int) -> Batch:
        batch = self.stream.batch(k, self.rank, self.world)
        return Batch(*(part.pin_memory() for part in batch)) if torch.cuda.is_available() else batch

    def state_dict(self) -> dict[str, int]:
        """Lightning saves this with a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
