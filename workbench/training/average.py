"""An exponential moving average of the weights, which most training keeps beside them: ``training.ema``.

    a_n = d a_{n-1} + (1 - d) w_n,   divided by 1 - dⁿ

with w_n the weights after step n. The division, that of Adam's moments, leaves the initial weights out, so that the
average is one of trained weights from the first step on.

The average is an entry of the optimiser's state (:data:`workbench.optimisers.AVERAGE`), fp32, four bytes per parameter:
sharded, saved and restored with it, rescaled by weight transforms and copied in growth. Where growth gives a
parameter a fresh state, its average starts again at its weights. Buffers, such as the selection biases of routers, are
not averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from workbench.config import Config, require
from workbench.optimisers import AVERAGE
from workbench.optimisers.tensors import local


class AverageConfig(Config):
    """Exponential moving average of the weights."""

    decay: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay d per optimiser step, such as 0.999; either this or ``half_life``."""
    half_life: Annotated[int | None, Field(ge=1)] = None
    """Tokens after which the weight of a step in the average is half; it keeps its meaning when the batch changes."""
    evaluate: Literal["instead", "beside"] = "instead"
    """What is measured: the average instead of the weights, on all splits; or the weights, with the average measured
    beside them on the selection split and logged as ``selection_value_ema``."""

    def model_post_init(self, _context: object) -> None:
        require(
            (self.decay is None) != (self.half_life is None),
            "decay",
            got=f"decay {self.decay}, half_life {self.half_life}",
            expected="either a decay per step or a half-life in tokens",
            do="Set one of them: decay: 0.999.",
        )

    def decay_of_step(self, tokens_per_step: int) -> float:
        """d."""
        if self.decay is not None:
            return self.decay
        assert self.half_life is not None
        return float(0.5 ** (tokens_per_step / self.half_life))

    def share(self, step: int, tokens_per_step: int) -> float:
        """Weight of step ``step`` (from 1) in the average after it: (1 - d) / (1 - dⁿ)."""
        decay = self.decay_of_step(tokens_per_step)
        return (1 - decay) / (1 - decay**step)


@contextlib.contextmanager
def averaging(optimiser: Optimizer, share: float | None) -> Iterator[None]:
    """Within, the optimiser steps and does not see the averages; at the end they move towards the weights.

    Args:
        optimiser: of the weights.
        share: from :meth:`AverageConfig.share`; None keeps no average.
    """
    if share is None:
        yield
        return
    averages = {p: entry.pop(AVERAGE) for p, entry in optimiser.state.items() if AVERAGE in entry}
    trained = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None or p in averages]
    yield
    with torch.no_grad():
        for parameter in trained:
            if parameter in averages:
                local(averages[parameter]).lerp_(local(parameter), share)
            else:
                averages[parameter] = parameter.detach().clone()
            optimiser.state[parameter][AVERAGE] = averages[parameter]


@contextlib.contextmanager
def averaged(model: nn.Module, optimiser: Optimizer) -> Iterator[None]:
    """Within, the parameters have the values of their averages. Afterwards both are as before, bit for bit.

    Takes the memory of one parameter more. Called by every rank.
    """
    _exchange(model, optimiser)
    try:
        yield
    finally:
        _exchange(model, optimiser)


@torch.no_grad()
def _exchange(model: nn.Module, optimiser: Optimizer) -> None:
    for parameter, entry in optimiser.state.items():
        if AVERAGE in entry:
            weights, average = local(parameter), local(entry[AVERAGE])
            saved = weights.clone()
            weights.copy_(average)
            average.copy_(saved)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is gathered, of the embedding and the head after an evaluation, has the old values
