"""Memorisation: one of MAD's six tasks (arXiv 2403.17844, section 3.1 and appendix B).

A map from keys to values that is the same in every example, training and evaluation alike, so that it can only be in
the weights; the value is asked for at an insert symbol behind each key and never shown:

    tokens    a ? c ? b ? a ?        targets   – 7 – 3 – 5 – 7

The map is drawn from the seed of the task. Rows of evaluation do not occur in training; the facts do.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources
from workbench.data.tasks.in_context_recall import MAD_TRAINING
from workbench.seeding import counter_generator

MAP_STREAM = 4
"""Random stream of the map, behind those of the splits."""


@sources.register
class Memorisation(SyntheticTask):
    """Recalls facts that are in no example."""

    class Config(SyntheticConfig):
        """Memorisation of a map."""

        kind: Literal["memorisation"] = "memorisation"
        lengths: Annotated[Lengths, Field(min_length=1)] = (32,)
        vocabulary: Annotated[int, Field(ge=5)] = 256
        """Symbols: keys (half of all but one), values, and the insert symbol."""

        measured_only = SyntheticConfig.measured_only - {"seed"}  # the map depends on it
        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (32,), "vocabulary": 256, "training_rows": 256},
            {"vocabulary": (512, 1024, 2048, 4096, 8192)},
            MAD_TRAINING.replace("12,800", "256"),
        )

        def model_post_init(self, _context: object) -> None:
            self.require_lengths(lambda length: length % 2 == 0, "an even number: two tokens a key")

        @property
        def keys(self) -> int:
            """Number of key symbols; the other symbols but one are values."""
            return (self.vocabulary - 1) // 2

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / self.keys  # as many values are in use as there are keys

        def target_share(self, context: int) -> float:
            return 0.5

    @cached_property
    def values(self) -> np.ndarray:
        """(keys,) the value of each key, all different."""
        keys, symbols = self.config.keys, self.config.vocabulary - 1
        return keys + counter_generator(self.config.seed, MAP_STREAM).permutation(symbols - keys)[:keys]

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        drawn = generator.integers(self.config.keys, size=length // 2)
        tokens = np.full(length, self.config.vocabulary - 1, dtype=np.int64)
        tokens[::2] = drawn
        labels = {"length": length, "vocabulary": self.config.vocabulary}
        return Example(tokens, targets_at(length, np.arange(1, length, 2), self.values[drawn]), labels)
