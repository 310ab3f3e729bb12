"""How equally a batch plan loads the ranks of a run, before anything is trained."""

from __future__ import annotations

import numpy as np

from workbench.data import Source, StepLoader
from workbench.training.config import RunConfig

__all__ = ["token_imbalance"]

STEPS = 16
"""Steps that are planned."""


def token_imbalance(run: RunConfig, data: Source, ranks: int) -> float:
    """Tokens of the rank that has most of them in a step, divided by the mean over ranks: the mean over the first
    steps. Padding counts. Plans that learn have not learned anything yet.

    Args:
        run: the run.
        data: its prepared data.
        ranks: number of ranks, a divisor of the rows of a micro-batch.
    """
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
    tokens_SR = np.array(
        [[sum(documents.sum() for documents in rank) for rank in loader.lengths(step)] for step in range(steps)]
    )
    return float((tokens_SR.max(1) / tokens_SR.mean(1)).mean())
