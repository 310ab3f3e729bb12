"""Rescaled weights whose training is unchanged: the optimiser works on the weights without the rescaling.

A parameter θ' = s θ has gradients g' = g / s. Dividing θ' and multiplying g' by s before the optimiser's step, and
multiplying θ by s afterwards, is the untransformed step, whatever the optimiser: for AdamW the same as a learning rate
times s with epsilon and weight decay divided by s. As clipping sees g, its norm is the untransformed one too. Exact
bit for bit where s is a power of two, else up to rounding of the weights at every step. Definition ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from workbench.optimisers import SCALE


@contextlib.contextmanager
def without_rescaling(optimiser: Optimizer) -> Iterator[None]:
    """Within, compensated parameters and their gradients are those without the rescaling."""
    scales = {parameter: entry.pop(SCALE) for parameter, entry in optimiser.state.items() if SCALE in entry}
    with torch.no_grad():
        for parameter, scale in scales.items():
            parameter.div_(scale)
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, scale in scales.items():
                parameter.mul_(scale)
                optimiser.state[parameter][SCALE] = scale
