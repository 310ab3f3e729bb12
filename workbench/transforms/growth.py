"""Growth: a run whose first part trains a smaller model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from workbench.config import Config, ConfigError, Problem, deep_merge, expand_dotted, require
from workbench.model import ModelConfig
from workbench.transforms.base import (
    TransformSetting,
    build_transforms,
    check_transforms,
    require_single_application,
)

GROWING = "Choose stack, which copies layers, or widen, which repeats channels."
"""What may lead from a small model to a large one."""


class GrowthConfig(Config):
    """A smaller model that a run trains first, and what turns it into the run's model.

        growth: {model: {depth: 2}, at: 0.2, transforms: [{kind: stack, order: whole}]}

    One run is the whole training: the order of the data and the learning-rate schedule continue, and budgets count the
    FLOPs of both models. Every seed trains a small model of its own.
    """

    model: dict[str, Any] = Field(min_length=1)
    """Fields of the small model that differ from the run's: {depth: 2}."""
    at: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the run's steps that the small model trains, rounded to at least one step of either model."""
    transforms: tuple[TransformSetting, ...] = Field(default=({"kind": "stack"},), validate_default=True, min_length=1)
    """What turns the small model's weights and optimiser state into the large model's, in order."""
    rewarm: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the run's steps after growth in which the learning rate rises linearly from zero to its schedule. 0
    continues the schedule."""

    def model_post_init(self, _context: Any) -> None:
        for index, transform in enumerate(self.transforms):
            require_single_application(transform, index, "a model grows once")

    def small(self, large: ModelConfig) -> ModelConfig:
        """The model that is trained first.

        Raises:
            ConfigError: with paths below ``growth.model``, when there is no such model.
        """
        try:
            return ModelConfig.parse(deep_merge(large.plain(), expand_dotted(self.model)))
        except ConfigError as error:
            raise error.under("growth.model") from None

    def check(self, large: ModelConfig) -> None:
        """Check that the transforms lead from the small model to ``large``.

        Raises:
            ConfigError: naming the obstacle, with paths of the run: ``model`` is the large one.
        """
        sequence = build_transforms(self.transforms)
        require(
            all(transform.complete for transform in sequence),
            "growth.transforms",
            got=", ".join(transform.config.kind for transform in sequence),
            expected="transforms that give the large model all its weights",
            do=GROWING,
        )
        small = self.small(large)
        try:
            check_transforms(sequence, small, large)
        except ConfigError as error:
            raise ConfigError([_of_run(problem) for problem in error.problems]) from None

    def step(self, steps: int) -> int:
        """Steps of a run of ``steps`` that train the small model."""
        return min(max(1, round(self.at * steps)), steps - 1)

    def rising_steps(self, steps: int) -> int:
        """Steps of a run of ``steps`` in which the learning rate rises after growth."""
        return math.ceil(self.rewarm * steps)

    def rate_factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate of step ``step`` (from 0) of a run of ``steps``."""
        since, rising = step - self.step(steps), self.rising_steps(steps)
        return (since + 1) / rising if 0 <= since < rising else 1.0


def _of_run(problem: Problem) -> Problem:
    """A problem of a sequence of transforms, with its path in the run."""
    if problem.path.startswith("model."):
        return problem
    do = GROWING if problem.path == "transforms" else problem.do
    return replace(problem, path=f"growth.{problem.path}", do=do)
