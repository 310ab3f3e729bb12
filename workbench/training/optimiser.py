"""The optimiser of a run: its parameter groups, and the size of its state."""

from __future__ import annotations

import torch
from torch import nn

from workbench.model import LanguageModel
from workbench.optimisers import Optimiser, ParameterGroup, optimisers, parameter_groups
from workbench.training.config import RunConfig, TrainingConfig


def optimiser_of(training: TrainingConfig) -> Optimiser:
    """What a run's optimiser states about itself."""
    return optimisers[training.optimiser.kind](training.optimiser)


def groups_of(model: nn.Module, training: TrainingConfig) -> list[ParameterGroup]:
    """Parameter groups of ``model`` with the learning rates and weight decay of a run."""
    return parameter_groups(
        model,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_factors=training.lr_factors,
        family=optimisers[training.optimiser.kind](training.optimiser).update_family,
    )


def build_optimiser(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of the model's parameters. Every group has an ``initial_lr``, its peak learning rate."""
    optimiser = optimiser_of(training).build(groups_of(model, training))
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def optimiser_bytes(config: RunConfig) -> int:
    """Bytes of the optimiser's state, and of the moving average of the weights beside it. Allocates nothing."""
    with torch.device("meta"):
        model = LanguageModel(config.model)
    optimiser = optimiser_of(config.training)
    average = 0 if config.training.ema is None else sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return average + sum(optimiser.state_bytes(group) for group in groups_of(model, config.training))
