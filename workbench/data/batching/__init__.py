"""Batch plans, one file per plan: which rows of a global batch each rank and micro-batch takes.

A global batch is the rows of one optimiser step. A plan only permutes rows inside it, so every plan sees the same data
in every step and differs from another in speed and rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from workbench.config import Config
from workbench.registry import Registry

__all__ = ["BatchPlan", "BatchPlanConfig", "GlobalBatch", "batch_plans"]


class BatchPlanConfig(Config):
    """Base of a batch plan's configuration. ``kind`` is the registered name."""

    kind: str


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimiser step. Equal on every rank."""

    step: int
    """Optimiser step, from 0."""
    rows: range
    """Numbers of its rows in the stream: micro-batch size × ``accumulate``."""
    accumulate: int
    """Micro-batches per step."""
    segment_lengths: Callable[[int], np.ndarray]
    """Row number -> (segments,) tokens of each of its segments (:meth:`workbench.data.RowStream.segment_lengths`)."""
    history: Mapping[int, Mapping[str, Any]]
    """Earlier step -> measurements of that step, gathered over ranks (:meth:`workbench.data.StepLoader.record`)."""


class BatchPlan(ABC):
    """Distributes the rows of a global batch. Built as ``cls(config)``; stateless.

    A plan is a pure function of its arguments, so that all ranks agree without communicating and a resumed run
    repeats it exactly.
    """

    Config: ClassVar[type[BatchPlanConfig]]
    history_steps: ClassVar[int] = 0
    """Number of earlier steps whose measurements the plan reads."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def rows(self, batch: GlobalBatch, rank: int, world: int) -> list[list[int]]:
        """Row numbers of each micro-batch of one rank.

        Args:
            batch: the global batch; ``len(batch.rows)`` is a multiple of ``batch.accumulate * world``.
            rank: rank, from 0.
            world: number of ranks.

        Returns:
            ``batch.accumulate`` lists of equal length. Over all ranks and micro-batches every row occurs once.
        """


batch_plans: Registry[type[BatchPlan]] = Registry("batch plan", "workbench.data.batching")
