"""Optimisers, one file per optimiser, and the groups of parameters they receive.

    training: {learning_rate: 3e-3, optimiser: {kind: adamw, epsilon: 1e-15}}

Schedules, gradient clipping and the decision to skip a step belong to training; an optimiser only updates parameters.
"""

from workbench.optimisers.base import (
    AVERAGE,
    OF_TRAINING,
    SCALE,
    Optimiser,
    OptimiserConfig,
    OptimiserSetting,
    optimisers,
)
from workbench.optimisers.groups import ParameterGroup, parameter_groups

__all__ = [
    "AVERAGE",
    "OF_TRAINING",
    "SCALE",
    "Optimiser",
    "OptimiserConfig",
    "OptimiserSetting",
    "ParameterGroup",
    "optimisers",
    "parameter_groups",
]
