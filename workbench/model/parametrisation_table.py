"""The table of a model's parametrisation: what every kind of parameter gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import polars as pl
import torch

from workbench.contract import ParameterRole
from workbench.model.config import ModelConfig
from workbench.model.language_model import LanguageModel
from workbench.model.parametrisation import parameter_factors
from workbench.model.roles import parameter_roles
from workbench.parametrisations import MATRICES, UpdateFamily

__all__ = ["parametrisation_notes", "parametrisation_table"]


def parametrisation_table(
    config: ModelConfig, family: Callable[[ParameterRole], UpdateFamily] = lambda role: "sign"
) -> pl.DataFrame:
    """One row per parameter, those of equal layers together.

    Columns: parameter (``*`` for the numbers of layers), layers (how many), role, shape, fan_in and base_fan_in (null
    for parameters without one), initial, learning_rate, weight_decay, epsilon: factors relative to the base model;
    initial is that of the standard deviation which the module sets by itself; the decay of parameters without is null.

    Raises:
        ConfigError: when the parametrisation refuses the model.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    roles, factors = parameter_roles(model), parameter_factors(model, family)
    counts: dict[tuple[Any, ...], int] = {}
    for name, parameter in model.named_parameters():
        role, factor = roles[name], factors[name]
        row = (
            re.sub(r"\.\d+\.", ".*.", name),
            role.role.value + (", writes residual" if role.writes_residual else ""),
            "×".join(map(str, parameter.shape)),
            factor.fan_in,
            factor.base_fan_in,
            factor.initial,
            factor.learning_rate,
            factor.weight_decay if role.decays else None,
            factor.epsilon,
        )
        counts[row] = counts.get(row, 0) + 1
    names = ["parameter", "role", "shape", "fan_in", "base_fan_in", "initial", "learning_rate", "weight_decay"]
    schema = [*names, "epsilon", "layers"]
    return pl.DataFrame([(*row, count) for row, count in counts.items()], schema=schema, orient="row", strict=False)


def parametrisation_notes(config: ModelConfig) -> list[str]:
    """Base, multipliers, and what a reader should check, in sentences."""
    if config.parametrisation.kind == "standard":
        return ["standard: every factor and multiplier is 1."]
    with torch.device("meta"):
        model = LanguageModel(config)
    base, multipliers = config.base_model, model.multipliers
    notes = [
        f"{config.parametrisation.kind}: width {config.width} from {base.width} (s = {config.width / base.width:g}), "
        f"depth {config.depth} from {base.depth} (m = {config.depth / base.depth:g}).",
        f"Multipliers: embedding {multipliers.input:g}, residual branches {multipliers.branch:g}, "
        f"logits {multipliers.logits:g}.",
    ]
    roles, factors = parameter_roles(model), parameter_factors(model)
    constant = sorted(
        {
            re.sub(r"\.\d+\.", ".*.", name)
            for name, factor in factors.items()
            if roles[name].role in MATRICES and config.width != base.width and factor.fan_in == factor.base_fan_in
        }
    )
    if constant:
        notes.append(
            f"Fan-in as in the base model: {', '.join(constant)}. Where a size is set that should follow the width, "
            "give the base model its own in parametrisation.base."
        )
    return notes
