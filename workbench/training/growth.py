"""A run's model replaced by a larger one between two steps."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric

from workbench.model import LanguageModel
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.optimiser import optimiser_of
from workbench.training.step import TrainStep, build_step
from workbench.training.weight_transforms import full_weights_and_state, write_state
from workbench.transforms import apply_transforms, build_transforms


def grow(small: TrainStep, config: RunConfig, fabric: Fabric) -> tuple[TrainStep, bool]:
    """The step of the run's model after the last step of its small model.

    Every rank computes the transforms on full tensors. Losses since the last logged line, rejected steps and what
    guards remember are carried over; counts of experts since the last diagnostics start again, as there are other
    layers. A window that guards may roll back ends before.

    Args:
        small: step of the small model.
        config: the run.
        fabric: that has set up ``small``.

    Returns:
        the step, and whether its model is compiled.
    """
    assert config.growth is not None
    small.end_window(config.phases[0].last, torch.zeros((), device=small.device), is_last=True)
    transforms = build_transforms(config.growth.transforms, optimiser_of(config.training))
    weights, state = full_weights_and_state(small)
    source = small.model.config
    new_weights, new_state = apply_transforms(transforms, weights, state, source, config.model)
    assert new_state is not None
    model = LanguageModel(config.model)
    model.load_state_dict(new_weights)  # copies: tensors may be shared
    large, compiled = build_step(model, config, fabric)
    write_state(large, {}, new_state)
    large.loss_window = small.loss_window
    large.health.load_state_dict(small.health.state_dict())
    parallel.barrier()
    return large, compiled
