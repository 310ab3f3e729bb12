"""Rows in the order of the stream."""

from __future__ import annotations

from typing import Literal

import numpy as np

from workbench.data.batching import BatchPlan, BatchPlanConfig, GlobalBatch, batch_plans


@batch_plans.register
class Contiguous(BatchPlan):
    """Micro-batches one after another, each cut into contiguous shares of the ranks."""

    class Config(BatchPlanConfig):
        """Rows in the order of the stream."""

        kind: Literal["contiguous"] = "contiguous"

    def rows(self, batch: GlobalBatch, rank: int, world: int) -> list[list[int]]:
        return np.array(batch.rows).reshape(batch.accumulate, world, -1)[:, rank].tolist()
