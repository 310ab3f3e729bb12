"""The contract of a weight transform, and how a sequence of them is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from workbench.config import Config, require
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import Optimiser
from workbench.registry import Registry

Weights: TypeAlias = Mapping[str, Tensor]
"""Parameters and buffers by their names in ``LanguageModel.state_dict()``."""
OptimiserState: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Parameter name -> the optimiser's entries for it, such as ``exp_avg`` and ``step`` of AdamW."""


class TransformConfig(Config):
    """Base of a transform's configuration. ``kind`` is the registered name."""

    kind: str
    every: Annotated[int | None, Field(ge=1)] = None
    """Optimiser steps between applications in training. Default: once, before the first step."""

    @property
    def needs_optimiser(self) -> bool:
        """Whether the transform is defined by what it does to an optimiser's state: it is one of training, not of a
        start from exported weights, which have none."""
        return False


class Transform(ABC):
    """A map from the weights of a source model, and the optimiser's state for them, to those of a target model.

    Built as ``cls(config, optimiser)``. A transform is one file with one decorated class; nothing else lists its name.

    Names may be missing from the result. A tensor missing from the weights keeps the target's initial values; only
    transforms with :attr:`complete` false may leave any out. A parameter missing from the optimiser state gets a fresh
    state.
    """

    Config: ClassVar[type[TransformConfig]]
    complete: ClassVar[bool] = True
    """Whether the result has every tensor of the target. Where it has not, the transform must be the last one."""
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Cases for the conformance suite: ``source`` and ``target`` (fields of a ModelConfig, ``target`` defaults to
    ``source``) and ``config`` (fields of this transform)."""
    variant_configs: ClassVar[tuple[dict[str, Any], ...]] = ()
    """Fields of this transform with which the suite tries it on every registered variant: it keeps the function of the
    model to :meth:`example_target`, or refuses with the setting that is in the way."""

    def __init__(self, config: Any, optimiser: Optimiser | None = None):
        self.config = config
        self.optimiser = optimiser
        """The run's optimiser, which knows how its state follows a parameter. None where no state is transformed."""

    @abstractmethod
    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        """Weights and optimiser state for ``target``. The arguments are not modified; tensors may be shared with them.

        Args:
            weights: all of ``source``, on any device.
            optimiser_state: for the trainable parameters of ``source``, or None where there is none, as in an exported
                folder; then so is the result's.
            source: model of ``weights``.
            target: model of the result; :meth:`check` has accepted the pair.
        """

    def target(self, source: ModelConfig, final: ModelConfig) -> ModelConfig:
        """Model of the result.

        Args:
            source: model of the weights.
            final: model at which the whole sequence must arrive. Default of this method: ``source``.
        """
        return source

    @classmethod
    def example_target(cls, source: ModelConfig) -> ModelConfig:
        """A model that this transform may make of ``source``, for the conformance suite. Default: ``source``."""
        return source

    @abstractmethod
    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        """Check that the transform is possible, before anything is computed.

        Raises:
            ConfigError: naming the obstacle, the setting of either model that is in the way.
        """

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        """Whether both models compute the same logits, up to rounding, after the transform. Default: no claim."""
        return False

    def compensated(self, source: ModelConfig) -> frozenset[str]:
        """Parameters of which the optimiser's state gets an entry of scales, a number for each of theirs
        (:mod:`workbench.training.compensation`). Default: none."""
        return frozenset()


transforms: Registry[type[Transform]] = Registry("transform", "workbench.transforms")

TransformSetting = Annotated[SerializeAsAny[TransformConfig], BeforeValidator(transforms.parse)]
"""Type of a field for the Config of any registered transform."""


def build_transforms(configs: Sequence[TransformConfig], optimiser: Optimiser | None = None) -> list[Transform]:
    """The transforms of these configurations, in order.

    Args:
        optimiser: of the run, where its state is transformed too.
    """
    return [transforms[config.kind](config, optimiser) for config in configs]


def require_single_application(config: TransformConfig, index: int, why: str) -> None:
    """Refuse ``every`` of the transform at ``index`` of ``transforms``, outside of training.

    Args:
        why: the reason, after "nothing: ".

    Raises:
        ConfigError: if the transform is to be repeated.
    """
    require(
        config.every is None,
        f"transforms[{index}].every",
        got=config.every,
        expected=f"nothing: {why}",
        do="training.transforms are applied every so many steps.",
    )


def check_transforms(sequence: Sequence[Transform], source: ModelConfig, final: ModelConfig) -> None:
    """Check that ``sequence`` leads from ``source`` to ``final`` and that every transform accepts its pair of models.

    Raises:
        ConfigError: naming the obstacle.
    """
    for index, transform in enumerate(sequence):
        require(
            transform.complete or index == len(sequence) - 1,
            f"transforms[{index}]",
            got=f"{transform.config.kind!r} before others, though it may leave out weights",
            expected="the last transform",
        )
        target = transform.target(source, final)
        transform.check(source, target)
        source = target
    differences = source.diff(final)
    require(
        not differences,
        "transforms",
        got=f"a model with other settings: {', '.join(sorted(differences))}",
        expected="the model of the run",
        do="End with {kind: start_from}.",
    )


def apply_transforms(
    sequence: Sequence[Transform],
    weights: Weights,
    optimiser_state: OptimiserState | None,
    source: ModelConfig,
    final: ModelConfig,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
    """Weights and optimiser state of ``final`` out of those of ``source``, one transform after the other.

    Raises:
        ConfigError: as :func:`check_transforms`, before anything is computed.
    """
    check_transforms(sequence, source, final)
    new_weights = dict(weights)
    new_state = None if optimiser_state is None else {name: dict(entry) for name, entry in optimiser_state.items()}
    for transform in sequence:
        target = transform.target(source, final)
        with torch.no_grad():
            new_weights, new_state = transform(new_weights, new_state, source, target)
        source = target
    return new_weights, new_state


def state_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's state dict, in its order. Allocates nothing."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in LanguageModel(config).state_dict().items()}
