"""What plans that balance loads share: micro-batches of similar rows, dealt out so that ranks have equal loads.

Legend: R ranks, A micro-batches of a rank in a step, N = R · A micro-batches of a step, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np

from workbench.data.batching import Assignment, BatchPlan, BatchPlanConfig, GlobalBatch
from workbench.data.loads import LoadSetting, RunFacts, load_models

__all__ = ["BalancedPlan", "BalancedPlanConfig", "documents_of", "pack"]


class BalancedPlanConfig(BatchPlanConfig):
    """Base of the configuration of plans that balance loads."""

    loads: LoadSetting
    """What is balanced: tokens, flops, or measured seconds ({kind: measured, table: …})."""

    def canonical(self) -> dict[str, Any]:
        return {**self.plain(), "loads": self.loads.canonical()}

    def pinned(self) -> Self:
        loads = self.loads.pinned()
        return self if loads is self.loads else self.changed(loads=loads)


class BalancedPlan(BatchPlan):
    """Equal loads of all ranks.

    Rows of similar length form a micro-batch, which needs little padding. Micro-batches are dealt out by :func:`pack`
    and run in order of falling load on every rank.
    """

    Config: ClassVar[type[BalancedPlanConfig]]

    def __init__(self, config: Any, run: RunFacts):
        super().__init__(config, run)
        self.load_model = load_models[config.loads.kind](config.loads, run)

    def assign(self, batch: GlobalBatch, world: int) -> Assignment:
        rows = sorted(batch.rows, key=lambda row: (-batch.row_length(row), row))
        size = len(rows) // (batch.accumulate * world)
        micro_batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        loads_N = [self.load(documents_of(batch, rows), batch.state) for rows in micro_batches]
        return [[micro_batches[index] for index in of_rank] for of_rank in pack(loads_N, world, self.run.wait)]

    @abstractmethod
    def load(self, documents: np.ndarray, state: Any) -> float:
        """The load of a micro-batch.

        Args:
            documents: (documents,) tokens of each, the padding of a row as a document of its own.
            state: what the plan has learned.
        """


def documents_of(batch: GlobalBatch, rows: Sequence[int]) -> np.ndarray:
    """(documents,) tokens of every document of a micro-batch, the padding of a row as a document of its own."""
    longest = max(map(batch.row_length, rows))
    lengths: list[int] = []
    for row in rows:
        documents = batch.segment_lengths(row).tolist()
        padding = longest - sum(documents)
        lengths += [*documents, *([padding] if padding else [])]
    return np.array(lengths)


def pack(loads_N: Sequence[float], ranks: int, wait: Literal["step", "micro_batch"]) -> list[list[int]]:
    """Deal N micro-batches out to ``ranks`` ranks, N / R each, with loads as equal as two heuristics make them.

    Largest first, each to the rank with the smallest load that still takes one (longest processing time, LPT); then
    pairs of the rank with the largest load and another are exchanged while that makes the larger of both loads smaller.
    With ``wait: micro_batch`` the R largest run at the same time, then the next R, and so on, each time the largest on
    the rank with the smallest load so far. The solver of the paper (arXiv 2604.13847, algorithm 2) is not known; this
    is ours.

    Returns:
        Numbers of the micro-batches of every rank, in order of falling load.
    """
    count = len(loads_N) // ranks
    order = sorted(range(len(loads_N)), key=lambda index: (-loads_N[index], index))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for position, index in enumerate(order):
        most = count if wait == "step" else position // ranks + 1
        rank = min((rank for rank in range(ranks) if len(dealt[rank]) < most), key=lambda rank: (totals[rank], rank))
        dealt[rank].append(index)
        totals[rank] += loads_N[index]
    if wait == "step":
        _exchange(loads_N, dealt)
    return [sorted(of_rank, key=order.index) for of_rank in dealt]


def _exchange(loads_N: Sequence[float], dealt: list[list[int]]) -> None:
    """Exchange pairs in place until the largest load of a rank falls no further, at most N times."""
    for _ in loads_N:
        totals = [sum(loads_N[index] for index in of_rank) for of_rank in dealt]
        fullest = max(range(len(dealt)), key=lambda rank: (totals[rank], -rank))
        best = (totals[fullest] * (1 - 1e-9), None)
        for rank, of_rank in enumerate(dealt):
            if rank == fullest:
                continue
            for i, first in enumerate(dealt[fullest]):
                for j, second in enumerate(of_rank):
                    moved = loads_N[first] - loads_N[second]
                    larger = max(totals[fullest] - moved, totals[rank] + moved)
                    if moved > 0 and larger < best[0]:
                        best = larger, (i, rank, j)  # type: ignore[assignment]
        if best[1] is None:
            return
        i, rank, j = best[1]
        dealt[fullest][i], dealt[rank][j] = dealt[rank][j], dealt[fullest][i]
