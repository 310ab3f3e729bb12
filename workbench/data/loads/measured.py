"""The load of a micro-batch as its seconds in a measured latency table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from workbench.data.loads import LoadConfig, LoadModel, load_models
from workbench.latency import LatencyTable


@load_models.register
class Measured(LoadModel):
    """Seconds of the forward and backward pass through all layers, from a latency table."""

    knows_budgets = True

    class Config(LoadConfig):
        """Seconds of the forward and backward pass through all layers, from a latency table."""

        kind: Literal["measured"] = "measured"
        table: str
        """File of the latency table of this model on this device (`workbench latency-table`)."""

    @cached_property
    def table(self) -> LatencyTable:
        return LatencyTable.load(self.config.table)

    def load(self, documents: np.ndarray, budgets: Sequence[float | None]) -> float:
        return self.table.seconds(documents, budgets)
