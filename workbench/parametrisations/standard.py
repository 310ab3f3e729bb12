"""The standard parametrisation: initial values by fan-in, one learning rate for all.

Its rules state what the modules of the workbench do by themselves; the other parametrisations are applied relative to
them, so that this one changes nothing.
"""

from __future__ import annotations

from typing import Literal

from workbench.contract import Role
from workbench.parametrisations.base import (
    Parametrisation,
    ParametrisationConfig,
    Power,
    Rule,
    parametrisations,
    rules,
)

BY_FAN_IN = Rule(variance=Power(-1))

MODULE_RULES = rules(
    Rule(),
    embedding=BY_FAN_IN,  # as if the width were its fan-in
    hidden=BY_FAN_IN,
    latent_down=BY_FAN_IN,
    latent_up=BY_FAN_IN,
    expert=BY_FAN_IN,
    router=BY_FAN_IN,
    head=BY_FAN_IN,
)
"""Initial variances that modules set."""


@parametrisations.register
class Standard(Parametrisation):
    """Variance by fan-in, constant learning rate."""

    class Config(ParametrisationConfig):
        """Standard parametrisation."""

        kind: Literal["standard"] = "standard"

    rules = MODULE_RULES


assert set(MODULE_RULES) == set(Role)
