"""The contract of a guard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from workbench.config import Config
from workbench.registry import Registry


class GuardConfig(Config):
    """Base of a guard's configuration. ``kind`` is the registered name."""

    kind: str
    action: Literal["skip", "roll_back", "count"] = "skip"
    """What follows a rejected step: skip leaves weights and optimiser state as they are; roll_back also returns them to
    what they were one to two windows before (``training.roll_back_window``); count only counts."""

    @property
    def name(self) -> str:
        """The guard's name in logs."""
        return self.kind


class Guard(ABC):
    """Rejects optimiser steps, on the device. Built as ``cls(config)``.

    A guard is one file with one decorated class; nothing else lists its name. What it remembers of earlier steps is one
    tensor, which training keeps, saves with checkpoints and replaces after every step that is made.

    Steps whose loss or gradient is not finite are rejected whatever a guard decides.
    """

    Config: ClassVar[type[GuardConfig]]

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def initial_state(self) -> Tensor:
        """The state before the first step: fp64, one axis, on the CPU."""

    @abstractmethod
    def rejects(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to reject a step: a boolean scalar on the device, without synchronising with it.

        Args:
            state: as returned by :meth:`advanced` after the last step that was made.
            loss: mean loss of the step's targets, nats, fp64, of all ranks; possibly not finite.
            norm: norm of its gradient before clipping, fp64, of all ranks; possibly not finite.
        """

    @abstractmethod
    def advanced(self, state: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """The state after a step that is made, whose loss and norm are finite. Arguments as of :meth:`rejects`."""


guards: Registry[type[Guard]] = Registry("guard", "workbench.guards")

GuardSetting: TypeAlias = Annotated[SerializeAsAny[GuardConfig], BeforeValidator(guards.parse)]
"""A field of a configuration that holds any registered guard's Config."""
