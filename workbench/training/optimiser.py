"""The optimiser of a run: its parameter groups, and the size of what training keeps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workbench.model import LanguageModel
from workbench.optimisers import Optimiser, ParameterGroup, optimisers, parameter_groups
from workbench.training.config import RunConfig, TrainingConfig
from workbench.training.roll_back import RETAINED_COPIES
from workbench.transforms import build_transforms


def optimiser_of(training: TrainingConfig) -> Optimiser:
    """What a run's optimiser states about itself."""
    return optimisers[training.optimiser.kind](training.optimiser)


def groups_of(model: nn.Module, training: TrainingConfig) -> list[ParameterGroup]:
    """Parameter groups of ``model`` with the learning rates and weight decay of a run."""
    optimiser = optimiser_of(training)
    return parameter_groups(
        model,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_factors=training.lr_factors,
        family=optimiser.update_family,
        outputs=optimiser.update_outputs,
    )


def build_optimiser(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser of the model's parameters. Every group has an ``initial_lr``, its peak learning rate."""
    optimiser = optimiser_of(training).build(groups_of(model, training))
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def training_state_bytes(config: RunConfig) -> int:
    """Bytes that training keeps beside weights and gradients, in memory and in a checkpoint: the optimiser's state, the
    moving average of the weights, the scales of compensated parameters, and the copies to which guards roll back.
    Allocates nothing."""
    training = config.training
    with torch.device("meta"):
        model = LanguageModel(config.model)
    optimiser = optimiser_of(training)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = sum(optimiser.state_bytes(group) for group in groups_of(model, training))
    if training.ema is not None:
        kept += _bytes(trained.values())
    transforms = build_transforms(training.transforms, optimiser)
    compensated = {name for transform in transforms for name in transform.compensated(config.model)}
    kept += _bytes(trained[name] for name in compensated & trained.keys())
    copies = RETAINED_COPIES if training.rolls_back else 0
    return kept + copies * (kept + _bytes(model.state_dict().values()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
