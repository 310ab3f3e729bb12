"""The contract of an optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from workbench.config import Config
from workbench.contract import ParameterRole, Range
from workbench.optimisers.groups import ParameterGroup
from workbench.parametrisations import UpdateFamily
from workbench.registry import Registry


class OptimiserConfig(Config):
    """Base of an optimiser's configuration. ``kind`` is the registered name."""

    kind: str


AVERAGE = "average"
"""Entry of a parameter's state that is a moving average of its values, where training keeps one; of every optimiser."""
SCALE = "scale"
"""Entry of the state of a parameter whose rescaling is compensated: the parameter over the value that the optimiser
updates (:mod:`workbench.training.compensation`)."""
OF_TRAINING = frozenset({AVERAGE, SCALE})
"""Entries that training adds to those of the optimiser, which does not see them in its step."""


class Optimiser(ABC):
    """Builds a torch optimiser and states what training and cost cards must know about it. Built as ``cls(config)``.

    An optimiser is one file with one decorated class; nothing else lists its name. The conformance suite
    (:mod:`workbench.testing.optimisers`) measures what it states.
    """

    Config: ClassVar[type[OptimiserConfig]]
    skips_on_found_inf: ClassVar[bool] = False
    """Whether a step leaves parameters and state unchanged where the attribute ``found_inf`` of the torch optimiser
    is a tensor of 1.0, without synchronising with the device. Guards that skip steps need it."""
    gradient_powers: ClassVar[Mapping[str, int]] = {}
    """Entries of the state with one number per element of the parameter, with the power of the gradient that they are
    of: 1 for momentum, 2 for a second moment. All other entries, such as step counts, belong to the whole tensor."""

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

    def rescaled_state(
        self, entry: Mapping[str, Any], *, parameter: Tensor | float, gradient: Tensor | float
    ) -> dict[str, Any]:
        """The state of a parameter whose values and future gradients are multiplied by constants.

        For a parameter of an exact rescaling, ``gradient`` is ``1 / parameter``. For an input channel that is copied
        n times with weights divided by n, it is 1: every copy has the gradient of the original.

        Args:
            entry: the parameter's entries; not modified.
            parameter: factor of the values, positive, a number or a tensor that broadcasts against the parameter.
            gradient: factor of future gradients, likewise.
        """
        powers = {name: gradient**power for name, power in self.gradient_powers.items()}
        factors: dict[str, Tensor | float] = {**powers, AVERAGE: parameter}
        return {name: value * factors[name] if name in factors else value for name, value in entry.items()}

    def remapped_state(self, entry: Mapping[str, Any], remap: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The state of a parameter whose elements are selected, repeated or reordered: copied rows, columns or layers.

        Args:
            entry: the parameter's entries; not modified.
            remap: what is done to the parameter, a function of a tensor of its shape; applied to every entry of one
                number per element.
        """
        elementwise = {*self.gradient_powers, *OF_TRAINING}
        return {name: remap(value) if name in elementwise else value for name, value in entry.items()}

    def update_family(self, role: ParameterRole) -> UpdateFamily:
        """How large the updates of parameters of this role are, by which a parametrisation chooses the factors of their
        learning rates and weight decay. Default: as Adam's."""
        return "sign"

    def update_outputs(self, role: ParameterRole) -> tuple[int, ...]:
        """Output channels of what an update treats as one matrix, for each entry of ``role.parts``. Empty where that is
        the whole parameter: the default."""
        return ()

    def rate_factor(self, role: ParameterRole) -> float:
        """Factor of the learning rate of parameters of this role that :meth:`build` sets beside that of their group.
        Default: 1."""
        return 1.0

    def denominator(self, entry: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
        """What ``group["eps"]`` is added to in the update of one parameter: (of its shape), not negative.

        Args:
            entry: the parameter's state.
            group: its group of the torch optimiser.

        Returns:
            None where no epsilon is added. Default.
        """
        return None

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
