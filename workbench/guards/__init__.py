"""Guards against steps that would spoil a run, one file per guard.

    training: {guards: [{kind: spike, of: loss, action: roll_back}, {kind: ratio, factor: 20}]}

A guard decides by a step's loss and gradient norm. What follows from a rejection (skip, roll back, count) belongs to
training.
"""

from workbench.guards.base import Guard, GuardConfig, GuardSetting, guards

__all__ = ["Guard", "GuardConfig", "GuardSetting", "guards"]
