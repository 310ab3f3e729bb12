"""Sparsity-aware batching, SAB (SparseBalance, arXiv 2604.13847, algorithm 2): ranks have equal predicted times.

    k_x ← d · k_x + (1 - d) · mean budget of the step's micro-batches in length bin x    after every step, at first k0
    load of a micro-batch in bin x = T(lengths of its documents, k_x)

Budgets are learned separately for every layer. Decay, bins and the time of the update are not in the paper: ours.
Without budgets that vary the load is that of the configured ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from workbench.config import require
from workbench.data.batching import batch_plans
from workbench.data.batching.balanced import BalancedPlan, BalancedPlanConfig
from workbench.data.loads import load_models


@batch_plans.register
class SparsityAware(BalancedPlan):
    """Balances predicted times, given the budgets that layers have lately had at similar lengths."""

    learns = True

    class Config(BalancedPlanConfig):
        """Predicted times, given the budgets that layers have lately had at similar lengths."""

        kind: Literal["sparsity_aware"] = "sparsity_aware"
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
        """Weight d of the past in the moving average of budgets."""
        bins: tuple[Annotated[int, Field(ge=1)], ...] = ()
        """Largest lengths of the bins, rising; longer micro-batches form one more bin. Default: powers of two."""

        def model_post_init(self, _context: Any) -> None:
            require(
                load_models[self.loads.kind].knows_budgets,
                "loads",
                got=self.loads.kind,
                expected="a load that depends on blocks per query",
                do="Measure a latency table and set loads: {kind: measured, table: FILE}, or use length_balanced.",
            )
            require(list(self.bins) == sorted(set(self.bins)), "bins", got=list(self.bins), expected="rising lengths")

    def load(self, documents: np.ndarray, state: Any) -> float:
        configured = self.run.budgets
        learned = (state or {}).get(self._bin(documents), configured)
        return self.load_model.load(documents, [k0 if k0 is None else k for k0, k in zip(configured, learned)])

    def learn(self, state: Any, measurements: Mapping[str, Any]) -> Any:
        if "budgets" not in measurements:
            return state
        by_bin: dict[str, list[list[float]]] = {}
        for lengths, budgets in zip(measurements["lengths"], measurements["budgets"]):
            for documents, layers in zip(lengths, budgets):
                by_bin.setdefault(self._bin(np.asarray(documents)), []).append(layers)
        learned = dict(state or {})
        for name, chosen in by_bin.items():
            before, decay = learned.get(name, self.run.budgets), self.config.decay
            learned[name] = [
                None if k0 is None else decay * k0 + (1 - decay) * float(np.mean([layers[layer] for layers in chosen]))
                for layer, k0 in enumerate(before)
            ]
        return learned

    def _bin(self, documents: np.ndarray) -> str:
        """Name of the bin of a micro-batch, by its longest document."""
        longest = int(documents.max())
        if self.config.bins:
            return str(int(np.searchsorted(self.config.bins, longest)))
        return str((longest - 1).bit_length())
