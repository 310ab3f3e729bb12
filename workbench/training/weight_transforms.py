"""Weight transforms during training: ``training.transforms``, applied between optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.optimiser import optimiser_of
from workbench.training.step import TrainStep
from workbench.transforms import Transform, apply_transforms, build_transforms


class ScheduledTransforms:
    """Changes weights and optimiser state in place, on the steps that the configuration sets.

    Every rank computes the transform on full tensors, so that a transform need not handle sharded ones.

    Args:
        config: the run.
        train_step: its model and optimiser.
    """

    def __init__(self, config: RunConfig, train_step: TrainStep):
        self.model_config, self.steps = config.model, config.training.steps
        self.train_step = train_step
        self.transforms = build_transforms(config.training.transforms, optimiser_of(config.training))

    def __call__(self, step: int) -> None:
        """Apply the transforms that are due after ``step``, in order; 0 is before the first step.

        After the last step none is due: the result of a run is what was trained. A checkpoint of ``step`` is written
        afterwards, so that a resumed run does not apply them again.
        """
        self.apply([transform for transform in self.transforms if self._is_due(transform.config.every, step)])

    def apply(self, transforms: Sequence[Transform]) -> None:
        """Apply transforms of the run, in order."""
        if not transforms:
            return
        weights, state = full_weights_and_state(self.train_step)
        new_weights, new_state = apply_transforms(transforms, weights, state, self.model_config, self.model_config)
        assert new_state is not None
        self._write_weights(weights, new_weights)
        write_state(self.train_step, state, new_state)

    def _is_due(self, every: int | None, step: int) -> bool:
        if every is None:
            return step == 0
        return 0 < step < self.steps and step % every == 0

    @torch.no_grad()
    def _write_weights(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        # copies, in case a new tensor shares memory with an old one
        changed = {name: tensor.clone() for name, tensor in new.items() if tensor is not old[name]}
        tensors = self.train_step.model.state_dict()
        for name, tensor in changed.items():
            tensors[name].copy_(parallel.sharded_like(tensor, tensors[name]))


def full_weights_and_state(train_step: TrainStep) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Weights and optimiser state by parameter name, assembled on every rank where they are sharded."""
    model, optimiser = train_step.model, train_step.optimiser
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    weights = {name: parallel.full_tensor(tensor) for name, tensor in model.state_dict().items()}
    state = {
        names[parameter]: {key: _full(value) for key, value in entry.items()}
        for parameter, entry in optimiser.state.items()
    }
    return weights, state


def write_state(train_step: TrainStep, old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> None:
    """Set the optimiser's state.

    Args:
        train_step: its model and optimiser.
        old: the state that it has, from :func:`full_weights_and_state`; entries that ``new`` shares with it stay.
        new: by parameter name. Parameters without an entry start afresh.
    """
    for name, parameter in train_step.model.named_parameters():
        if name not in new:
            train_step.optimiser.state.pop(parameter, None)
            continue
        sharded, before = train_step.optimiser.state[parameter], old.get(name, {})
        train_step.optimiser.state[parameter] = {
            key: sharded[key] if key in before and value is before[key] else _like(value, parameter)
            for key, value in new[name].items()
        }


def _full(value: Any) -> Any:
    return parallel.full_tensor(value) if isinstance(value, Tensor) else value


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """An entry of the optimiser's state, placed as ``parameter`` is where it has its shape."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone().to(parameter.device)
    return parallel.sharded_like(copy, parameter) if copy.shape == parameter.shape else copy
