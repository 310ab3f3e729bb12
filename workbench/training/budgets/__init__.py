"""Budget tuners, one file per tuner: how many blocks the queries of each layer attend in each micro-batch.

A tuner is asked before every optimiser step, with the lengths of all documents of the global batch, and gives every
layer of every micro-batch a :class:`workbench.contract.Budget`. Whatever depends on the model's own scores is decided
by the budget, inside the layer and on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import BeforeValidator, SerializeAsAny

from workbench.config import Config
from workbench.contract import Budget
from workbench.model.config import ModelConfig
from workbench.registry import Registry

__all__ = ["BudgetConfig", "BudgetSetting", "BudgetTuner", "StepLengths", "budget_tuners"]

StepLengths: TypeAlias = Sequence[Sequence[np.ndarray]]
"""Tokens of every document of a step, padding as a document of its own: [rank][micro-batch] -> (documents,)."""


class BudgetConfig(Config):
    """Base of a budget tuner's configuration. ``kind`` is the registered name."""

    kind: str

    def check(self, model: ModelConfig) -> None:
        """Check what can be checked without files and devices.

        Raises:
            ConfigError: when the tuner does not fit the model.
        """

    def pinned(self) -> BudgetConfig:
        """With the fingerprint of every file that it names, so that its identity needs none."""
        return self


class BudgetTuner(ABC):
    """Budgets of every step of a run. Built as ``cls(run, device)`` from the run's configuration.

    A pure function of its arguments, so that all ranks agree without communicating and a resumed run repeats it.

    Raises:
        ConfigError: when it cannot tune this model on this device.
    """

    Config: ClassVar[type[BudgetConfig]]

    def __init__(self, run: Any, device: torch.device):
        self.run, self.config, self.device = run, run.training.budgets, device

    @abstractmethod
    def budgets(self, lengths: StepLengths, rank: int) -> list[list[Budget | None]]:
        """[micro-batch][layer] budgets of one rank; None leaves a layer at its configured number.

        Args:
            lengths: of the whole step, equal on every rank.
            rank: rank, from 0.
        """


budget_tuners: Registry[type[BudgetTuner]] = Registry("budget tuner", "workbench.training.budgets")

BudgetSetting: TypeAlias = Annotated[SerializeAsAny[BudgetConfig], BeforeValidator(budget_tuners.parse)]
"""A field of a configuration that holds any registered tuner's Config."""
