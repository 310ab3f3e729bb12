"""Induction heads (arXiv 2209.11895; the length-extrapolating form of Mamba, arXiv 2312.00752, section 4.1.2).

Random symbols, among them one mark; at the end the mark again, after which the model predicts the symbol that followed
it the first time:

    tokens    c a b * d a c … b *        target at the last position: d
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources


@sources.register
class InductionHeads(SyntheticTask):
    """Predicts what followed the mark."""

    class Config(SyntheticConfig):
        """Induction heads."""

        kind: Literal["induction_heads"] = "induction_heads"
        lengths: Annotated[Lengths, Field(min_length=1)] = (256,)
        vocabulary: Annotated[int, Field(ge=3)] = 16
        """Symbols, with the mark."""

        published = Published(
            "Mamba, arXiv 2312.00752, section 4.1.2 and appendix E.1",
            {"lengths": (256,), "vocabulary": 16},
            {"measured_lengths": tuple(2**power for power in range(6, 21))},
            "fresh rows, batch 8, at two layers and width 64",
        )

        def model_post_init(self, _context: object) -> None:
            self.require_lengths(lambda length: length >= 3, "at least 3 tokens")

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / (self.vocabulary - 1)

        def target_share(self, context: int) -> float:
            return sum(context // length for length in self.lengths) / len(self.lengths) / context

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        mark = self.config.vocabulary - 1
        tokens = generator.integers(mark, size=length)
        place = int(generator.integers(length - 2))
        tokens[[place, length - 1]] = mark
        labels = {"length": length, "vocabulary": self.config.vocabulary}
        return Example(tokens, targets_at(length, length - 1, tokens[place + 1]), labels)
