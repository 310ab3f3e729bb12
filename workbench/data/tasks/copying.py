"""Copying a string (arXiv 2402.01032, section 3): the string, a separator, the string again.

    tokens    x1 x2 … xn | x1 … x(n−1)        targets   – – … – x1 x2 … xn, from the separator on

The symbols of the copy are fed back, as in generation with the right prefix. An answer is the whole string: it is right
when each of its symbols is, as published.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources


@sources.register
class Copying(SyntheticTask):
    """Copies a string, n symbols in 2 n tokens."""

    separate_answers = False

    class Config(SyntheticConfig):
        """Copying a string."""

        kind: Literal["copying"] = "copying"
        lengths: Annotated[Lengths, Field(min_length=1)] = (32, 64)
        vocabulary: Annotated[int, Field(ge=3)] = 27
        """Symbols: those of the string (published: 26 letters) and the separator."""

        published = Published(
            "Repeat After Me, arXiv 2402.01032, section 3",
            {"vocabulary": 27},
            {"measured_lengths": (100, 200, 400, 600, 800, 1000)},
            "strings of up to 300 symbols, fresh ones, at 12 layers and width 1024",
        )

        def model_post_init(self, _context: object) -> None:
            self.require_lengths(lambda length: length % 2 == 0, "an even number: a string of n symbols takes 2 n")

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - (self.vocabulary - 1.0) ** -(min(self.measured_lengths or self.lengths) // 2)

        def target_share(self, context: int) -> float:
            return 0.5

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        n, separator = length // 2, self.config.vocabulary - 1
        string = generator.integers(separator, size=n)
        tokens = np.concatenate((string, [separator], string[:-1])).astype(np.int64)
        labels = {"length": length, "vocabulary": self.config.vocabulary}
        return Example(tokens, targets_at(length, np.arange(n, length), string), labels)
