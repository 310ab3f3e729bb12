"""Parametrisations, one file per parametrisation: how settings tuned on a small model transfer to a large one.

    model: {width: 1024, parametrisation: {kind: complete_p, base: {width: 256, depth: 6}}}

The rules are data over the roles of parameters; :mod:`workbench.model.parametrisation` applies them to a model.
"""

from workbench.parametrisations.base import (
    MATRICES,
    Parametrisation,
    ParametrisationConfig,
    ParametrisationSetting,
    Power,
    Rule,
    Shape,
    UpdateFamily,
    learning_rate_factor,
    parametrisations,
    rules,
    update_effect,
)

__all__ = [
    "MATRICES",
    "Parametrisation",
    "ParametrisationConfig",
    "ParametrisationSetting",
    "Power",
    "Rule",
    "Shape",
    "UpdateFamily",
    "learning_rate_factor",
    "parametrisations",
    "rules",
    "update_effect",
]
