"""A parametrisation applied to a model: factors of every parameter's settings, and multipliers of the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.config import require
from workbench.contract import ParameterRole, Role
from workbench.layers import ScaledScores
from workbench.model.config import ModelConfig
from workbench.model.roles import parameter_roles
from workbench.parametrisations import MATRICES, Parametrisation, Shape, UpdateFamily, learning_rate_factor
from workbench.parametrisations.standard import MODULE_RULES

__all__ = ["Multipliers", "ParameterFactors", "apply_multipliers", "multipliers", "parameter_factors"]


@dataclass(frozen=True)
class Multipliers:
    """Constants of the function that a parametrisation sets. All are 1 in the standard one."""

    input: float = 1.0
    """Of the embedding's output."""
    branch: float = 1.0
    """Of what mixers, feed-forwards and shortcuts add to the residual stream."""
    logits: float = 1.0
    """Of the scores before softmax."""

    @property
    def are_one(self) -> bool:
        return self == Multipliers()


@dataclass(frozen=True)
class ParameterFactors:
    """Factors of one parameter's settings relative to those of the base model."""

    fan_in: int | None = None
    """None for parameters without one, and for the taps of a convolution, which follow the model's width."""
    base_fan_in: int | None = None
    initial: float = 1.0
    """Of the initial values that its module sets."""
    learning_rate: float = 1.0
    part_rates: tuple[float, ...] = ()
    """Factors of ``learning_rate`` for each entry of the role's ``parts``; empty where all are 1."""
    weight_decay: float = 1.0
    epsilon: float = 1.0


def multipliers(config: ModelConfig) -> Multipliers:
    """The multipliers of a model."""
    parametrisation, base = config.parametrised, config.base_model
    width_ratio, depth_ratio = config.width / base.width, config.depth / base.depth
    return Multipliers(
        input=parametrisation.input_multiplier,
        branch=parametrisation.branches.at(width_ratio, depth_ratio),
        logits=parametrisation.output_multiplier * parametrisation.logits.at(width_ratio, depth_ratio),
    )


def apply_multipliers(model: Any) -> None:
    """Set the multipliers of ``model`` and its modules.

    Raises:
        ConfigError: when a component's settings follow the size in a way that the rules do not cover.
    """
    model.multipliers = multipliers(model.config)
    if model.config.parametrisation.kind == "standard":
        return
    base = _base_of(model)
    model.base_shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    model.base_roles = parameter_roles(base)
    base_modules = dict(base.named_modules())
    for path, module in model.named_modules():
        other: Any = base_modules[path]
        _check_constants(path, module, other)
        if hasattr(module, "branch_multiplier"):
            module.branch_multiplier = model.multipliers.branch
        if isinstance(module, ScaledScores):
            ratio = module.score_channels / other.score_channels
            module.score_multiplier = model.config.parametrised.scores.at(ratio)


def _base_of(model: Any) -> nn.Module:
    """The base model with the depth of ``model``, so that both have the same parameters, on the meta device."""
    config: ModelConfig = model.config
    with torch.device("meta"):
        base: nn.Module = type(model)(config.base_model_at(config.depth))
    missing = sorted({name for name, _ in model.named_parameters()} ^ {name for name, _ in base.named_parameters()})
    require(
        not missing,
        "model.parametrisation.base",
        got=f"{missing[0] if missing else ''} in one of the two models",
        expected="a base model with the same parameters, in other sizes",
    )
    return base


def _check_constants(path: str, module: Any, base: Any) -> None:
    constants: Callable[[], Mapping[str, float]] = getattr(module, "transfer_constants", dict)
    base_constants: Mapping[str, float] = getattr(base, "transfer_constants", dict)()
    for setting, value in constants().items():
        require(
            base_constants.get(setting) == value,
            f"model.parametrisation: {path} ({type(module).__name__}), setting {setting}",
            got=f"{value:g} here, {base_constants.get(setting, math.nan):g} in the base model",
            expected="one number in both, as no rule follows it",
            do=f"Change {setting}, or give the base model a size with which it is equal.",
        )


def parameter_factors(
    model: nn.Module,
    family: Callable[[ParameterRole], UpdateFamily] = lambda role: "sign",
    outputs: Callable[[ParameterRole], tuple[int, ...]] = lambda role: (),
) -> dict[str, ParameterFactors]:
    """Full parameter name -> factors, in the order of ``model.named_parameters()``.

    Args:
        model: a language model, on any device; the factors of any other module are 1.
        family: of the updates of parameters of a role.
        outputs: output channels of what an update treats as one matrix, for each entry of a role's ``parts``; empty
            where that is the whole parameter.

    Raises:
        TypeError: naming a parameter without a role.
        ConfigError: when the parametrisation has no rule for a family.
    """
    config = getattr(model, "config", None)
    roles = parameter_roles(model)
    if not isinstance(config, ModelConfig) or config.parametrisation.kind == "standard":
        return {name: ParameterFactors() for name in roles}
    base_shapes: Mapping[str, tuple[int, ...]] = model.base_shapes  # type: ignore[assignment]
    base_roles: Mapping[str, ParameterRole] = model.base_roles  # type: ignore[assignment]
    return {
        name: _factors(
            config,
            name,
            roles[name],
            tuple(parameter.shape),
            base_shapes[name],
            family(roles[name]),
            list(zip(outputs(roles[name]), outputs(base_roles[name]), strict=True)),
        )
        for name, parameter in model.named_parameters()
    }


def _factors(
    config: ModelConfig,
    name: str,
    role: ParameterRole,
    shape: tuple[int, ...],
    base_shape: tuple[int, ...],
    family: UpdateFamily,
    outputs: Sequence[tuple[int, int]],
) -> ParameterFactors:
    parametrisation: Parametrisation = config.parametrised
    rule, modules_rule = parametrisation.rules[role.role], MODULE_RULES[role.role]
    is_in_branch = name.startswith(("blocks.", "shortcuts.", "mtp.block."))
    depth_ratio = config.depth / config.base_model.depth
    own_depth_ratio = depth_ratio if is_in_branch else 1.0
    fans, base_fans = _fans(role, shape, config.width), _fans(role, base_shape, config.base_model.width)
    ratio = fans.fan_in / base_fans.fan_in
    variance = rule.variance.at(ratio) / modules_rule.variance.at(ratio)
    if role.writes_residual:
        variance *= depth_ratio ** (parametrisation.residual_variance + 1)  # modules: by 1/depth

    def rates(depth: float) -> list[float]:
        """Of every matrix of an update."""
        shapes = [(Shape(fans.fan_in, out), Shape(base_fans.fan_in, base_out)) for out, base_out in outputs]
        return [
            learning_rate_factor(parametrisation, role.role, family, *pair, depth)
            for pair in shapes or [(fans, base_fans)]
        ]

    learning_rate, *_ = by_part = rates(own_depth_ratio)
    differ = any(not math.isclose(rate, learning_rate) for rate in by_part)
    weight_decay = 1.0
    if parametrisation.keeps_decay and role.role in MATRICES:
        weight_decay = 1 / rates(1.0)[0]
    return ParameterFactors(
        fan_in=fans.fan_in if _sums(role) else None,
        base_fan_in=base_fans.fan_in if _sums(role) else None,
        initial=math.sqrt(variance),
        learning_rate=learning_rate,
        part_rates=tuple(rate / learning_rate for rate in by_part) if differ else (),
        weight_decay=weight_decay,
        epsilon=rule.epsilon.at(config.width / config.base_model.width, own_depth_ratio),
    )


def _sums(role: ParameterRole) -> bool:
    """Whether the parameter sums over input channels, whose number may follow the width. The taps of a convolution do
    not."""
    return role.fan_in is not None and role.role != Role.CONVOLUTION


def _fans(role: ParameterRole, shape: tuple[int, ...], width: int) -> Shape:
    """Fan-in and fan-out; of a parameter that sums over no channels the model's width for both."""
    if not _sums(role):
        return Shape(width, width)
    assert role.fan_in is not None
    return Shape(shape[role.fan_in], shape[role.fan_out])
