"""How equally a batch plan loads the ranks of a run, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np

from workbench.config import ConfigError
from workbench.data import Source, StepLoader
from workbench.latency import LatencyTable, TableConfig
from workbench.training.config import RunConfig
from workbench.training.latency import layer_key, with_current_keys

__all__ = ["latency_tables", "seconds_imbalance", "token_imbalance"]

STEPS = 16
"""Steps that are planned."""


def token_imbalance(run: RunConfig, data: Source, ranks: int) -> float:
    """Tokens of the ranks that the others wait for, divided by the mean over ranks: the mean over the first steps.
    Padding counts. Plans that learn have not learned anything yet.

    Ranks that store all weights wait once per step, for the rank with most tokens in the step; ranks that share them
    wait in every micro-batch, for the rank with most tokens in it.

    Args:
        run: the run.
        data: its prepared data.
        ranks: number of ranks, a divisor of the rows of a micro-batch.
    """
    return _imbalance(run, data, ranks, lambda documents: float(documents.sum()))


def seconds_imbalance(run: RunConfig, data: Source, ranks: int, tables: Collection[LatencyTable]) -> float | None:
    """As :func:`token_imbalance`, of the seconds that a latency table predicts with the configured blocks per query.
    None where no table is one of the layers of this model, or documents are longer than those that were measured.

    Args:
        tables: of the ablation's arms; the first that fits is used.
    """
    order = tuple(map(layer_key, run.model.layers))
    table = next((table for table in tables if table.order == order), None)
    if table is None:
        return None
    budgets = run.batch_plan.run.budgets
    try:
        return _imbalance(run, data, ranks, lambda documents: table.seconds(documents, budgets))
    except ConfigError:
        return None


def latency_tables(runs: Iterable[RunConfig]) -> list[LatencyTable]:
    """The latency tables that the batch plans and budget tuners of runs name, each once."""
    parts = [(run.training.budgets, getattr(run.training.batch_plan, "loads", None)) for run in runs]
    named = [part for pair in parts for part in pair if isinstance(part, TableConfig) and part.names_file]
    return list({table.fingerprint: with_current_keys(table) for table in (part.read() for part in named)}.values())


def _imbalance(run: RunConfig, data: Source, ranks: int, load: Callable[[np.ndarray], float]) -> float:
    """See :func:`token_imbalance`; ``load`` is that of a micro-batch, by the tokens of its documents."""
    training = run.training
    steps = min(STEPS, training.steps)
    loader = StepLoader(
        run.stream(data),
        run.batch_plan,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        steps=steps,
        world=ranks,
    )
    loads_SRA = np.array([[list(map(load, of_rank)) for of_rank in loader.lengths(step)] for step in range(steps)])
    if training.ranks == "replicated":
        loads_SRA = loads_SRA.sum(2, keepdims=True)
    return float((loads_SRA.max(1).sum(1) / loads_SRA.mean(1).sum(1)).mean())
