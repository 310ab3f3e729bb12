"""Divergence and gradient spikes of a run, tracked on the device without synchronising."""

from __future__ import annotations

import torch
from torch import Tensor

RISING_STEPS = 200
"""A loss above its first value for this many steps in a row counts as divergence."""
SKIPS_IN_A_ROW = 20
"""This many optimiser steps skipped in a row count as divergence."""
NORM_DECAY = 0.98
"""Decay of the running mean of the gradient norm, which starts as a plain mean."""
EPSILON_FRACTION = 1e-3
"""An optimiser's epsilon above this fraction of the smallest gradient root mean square is reported: training suffers
once it approaches the gradients, which shrink with the size of a model (arXiv 2509.01322, §4). The fraction is our
choice."""
FIELDS = ("first_loss", "rising", "bad_step", "norm_mean", "norm_steps", "skipped", "skipped_in_a_row")


class Diverged(RuntimeError):
    """The loss stopped being finite, stayed above its first value, or step after step was skipped.

    ``step`` is the optimiser step (from 1).
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"{reason} at step {step}")
        self.step = step


class Health:
    """Losses, gradient norms and skipped steps of a run.

    Args:
        spike_factor: skip an optimiser step whose gradient norm is not finite or more than this many times its
            running mean; None skips nothing.
        device: of the losses and norms.

    The whole state is one tensor, ``state`` (float64, :data:`FIELDS`), which is part of a checkpoint.
    """

    def __init__(self, spike_factor: float | None, device: torch.device | None = None):
        self.spike_factor = spike_factor
        self.state: Tensor = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)

    def judge_gradient(self, norm: Tensor) -> Tensor | None:
        """Record a step's gradient norm.

        Returns:
            On the device, 1.0 where the step is to be skipped, else 0.0; None where nothing is ever skipped.
        """
        if self.spike_factor is None:
            return None
        first, rising, bad, mean, steps, skipped, in_a_row = self.state.unbind()
        norm = norm.detach().double()
        skip = ~norm.isfinite() | ((steps > 0) & (norm > self.spike_factor * mean))
        decay = torch.minimum(1 - 1 / (steps + 1), torch.full_like(steps, NORM_DECAY))
        mean = torch.where(skip, mean, decay * mean + (1 - decay) * norm)
        in_a_row = torch.where(skip, in_a_row + 1, 0.0)
        self.state = torch.stack((first, rising, bad, mean, steps + (~skip).double(), skipped + skip, in_a_row))
        return skip.float()

    def record_step(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Record the loss of optimiser step ``step`` (from 1) and the norm of its gradient."""
        first, rising, bad, mean, steps, skipped, in_a_row = self.state.unbind()
        loss = loss.double()
        first = torch.where((first == 0) & loss.isfinite(), loss, first)
        rising = torch.where(loss > first, rising + 1, 0.0)
        diverged = (rising >= RISING_STEPS) | (in_a_row >= SKIPS_IN_A_ROW)
        if self.spike_factor is None:
            diverged = diverged | ~(loss.isfinite() & norm.isfinite())
        bad = torch.where((bad == 0) & diverged, float(step), bad)
        self.state = torch.stack((first, rising, bad, mean, steps, skipped, in_a_row))

    @staticmethod
    def check(values: dict[str, float]) -> None:
        """Check a state that has been copied to the host, by field.

        Raises:
            Diverged: when it shows divergence.
        """
        if not values["bad_step"]:
            return
        if values["rising"] >= RISING_STEPS:
            reason = f"the loss stayed above its start for {RISING_STEPS} steps"
        elif values["skipped_in_a_row"] >= SKIPS_IN_A_ROW:
            reason = f"{SKIPS_IN_A_ROW} steps in a row were skipped for their gradients"
        else:
            reason = "the loss or its gradient is not finite"
        raise Diverged(int(values["bad_step"]), reason)


def gradient_rms_summary(rms_N: Tensor) -> dict[str, Tensor]:
    """Smallest non-zero, median and largest root mean square of N tensors' gradients, on the device."""
    smallest = torch.where(rms_N > 0, rms_N, torch.inf).min()
    values = torch.where(smallest.isfinite(), smallest, 0.0), rms_N.median(), rms_N.max()
    return {f"gradient_rms_{name}": value for name, value in zip(("min", "median", "max"), values)}
