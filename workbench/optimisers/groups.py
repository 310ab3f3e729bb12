"""Parameters of a model in groups of one learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from workbench.config import nearest, require
from workbench.contract import ParameterRole
from workbench.model.roles import parameter_roles


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same learning rate and weight decay."""

    lr: float
    """Peak learning rate."""
    weight_decay: float
    """Decoupled weight decay: a step of learning rate ``lr`` multiplies the parameters by ``1 - lr · weight_decay``."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """By full name, in the order of the model."""
    roles: dict[str, ParameterRole] = field(default_factory=dict)
    """The role of each of them."""

    def settings(self, **more: Any) -> dict[str, Any]:
        """A parameter group of a :class:`torch.optim.Optimizer`, with the optimiser's further settings."""
        return {"params": list(self.parameters.values()), "lr": self.lr, "weight_decay": self.weight_decay, **more}


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, lr_factors: Mapping[str, float]
) -> list[ParameterGroup]:
    """Groups of all parameters of ``model``.

    Whether a parameter decays is a property of its role (:class:`workbench.contract.ParameterRole`).

    Args:
        model: on any device, also meta.
        learning_rate: peak learning rate.
        weight_decay: of the parameters that decay.
        lr_factors: learning-rate factor by shell pattern over full parameter names; matching factors multiply.

    Raises:
        ConfigError: when a pattern of ``lr_factors`` matches no parameter.
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
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        factor = math.prod((value for pattern, value in lr_factors.items() if fnmatch(name, pattern)), start=1.0)
        group = groups.setdefault(
            (role.decays, factor),
            ParameterGroup(lr=learning_rate * factor, weight_decay=weight_decay if role.decays else 0.0),
        )
        group.parameters[name], group.roles[name] = parameter, role
    return list(groups.values())
