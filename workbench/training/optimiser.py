"""AdamW with decay groups and per-tensor learning-rate factors, and schedules that are functions of the step."""

from __future__ import annotations

import math
from fnmatch import fnmatch

import torch
from torch import nn

from workbench.config import ConfigError, nearest
from workbench.model.roles import parameter_roles
from workbench.training.config import TrainingConfig


def rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of step ``step`` (from 0) as a share of the peak."""
    steps = config.steps
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))
    if step < config.trunk_steps:
        return 1.0
    return config.final + (1 - config.final) * (steps - step) / max(1, steps - config.trunk_steps)


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, object]]:
    """Groups by (weight decay, learning-rate factor), each with its ``names``.

    Whether a parameter decays is a property of its role (:class:`workbench.contract.ParameterRole`).

    Raises:
        ConfigError: when a pattern of ``lr_factors`` matches no parameter.
    """
    groups: dict[tuple[bool, float], dict[str, object]] = {}
    matched: set[str] = set()
    names: list[str] = []
    roles = parameter_roles(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}".lstrip(".")
            names.append(full_name)
            decays = roles[full_name].decays
            factor = 1.0
            for pattern, value in config.lr_factors.items():
                if fnmatch(full_name, pattern):
                    matched.add(pattern)
                    factor *= value
            group = groups.setdefault(
                (decays, factor),
                {
                    "params": [],
                    "names": [],
                    "lr": config.learning_rate * factor,
                    "initial_lr": config.learning_rate * factor,
                    "weight_decay": config.weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)  # type: ignore[attr-defined]
            group["names"].append(full_name)  # type: ignore[attr-defined]
    for pattern in config.lr_factors:
        if pattern not in matched:
            raise ConfigError.at(
                f"training.lr_factors.{pattern}",
                got="a pattern that matches no parameter",
                expected="a shell pattern over parameter names",
                do=nearest(pattern, names),
            )
    return list(groups.values())


def build_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Fused AdamW over :func:`parameter_groups`."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in parameter_groups(model, config)]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.epsilon, fused=True)
