"""The load of a micro-batch as its seconds in a measured latency table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from workbench.data.loads import LoadConfig, LoadModel, load_models
from workbench.latency import LatencyTable, TableConfig


@load_models.register
class Measured(LoadModel):
    """Seconds of the forward and backward pass through all layers, from a latency table."""

    knows_budgets = True

    class Config(TableConfig, LoadConfig):
        """Seconds of the forward and backward pass through all layers, from a latency table."""

        kind: Literal["measured"] = "measured"

    @cached_property
    def table(self) -> LatencyTable:
        table: LatencyTable = self.config.read()
        return table

    def load(self, documents: np.ndarray, budgets: Sequence[float | None]) -> float:
        return self.table.seconds(documents, budgets)
