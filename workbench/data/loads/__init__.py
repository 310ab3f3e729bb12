"""Load models, one file per model: what a micro-batch costs, in a unit of the model's choice.

Batch plans balance loads. A model knows a micro-batch by the lengths of its documents, and by the blocks per query that
the layers are expected to attend.

Legend: L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
from pydantic import BeforeValidator, SerializeAsAny

from workbench.config import Config
from workbench.registry import Registry

__all__ = ["LoadConfig", "LoadModel", "LoadSetting", "RunFacts", "load_models"]


@dataclass(frozen=True)
class RunFacts:
    """What plans and load models may know of the run beside its data."""

    flops: Callable[[int], float]
    """Tokens of a document -> training FLOPs of the document."""
    budgets: tuple[float | None, ...]
    """(L,) configured blocks per query of every layer; None in layers that select no blocks."""
    wait: Literal["step", "micro_batch"] = "step"
    """Where ranks wait for each other: once per step, or in every micro-batch."""


class LoadConfig(Config):
    """Base of a load model's configuration. ``kind`` is the registered name."""

    kind: str

    def pinned(self) -> Self:
        """With the fingerprint of every file that it names, so that its identity needs none."""
        return self


class LoadModel(ABC):
    """What a micro-batch costs. Built as ``cls(config, run)``.

    Args:
        config: an instance of ``cls.Config``.
        run: facts about the run.
    """

    Config: ClassVar[type[LoadConfig]]
    knows_budgets: ClassVar[bool] = False
    """Whether the load depends on blocks per query."""

    def __init__(self, config: Any, run: RunFacts):
        self.config, self.run = config, run

    @abstractmethod
    def load(self, documents: np.ndarray, budgets: Sequence[float | None]) -> float:
        """The load of a micro-batch.

        Args:
            documents: (documents,) tokens of each, the padding of a row as a document of its own.
            budgets: (L,) blocks per query of every layer; None in layers that select no blocks.
        """


load_models: Registry[type[LoadModel]] = Registry("load model", "workbench.data.loads")

LoadSetting: TypeAlias = Annotated[SerializeAsAny[LoadConfig], BeforeValidator(load_models.parse)]
"""A field of a configuration that holds any registered load model's Config."""
