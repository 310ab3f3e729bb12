"""Cells that several tables share."""

from __future__ import annotations

import json

from workbench import formatting
from workbench.dashboards.panel import Cell


def seed_cell(seed: int | None) -> Cell:
    """A seed: a name, not an amount."""
    return Cell(formatting.UNKNOWN if seed is None else str(seed), seed)


def step_cell(step: int | None, steps: int | None = None) -> Cell:
    """A training step, with the planned number of steps while they are not complete."""
    if step is None:
        return Cell(formatting.UNKNOWN)
    return Cell(f"{step:,}" if steps is None or step == steps else f"{step:,} of {steps:,}", step)


def status_text(status: str) -> str:
    """A status as words."""
    return status.replace("_", " ")


def hyperparameters(text: str | None) -> str:
    """Tuned values in short."""
    return formatting.setting(json.loads(text or "{}"))
