"""Batch plans, one file per plan: which rows of a global batch each rank and micro-batch takes.

A global batch is the rows of one optimiser step. A plan only permutes rows inside it, so every plan sees the same data
in every step and differs from another in speed and rounding.

Legend: R ranks, A micro-batches of a rank in a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np

from workbench.config import Config
from workbench.data.loads import RunFacts
from workbench.registry import Registry

__all__ = ["Assignment", "BatchPlan", "BatchPlanConfig", "GlobalBatch", "batch_plans"]

Assignment: TypeAlias = list[list[list[int]]]
"""Row numbers by rank and micro-batch."""


class BatchPlanConfig(Config):
    """Base of a batch plan's configuration. ``kind`` is the registered name."""

    kind: str

    def pinned(self) -> Self:
        """With the fingerprint of every file that it names, so that its identity needs none."""
        return self


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimiser step. Equal on every rank."""

    step: int
    """Optimiser step, from 0."""
    rows: range
    """Numbers of its rows in the stream: micro-batch size × ``accumulate``."""
    accumulate: int
    """Micro-batches A per step."""
    row_length: Callable[[int], int]
    """Row number -> tokens of the row, padding included (:meth:`workbench.data.RowStream.row_length`)."""
    segment_lengths: Callable[[int], np.ndarray]
    """Row number -> (segments,) tokens of each of its segments (:meth:`workbench.data.RowStream.segment_lengths`)."""
    state: Any = None
    """What the plan has learned from earlier steps (:meth:`BatchPlan.learn`); None before the first."""


class BatchPlan(ABC):
    """Distributes the rows of a global batch. Built as ``cls(config, run)``; stateless.

    A plan is a pure function of its arguments, so that all ranks agree without communicating and a resumed run
    repeats it exactly.

    Args:
        config: an instance of ``cls.Config``.
        run: facts about the run.
    """

    Config: ClassVar[type[BatchPlanConfig]]
    learns: ClassVar[bool] = False
    """Whether the plan defines :meth:`learn`."""

    def __init__(self, config: Any, run: RunFacts):
        self.config, self.run = config, run

    @abstractmethod
    def assign(self, batch: GlobalBatch, world: int) -> Assignment:
        """Row numbers of every micro-batch of every rank.

        Args:
            batch: the global batch; ``len(batch.rows)`` is a multiple of ``batch.accumulate * world``.
            world: number of ranks R.

        Returns:
            For each of the R ranks A lists of equal length. Together they contain every row once.
        """

    def learn(self, state: Any, measurements: Mapping[str, Any]) -> Any:
        """The state after a step.

        Args:
            state: the state before it; None at the first. Not to be changed.
            measurements: of the step, equal on every rank (:meth:`workbench.training.step.TrainStep.measurements`).

        Returns:
            Plain data fit for JSON: it is part of a checkpoint.
        """
        raise NotImplementedError(f"{type(self).__name__} learns nothing")


batch_plans: Registry[type[BatchPlan]] = Registry("batch plan", "workbench.data.batching")
