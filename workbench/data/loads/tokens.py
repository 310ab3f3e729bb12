"""The load of a micro-batch as its number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from workbench.data.loads import LoadConfig, LoadModel, load_models


@load_models.register
class Tokens(LoadModel):
    """Tokens, padding included."""

    class Config(LoadConfig):
        """Tokens, padding included."""

        kind: Literal["tokens"] = "tokens"

    def load(self, documents: np.ndarray, budgets: Sequence[float | None]) -> float:
        return float(documents.sum())
