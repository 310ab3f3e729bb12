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
    config: ModelConfig,
    family: Callable[[ParameterRole], UpdateFamily] = lambda role: "sign",
    outputs: Callable[[ParameterRole], tuple[int, ...]] = lambda role: (),
    rate_factor: Callable[[ParameterRole], float] = lambda role: 1.0,
) -> pl.DataFrame:
    """One row per parameter, those of equal layers together.

    Columns: parameter (``*`` for the numbers of layers), layers (how many), role, shape, fan_in and base_fan_in (null
    for parameters without one), initial, learning_rate, weight_decay, epsilon: factors relative to the base model;
    initial is that of the standard deviation which the module sets by itself; the decay of parameters without is null.
    part_rates: factors of the learning rate of a parameter's parts; null where they are 1.

    Args:
        config: the model.
        family, outputs: of the optimiser's updates, as of :func:`workbench.model.parametrisation.parameter_factors`.
        rate_factor: of the optimiser, beside that of the parametrisation (:class:`workbench.optimisers.Optimiser`).

    Raises:
        ConfigError: when the parametrisation refuses the model.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    roles, factors = parameter_roles(model), parameter_factors(model, family, outputs)
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
            factor.learning_rate * rate_factor(role),
            factor.weight_decay if role.decays else None,
            factor.epsilon,
            factor.part_rates or None,
        )
        counts[row] = counts.get(row, 0) + 1
    names = ["parameter", "role", "shape", "fan_in", "base_fan_in", "initial", "learning_rate", "weight_decay"]
    schema: dict[str, Any] = dict.fromkeys([*names, "epsilon"]) | {"part_rates": pl.List(pl.Float64), "layers": None}
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
