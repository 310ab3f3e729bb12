"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from workbench.training.config import TrainingConfig


def rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of step ``step`` (from 0) as a fraction of the peak."""
    steps = config.steps
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))
    if step < config.trunk_steps:
        return 1.0
    done = (step - config.trunk_steps) / max(1, steps - config.trunk_steps)
    if config.decay_shape == "linear":
        return config.final + (1 - config.final) * (steps - step) / max(1, steps - config.trunk_steps)
    remaining = 1 - math.sqrt(done) if config.decay_shape == "sqrt" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final + (1 - config.final) * remaining
