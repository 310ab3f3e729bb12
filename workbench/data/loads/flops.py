"""The load of a micro-batch as its training FLOPs, by the formulas of the model's components."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from workbench.data.loads import LoadConfig, LoadModel, load_models


@load_models.register
class Flops(LoadModel):
    """Training FLOPs with the configured blocks per query."""

    class Config(LoadConfig):
        """Training FLOPs with the configured blocks per query."""

        kind: Literal["flops"] = "flops"

    @cached_property
    def _flops(self) -> Any:
        return lru_cache(maxsize=4096)(self.run.flops)

    def load(self, documents: np.ndarray, budgets: Sequence[float | None]) -> float:
        return float(sum(self._flops(int(length)) for length in documents))
