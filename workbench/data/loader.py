"""A loader whose whole state is one integer."""

from __future__ import annotations

from collections.abc import Iterator

from workbench.data.packing import Batch, TrainingStream


class StepLoader:
    """Batches ``position`` to ``total`` of a stream. Resumes exactly at any step.

    Args:
        stream: where batches come from.
        total: batches in the whole training.
    """

    def __init__(self, stream: TrainingStream, total: int):
        self.stream, self.total, self.position = stream, total, 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        while self.position < self.total:
            batch = self.stream.batch(self.position)
            self.position += 1  # before handing out: a checkpoint after this batch must not give it again
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Lightning saves this with a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
