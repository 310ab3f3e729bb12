"""Rows in the order of the stream."""

from __future__ import annotations

from typing import Literal

import numpy as np

from workbench.data.batching import Assignment, BatchPlan, BatchPlanConfig, GlobalBatch, batch_plans


@batch_plans.register
class Contiguous(BatchPlan):
    """Micro-batches one after another, each cut into contiguous shares of the ranks."""

    class Config(BatchPlanConfig):
        """Rows in the order of the stream."""

        kind: Literal["contiguous"] = "contiguous"

    def assign(self, batch: GlobalBatch, world: int) -> Assignment:
        return np.array(batch.rows).reshape(batch.accumulate, world, -1).swapaxes(0, 1).tolist()
