"""The contract of an optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import BeforeValidator, SerializeAsAny

from workbench.config import Config
from workbench.contract import Range
from workbench.optimisers.groups import ParameterGroup
from workbench.registry import Registry


class OptimiserConfig(Config):
    """Base of an optimiser's configuration. ``kind`` is the registered name."""

    kind: str


class Optimiser(ABC):
    """Builds a torch optimiser and states what training and cost cards must know about it. Built as ``cls(config)``.

    An optimiser is one file with one decorated class; nothing else lists its name. The conformance suite
    (:mod:`workbench.testing.optimisers`) measures what it states.
    """

    Config: ClassVar[type[OptimiserConfig]]
    skips_on_found_inf: ClassVar[bool] = False
    """Whether a step leaves parameters and state unchanged where the attribute ``found_inf`` of the torch optimiser
    is a tensor of 1.0, without synchronising with the device. ``training.spike_factor`` needs it."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        """The torch optimiser, ready for its first step.

        Every parameter is in exactly one of its groups. The trainer sets ``lr`` of every group before every step, as a
        fraction of the ``lr`` given here. Its ``state_dict()`` holds tensors and plain data only.
        """

    @abstractmethod
    def state_bytes(self, group: ParameterGroup) -> int:
        """Bytes of the state of a group's parameters, after the first step."""

    @property
    def epsilon(self) -> float | None:
        """The constant added to the gradients' root mean square in the denominator of an update; None without one.

        A run logs a warning event when its gradients approach it.
        """
        return None

    @classmethod
    def search_space(cls, config: Any) -> dict[str, Range]:
        """Fields of the configuration that a sweep may vary, with sensible ranges; the defaults lie inside."""
        return {}


optimisers: Registry[type[Optimiser]] = Registry("optimiser", "workbench.optimisers")

OptimiserSetting: TypeAlias = Annotated[
    SerializeAsAny[OptimiserConfig], BeforeValidator(partial(optimisers.parse, default_kind="adamw"))
]
"""A field of a configuration that holds any registered optimiser's Config; without a ``kind`` it is AdamW's."""
