"""Dynamic sparsity tuning, DST (SparseBalance, arXiv 2604.13847, §4): slow micro-batches attend fewer blocks, fast ones
more, so that all take about as long.

    T_a = φ { T(x_j, k0) : micro-batches j of the global batch }                      anchor, φ mean, min or max
    F_i = { k : T(x_i, k) ≤ T_a  and  (C_i(k0) - C_i(k) < p  or  k ≥ k0) }            feasible budgets of micro-batch i
    k_i = max F_i                                                                      of every layer on its own

with the configured budget k0, measured layer times T (:class:`workbench.latency.LatencyTable`), and the coverage
C_i(k), the share of a layer's selection scores that its best k blocks have. ``table: flops`` counts a layer's training
FLOPs in place of its time (ours): budgets that every device repeats, for studies of quality.

The paper gives the rule twice, as an equation (6 and 7) and as pseudocode (algorithm 1). Where F_i has a member they
agree: coverage grows with k, so the largest budget that is fast enough is the one that covers most, and if it does not
cover enough, none does. Where F_i is empty the equation defines nothing, and the pseudocode takes a budget by coverage
alone, without saying which: ``infeasible`` chooses between the smallest of them (our reading of the pseudocode) and the
configured budget (the largest of them). The text also defines the budget of an anchor twice, as the largest that is not
slower and as the closest match: ``align``.

Ours: the pooling of coverage (mean over queries of the share of each query; the paper does not name one), the strict
inequality, by which a tolerance of 0 keeps every selection, the limit of upward tuning (``max_factor``; the paper names
none), and the division of a stage's time (``scope``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from workbench.config import require
from workbench.contract import BlocksPerQuery, Budget, BudgetChoice, mixers
from workbench.latency import LatencyTable, LayerLatency, TableConfig
from workbench.model.config import Layer, ModelConfig
from workbench.training.budgets import BudgetConfig, BudgetTuner, StepLengths, budget_tuners
from workbench.training.config import RunConfig
from workbench.training.latency import LayerFlops, layer_key, table_of, with_current_keys

ROUNDING = 1e-9
"""Relative difference up to which two times are equal: a mean of equal times differs from them by rounding."""
COUNTED = "flops"
"""In place of the name of a table: costs are counted."""
ANCHORS: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "min": np.min, "max": np.max}


@dataclass(frozen=True, eq=False)
class CoverageBudget(Budget):
    """The largest fast enough number of blocks that loses little coverage."""

    fast_enough_K: Tensor | None = None
    """(K,) whether the micro-batch takes no longer than the anchor with each candidate."""
    configured: int = 0
    tolerance: float = 0.0
    keeps_configured: bool = False
    """Whether the configured number, instead of the smallest that covers enough, is taken where no candidate is both
    fast enough and covers enough."""

    def choose(self, coverage_K: Tensor | None) -> BudgetChoice:
        assert coverage_K is not None and self.candidates_K is not None and self.fast_enough_K is not None
        candidates_K = self.candidates_K
        configured = torch.where(candidates_K == self.configured, coverage_K, 0.0).sum()
        covers_K = (candidates_K >= self.configured) | (configured - coverage_K < self.tolerance)
        smallest = torch.where(covers_K, candidates_K, self.largest).amin()
        otherwise = torch.full_like(smallest, self.configured) if self.keeps_configured else smallest
        best = torch.where(covers_K & self.fast_enough_K, candidates_K, 0).amax()
        chosen = torch.where(best > 0, best, otherwise)
        lost = configured - torch.where(candidates_K == chosen, coverage_K, 0.0).sum()
        return BudgetChoice(chosen, lost.clamp_min(0))


class _Layer(NamedTuple):
    """What tuning knows of one layer."""

    cost: LayerLatency | LayerFlops
    per_query: BlocksPerQuery | None
    """None in a layer that selects no blocks."""
    candidates: tuple[int, ...]
    """Budgets that it may have, ascending."""


@budget_tuners.register
class DST(BudgetTuner):
    """Dynamic sparsity tuning of SparseBalance."""

    class Config(TableConfig, BudgetConfig):
        """Dynamic sparsity tuning."""

        kind: Literal["dst"] = "dst"
        table: str
        """File of the latency table of this model on this device (`workbench latency-table`), or `flops`: training
        FLOPs by the formulas of the layers, counted instead of measured and the same on every device."""
        anchor: Literal["mean", "min", "max"] = "mean"
        """The time that all micro-batches of a global batch are tuned to: mean, shortest or longest of theirs."""
        scope: Literal["layer", "stage"] = "layer"
        """What is tuned to an anchor: every layer on its own, or the sum of the layers of a pipeline stage, in which
        layers with budgets make up for all of them, in proportion to their times."""
        stages: Annotated[int, Field(ge=1)] = 1
        """Pipeline stages of equally many layers, with scope: stage."""
        tolerance: Annotated[float, Field(ge=0, le=1)] = 0.1
        """Coverage p that a layer may lose in a micro-batch."""
        infeasible: Literal["smallest", "configured"] = "smallest"
        """The budget where none is both fast enough and within the tolerance: the smallest one within the tolerance, or
        the configured one."""
        align: Literal["below", "nearest"] = "below"
        """Which budgets count as fast enough: those whose time is at most the anchor, or those up to the one whose time
        is closest to it."""
        max_factor: Annotated[float, Field(ge=1)] = 2.0
        """Largest budget k_max as a multiple of the configured one; 1 tunes downwards only."""
        queries: Annotated[int, Field(ge=1)] = 1024
        """Queries of a row over which coverage is averaged."""

        @property
        def names_file(self) -> bool:
            return self.table != COUNTED

        def check(self, model: ModelConfig) -> None:
            kinds = [layer.mixer.kind for layer in model.layers]
            require(
                any(mixers[layer.mixer.kind].blocks_per_query(layer.mixer) for layer in model.layers),
                "",
                got=f"mixers that select no blocks: {', '.join(dict.fromkeys(kinds))}",
                expected="a mixer with blocks per query, such as moba, nsa or asa_global",
                do="Leave training.budgets out, or change model.pattern.",
            )
            require(
                self.scope == "stage" or self.stages == 1,
                "stages",
                got=self.stages,
                expected="1 with scope: layer",
                do="Set scope: stage.",
            )
            require(
                len(model.layers) % self.stages == 0,
                "stages",
                got=self.stages,
                expected=f"a divisor of the {len(model.layers)} layers",
            )

    def __init__(self, run: RunConfig, device: torch.device):
        super().__init__(run, device)
        if self.config.names_file:
            table = table_of(self.config, run, device, "training.budgets")
            self._set([self._measured(table, layer) for layer in run.model.layers])
        else:
            counted = {layer: self._counted(layer) for layer in dict.fromkeys(run.model.layers)}
            self._set([counted[layer] for layer in run.model.layers])

    @classmethod
    def simulated(cls, run: RunConfig, table: LatencyTable, device: torch.device) -> DST:
        """The tuner with a table of any device, for simulations."""
        tuner = cls.__new__(cls)
        BudgetTuner.__init__(tuner, run, device)
        table = with_current_keys(table)
        tuner._set([tuner._measured(table, layer) for layer in run.model.layers])
        return tuner

    def _set(self, layers: list[_Layer]) -> None:
        self.layers = layers
        size = len(self.layers) // self.config.stages if self.config.scope == "stage" else 1
        self.groups = [list(range(first, first + size)) for first in range(0, len(self.layers), size)]
        self._moved: dict[tuple[bytes, str], Tensor] = {}

    def _measured(self, table: LatencyTable, layer: Layer) -> _Layer:
        key = layer_key(layer)
        require(
            key in table.layers,
            "training.budgets.table",
            got=f"{self.config.table}, which lists {len(table.layers)} layers of another configuration",
            expected=f"times of a layer with mixer {layer.mixer.kind!r} as configured",
            do="Measure a table of this model: workbench latency-table CONFIG --output FILE.",
        )
        latency, per_query = table.layers[key], mixers[layer.mixer.kind].blocks_per_query(layer.mixer)
        if per_query is None:
            return _Layer(latency, None, ())
        require(
            latency.budgets[0] <= per_query.configured <= latency.budgets[-1],
            "training.budgets.table",
            got=f"{per_query.field}: {per_query.configured} of mixer {layer.mixer.kind!r}",
            expected=f"{latency.budgets[0]} to {latency.budgets[-1]} blocks per query, the measured numbers",
            do="Measure a table with these --budgets.",
        )
        largest = self.config.max_factor * per_query.configured
        measured = {number for number in latency.budgets if per_query.smallest <= number <= largest}
        return _Layer(latency, per_query, tuple(sorted(measured | {per_query.configured})))

    def _counted(self, layer: Layer) -> _Layer:
        """With every number of blocks as a candidate.

        Raises:
            ConfigError: where the layer's formula gives all of them the same FLOPs.
        """
        width, context = self.run.model.width, self.run.training.context
        cost, per_query = LayerFlops(layer, width), mixers[layer.mixer.kind].blocks_per_query(layer.mixer)
        if per_query is None:
            return _Layer(cost, None, ())
        candidates = tuple(range(per_query.smallest, int(self.config.max_factor * per_query.configured) + 1))
        flops = [float(cost.at(np.array([context]), number).sum()) for number in (candidates[0], candidates[-1])]
        require(
            flops[0] < flops[1] or len(candidates) == 1,
            "training.budgets.table",
            got=f"{COUNTED} with mixer {layer.mixer.kind}, whose formula gives a document of {context} tokens "
            f"{flops[0]:.4g} FLOPs with {candidates[0]} blocks per query and {flops[1]:.4g} with {candidates[-1]}",
            expected="a mixer whose `cost` grows with the number of blocks",
            do="Count them in its `cost`, or measure a table: workbench latency-table CONFIG --output FILE.",
        )
        return _Layer(cost, per_query, candidates)

    def budgets(self, lengths: StepLengths, rank: int) -> list[list[Budget | None]]:
        first, count = sum(len(of_rank) for of_rank in lengths[:rank]), len(lengths[rank])
        fast = self.fast_enough([documents for of_rank in lengths for documents in of_rank])
        return [
            [
                None if fast_NK is None else self._budget(layer, fast_NK[number])
                for layer, fast_NK in zip(self.layers, fast)
            ]
            for number in range(first, first + count)
        ]

    def _budget(self, layer: _Layer, fast_K: np.ndarray) -> Budget:
        """The budget of a micro-batch: a number where it is fast enough as configured, which loses no coverage."""
        assert layer.per_query is not None
        candidates, configured = layer.candidates, layer.per_query.configured
        if fast_K[candidates.index(configured)]:
            number = candidates[int(fast_K.nonzero()[0][-1])]
            return Budget(candidates[-1], self._tensor(np.array(number, dtype=np.int32)))
        candidates_K = self._tensor(np.array(candidates, dtype=np.int32))
        return CoverageBudget(
            largest=candidates[-1],
            blocks=candidates_K[0],
            candidates_K=candidates_K,
            queries=self.config.queries,
            fast_enough_K=self._tensor(fast_K),
            configured=configured,
            tolerance=self.config.tolerance,
            keeps_configured=self.config.infeasible == "configured",
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        """On the device; equal values are moved once per run, so that steps wait for no copy."""
        key = (values.tobytes(), values.dtype.str)
        if key not in self._moved:
            self._moved[key] = torch.tensor(values, device=self.device)
        return self._moved[key]

    def fast_enough(self, micro_batches: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """[layer] -> (N, K) whether each of N micro-batches takes no longer than the anchor with each candidate; None
        for layers without budgets.

        Args:
            micro_batches: tokens of the documents of every micro-batch of the global batch.
        """
        # a layer's time is that of all layers with the same table and budgets
        times: dict[tuple[int, Any], np.ndarray] = {}

        def times_NK(layer: _Layer, numbers: Sequence[int | None]) -> np.ndarray:
            key = (id(layer.cost), tuple(numbers))
            if key not in times:
                times[key] = np.array([[layer.cost.at(x, k).sum() for k in numbers] for x in micro_batches])
            return times[key]

        fast: list[np.ndarray | None] = []
        for group in self.groups:
            layers = [self.layers[index] for index in group]
            base = [times_NK(la, [la.per_query.configured if la.per_query else None])[:, 0] for la in layers]
            total_N = np.sum(base, axis=0)
            tuned_N = np.sum([t for t, la in zip(base, layers) if la.per_query] or [np.ones_like(total_N)], axis=0)
            slack_N = ANCHORS[self.config.anchor](total_N) - total_N
            for layer, base_N in zip(layers, base):
                if layer.per_query is None:
                    fast.append(None)
                    continue
                target_N1 = (base_N + slack_N * base_N / tuned_N)[:, None]
                seconds_NK = times_NK(layer, layer.candidates)
                if self.config.align == "nearest":
                    distance_NK = np.abs(seconds_NK - target_N1)
                    below_N1 = distance_NK[:, ::-1].argmin(axis=1)[:, None]  # of equally close ones the largest
                    fast.append(np.arange(len(layer.candidates)) < len(layer.candidates) - below_N1)
                else:
                    fast.append(seconds_NK <= target_N1 * (1 + ROUNDING))
        return fast
