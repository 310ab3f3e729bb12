"""The standard parametrisation: initial values by fan-in, one learning rate for all.

Its rules state what the modules of the workbench do by themselves; the other parametrisations are applied relative to
them, so that this one changes nothing.
"""

from __future__ import annotations

from typing import Literal

from workbench.parametrisations.base import (
    Parametrisation,
    ParametrisationConfig,
    Power,
    Rule,
    parametrisations,
    rules,
)

VARIANCE = Rule(variance=Power(-1))

MODULE_RULES = rules(Rule(), VARIANCE, head=VARIANCE, embedding=VARIANCE)  # an embedding by the width
"""Initial variances that modules set."""


@parametrisations.register
class Standard(Parametrisation):
    """Variance by fan-in, constant learning rate."""

    class Config(ParametrisationConfig):
        """Standard parametrisation."""

        kind: Literal["standard"] = "standard"

    rules = MODULE_RULES
