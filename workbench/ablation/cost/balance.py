"""How equally a batch plan loads the ranks of a run, before anything is trained."""

from __future__ import annotations

import numpy as np

from workbench.data import Source, StepLoader
from workbench.training.config import RunConfig

__all__ = ["token_imbalance"]

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
    tokens_SRA = np.array(
        [[[documents.sum() for documents in rank] for rank in loader.lengths(step)] for step in range(steps)]
    )
    if training.ranks == "replicated":
        tokens_SRA = tokens_SRA.sum(2, keepdims=True)
    return float((tokens_SRA.max(1).sum(1) / tokens_SRA.mean(1).sum(1)).mean())
