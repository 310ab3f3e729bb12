"""Parameters of a model in groups of one learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from workbench.config import nearest, require
from workbench.contract import ParameterRole
from workbench.model.parametrisation import parameter_factors
from workbench.model.roles import parameter_roles
from workbench.parametrisations import UpdateFamily


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same learning rate and weight decay."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay: a step of learning rate ``lr`` multiplies the parameters by ``1 - lr · weight_decay``."""
    epsilon_factor: float = 1.0
    """Factor of the optimiser's epsilon, where it has one."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """By full name, in the order of the model."""
    roles: dict[str, ParameterRole] = field(default_factory=dict)
    """The role of each of them."""
    part_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Factors of ``lr`` for each entry of a role's ``parts``, of the parameters where they are not all 1."""

    def settings(self, **more: Any) -> dict[str, Any]:
        """A parameter group of a :class:`torch.optim.Optimizer`, with the optimiser's further settings."""
        return {"params": list(self.parameters.values()), "lr": self.lr, "weight_decay": self.weight_decay, **more}


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    lr_factors: Mapping[str, float],
    family: Callable[[ParameterRole], UpdateFamily] = lambda role: "sign",
    outputs: Callable[[ParameterRole], tuple[int, ...]] = lambda role: (),
) -> list[ParameterGroup]:
    """Groups of all parameters of ``model`` that are trained.

    Whether a parameter decays is a property of its role (:class:`workbench.contract.ParameterRole`); how its settings
    follow the size of the model is a property of the parametrisation (:mod:`workbench.parametrisations`).

    Args:
        model: on any device, also meta.
        learning_rate: peak learning rate.
        weight_decay: of the parameters that decay.
        lr_factors: learning-rate factor by shell pattern over full parameter names; matching factors multiply.
        family: of the updates of parameters of a role (:meth:`workbench.optimisers.Optimiser.update_family`).
        outputs: of what an update treats as one matrix (:meth:`workbench.optimisers.Optimiser.update_outputs`).

    Raises:
        ConfigError: when a pattern of ``lr_factors`` matches no parameter, or the parametrisation has no rule for
            such updates.
    """
    roles = parameter_roles(model)
    for pattern in lr_factors:
        require(
            any(fnmatch(name, pattern) for name in roles),
            f"training.lr_factors.{pattern}",
            got="a pattern that matches no parameter",
            expected="a shell pattern over parameter names",
            do=nearest(pattern, roles),
        )
    factors = parameter_factors(model, family, outputs)
    groups: dict[tuple[bool, float, float, float], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role, by_size = roles[name], factors[name]
        given = (value for pattern, value in lr_factors.items() if fnmatch(name, pattern))
        factor = math.prod(given, start=by_size.learning_rate)
        group = groups.setdefault(
            (role.decays, factor, by_size.weight_decay, by_size.epsilon),
            ParameterGroup(
                lr=learning_rate * factor,
                weight_decay=weight_decay * by_size.weight_decay if role.decays else 0.0,
                epsilon_factor=by_size.epsilon,
            ),
        )
        group.parameters[name], group.roles[name] = parameter, role
        if by_size.part_rates:
            group.part_rates[name] = by_size.part_rates
    return list(groups.values())
