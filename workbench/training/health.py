"""Divergence of a run and steps that its guards reject, tracked on the device without synchronising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.guards import GuardConfig, guards

RISING_STEPS = 200
"""A loss above its first value for this many steps in a row counts as divergence."""
SKIPS_IN_A_ROW = 20
"""This many optimiser steps skipped in a row count as divergence; those that are rolled back are not among them."""
ROLL_BACKS_IN_A_ROW = 5
"""This many windows rolled back in a row count as divergence."""
EPSILON_FRACTION = 1e-3
"""An optimiser's epsilon above this fraction of the smallest gradient root mean square is reported: training suffers
once it approaches the gradients, which shrink with the size of a model (arXiv 2509.01322, §4). The fraction is our
choice."""
FIELDS = (
    "first_loss",
    "rising",
    "bad_step",
    "skipped",
    "skipped_in_a_row",
    "rolled_back",
    "rolled_back_in_a_row",
    "undone",
)


class Diverged(RuntimeError):
    """The loss stopped being finite, stayed above its first value, or step after step was skipped or undone.

    ``step`` is the optimiser step (from 1).
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"{reason} at step {step}")
        self.step = step


class Health:
    """Losses, gradient norms and rejected steps of a run.

    Args:
        settings: the guards of the run, in order.
        device: of the losses and norms.

    All of it is part of a checkpoint: ``state`` (float64, :data:`FIELDS`), ``guard_states``, one tensor per guard, and
    ``rejections``, one (guards,) tensor of 0.0 and 1.0 per step since the last logged line.
    """

    def __init__(self, settings: Sequence[GuardConfig] = (), device: torch.device | None = None):
        self.guards = [guards[config.kind](config) for config in settings]
        self.names = guard_names(settings)
        self.skips = torch.tensor([config.action != "count" for config in settings], device=device)
        self.rolls_back = torch.tensor([config.action == "roll_back" for config in settings], device=device)
        self.stops_spikes = any(config.action != "count" for config in settings)
        self.state: Tensor = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        self.guard_states = [guard.initial_state().to(device) for guard in self.guards]
        self.rejections: list[Tensor] = []

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor | None:
        """Let the guards judge a step before the optimiser makes it.

        Args:
            loss: mean loss of the step.
            norm: of its gradient.

        Returns:
            On the device, 1.0 where the step is to be skipped, else 0.0; None where no guard ever skips one.
        """
        if not self.guards:
            return None
        loss, norm = loss.detach().double(), norm.detach().double()
        finite = loss.isfinite() & norm.isfinite()
        rejected = torch.stack([g.rejects(state, loss, norm) for g, state in zip(self.guards, self.guard_states)])
        rejected = rejected | ~finite
        self.rejections.append(rejected.double())
        skip = (rejected & self.skips).any()
        made = ~skip & finite
        self.guard_states = [
            torch.where(made, guard.advanced(state, loss, norm), state)
            for guard, state in zip(self.guards, self.guard_states)
        ]
        if not self.stops_spikes:
            return None
        in_a_row = torch.where(skip, self._field("skipped_in_a_row") + ~(rejected & self.rolls_back).any(), 0.0)
        self._set(skipped=self._field("skipped") + skip, skipped_in_a_row=in_a_row)
        return skip.float()

    @property
    def wants_roll_back(self) -> Tensor:
        """Whether a guard whose action is roll_back has rejected the newest step: 1.0 or 0.0 on the device."""
        return (self.rejections[-1] * self.rolls_back).amax()

    def record_step(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Record the loss of optimiser step ``step`` (from 1) and the norm of its gradient."""
        loss, first = loss.double(), self._field("first_loss")
        first = torch.where((first == 0) & loss.isfinite(), loss, first)
        rising = torch.where(loss > first, self._field("rising") + 1, 0.0)
        diverged = (rising >= RISING_STEPS) | (self._field("skipped_in_a_row") >= SKIPS_IN_A_ROW)
        if not self.stops_spikes:
            diverged = diverged | ~(loss.isfinite() & norm.isfinite())
        self._set(first_loss=first, rising=rising, bad_step=self._bad_step(step, diverged))

    def record_window(self, step: int, undone: Tensor) -> None:
        """Record the end of a window after ``step``.

        Args:
            undone: steps that were undone, on the device; 0 where the window stays.
        """
        is_undone = undone > 0
        in_a_row = torch.where(is_undone, self._field("rolled_back_in_a_row") + 1, 0.0)
        self._set(
            rolled_back=self._field("rolled_back") + is_undone,
            rolled_back_in_a_row=in_a_row,
            undone=self._field("undone") + undone,
            bad_step=self._bad_step(step, in_a_row >= ROLL_BACKS_IN_A_ROW),
        )

    def take_rejections(self) -> Tensor:
        """(steps · guards,) rejections of the steps since the last call."""
        taken = torch.cat(self.rejections) if self.rejections else self.state[:0]
        self.rejections = []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """All state, as tensors and plain data."""
        return {"state": self.state, "guards": self.guard_states, "rejections": self.rejections}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        device = self.state.device
        self.state = saved["state"].to(device)
        self.guard_states = [state.to(device) for state in saved["guards"]]
        self.rejections = [rejected.to(device) for rejected in saved["rejections"]]

    def _field(self, name: str) -> Tensor:
        return self.state[FIELDS.index(name)]

    def _set(self, **values: Tensor) -> None:
        fields = dict(zip(FIELDS, self.state.unbind()))
        self.state = torch.stack([*(fields | {name: value.double() for name, value in values.items()}).values()])

    def _bad_step(self, step: int, diverged: Tensor) -> Tensor:
        bad = self._field("bad_step")
        return torch.where((bad == 0) & diverged, float(step), bad)

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
        elif values["rolled_back_in_a_row"] >= ROLL_BACKS_IN_A_ROW:
            reason = f"{ROLL_BACKS_IN_A_ROW} windows in a row were rolled back"
        elif values["skipped_in_a_row"] >= SKIPS_IN_A_ROW:
            reason = f"{SKIPS_IN_A_ROW} steps in a row were skipped"
        else:
            reason = "the loss or its gradient is not finite"
        raise Diverged(int(values["bad_step"]), reason)


def guard_names(settings: Sequence[GuardConfig]) -> list[str]:
    """Names of the guards, numbered where two have the same."""
    names = [config.name for config in settings]
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def gradient_rms_summary(rms_N: Tensor) -> dict[str, Tensor]:
    """Smallest non-zero, median and largest root mean square of N tensors' gradients, on the device."""
    smallest = torch.where(rms_N > 0, rms_N, torch.inf).min()
    values = torch.where(smallest.isfinite(), smallest, 0.0), rms_N.median(), rms_N.max()
    return {f"gradient_rms_{name}": value for name, value in zip(("min", "median", "max"), values)}
