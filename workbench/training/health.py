"""Whether a run is well: followed on the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

RISING_STEPS = 200
"""A loss above its first value for so many steps in a row counts as divergence."""
SKIPS_IN_A_ROW = 20
"""So many optimiser steps skipped in a row count as divergence."""
MEMORY = 0.98
"""Share that the running mean of the gradient norm keeps at every step; it begins as a plain mean."""
EPSILON_SHARE = 1e-3
"""AdamW's epsilon above this share of the smallest gradient is told: training suffers once it comes near the gradients' root mean
square, which falls with the size of a model (arXiv 2509.01322, §4). The share is our choice."""
FIELDS = ("first_loss", "rising", "bad_step", "norm_mean", "norm_steps", "skipped", "skipped_in_a_row")


class Diverged(RuntimeError):
    """The loss stopped being finite, or stayed above its first value, or step after step was skipped.

    ``step`` says where (from 1).
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"{reason} at step {step}")
        self.step = step


class Health:
    """Losses, gradient norms and skipped steps of a run.

    Args:
        spike_factor: an optimiser step whose gradient norm is more than so many times the running mean, or not finite, is
            to be skipped; None skips nothing.

    The whole state is one tensor, ``state`` (float64, :data:`FIELDS`), that a checkpoint keeps.
    """

    def __init__(self, spike_factor: float | None):
        self.spike_factor = spike_factor
        self.state: Tensor = torch.zeros(len(FIELDS), dtype=torch.float64)

    def to(self, device: torch.device) -> None:
        """Follow the run on ``device``."""
        self.state = self.state.to(device)

    def judge_gradient(self, norm: Tensor) -> Tensor | None:
        """Take notice of a step's gradient norm. Returns 1.0 on the device where the step is to be skipped, else 0.0; None
        where nothing is ever skipped."""
        if self.spike_factor is None:
            return None
        first, rising, bad, mean, steps, skipped, row = self.state.unbind()
        norm = norm.detach().double()
        skip = ~norm.isfinite() | ((steps > 0) & (norm > self.spike_factor * mean))
        keep = torch.minimum(1 - 1 / (steps + 1), torch.full_like(steps, MEMORY))
        mean = torch.where(skip, mean, keep * mean + (1 - keep) * norm)
        self.state = torch.stack(
            (first, rising, bad, mean, steps + (~skip).double(), skipped + skip, torch.where(skip, row + 1, 0.0))
        )
        return skip.float()

    def note_step(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Follow the loss of optimiser step ``step`` and the norm of its gradient."""
        first, rising, bad, mean, steps, skipped, row = self.state.unbind()
        loss = loss.double()
        first = torch.where((first == 0) & loss.isfinite(), loss, first)
        rising = torch.where(loss > first, rising + 1, 0.0)
        ill = (rising >= RISING_STEPS) | (row >= SKIPS_IN_A_ROW)
        if self.spike_factor is None:
            ill = ill | ~(loss.isfinite() & norm.isfinite())
        bad = torch.where((bad == 0) & ill, float(step), bad)
        self.state = torch.stack((first, rising, bad, mean, steps, skipped, row))

    @staticmethod
    def check(values: dict[str, float]) -> None:
        """Raises Diverged when ``values``, the state by field, say so."""
        if not values["bad_step"]:
            return
        if values["rising"] >= RISING_STEPS:
            reason = f"the loss stayed above its start for {RISING_STEPS} steps"
        elif values["skipped_in_a_row"] >= SKIPS_IN_A_ROW:
            reason = f"{SKIPS_IN_A_ROW} steps in a row were skipped for their gradients"
        else:
            reason = "the loss or its gradient is not finite"
        raise Diverged(int(values["bad_step"]), reason)


def spread_of_gradients(rms_N: Tensor) -> dict[str, Tensor]:
    """Smallest (of those that are not zero), median and largest root mean square of the tensors' gradients, on the device."""
    smallest = torch.where(rms_N > 0, rms_N, torch.inf).min()
    values = torch.where(smallest.isfinite(), smallest, 0.0), rms_N.median(), rms_N.max()
    return {f"gradient_rms_{name}": value for name, value in zip(("min", "median", "max"), values)}
