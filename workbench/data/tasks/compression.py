"""Compression: one of MAD's six tasks (arXiv 2403.17844, section 3.1 and appendix B).

Random symbols, then a compression symbol. Every symbol is read back from the hidden state of that last token alone,
through the readout of :mod:`workbench.model.readout`: models of this task have ``model.readout: summary``.

    tokens    a c b b a $        targets   a c b b a –
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources
from workbench.data.tasks.in_context_recall import MAD_ROWS, MAD_TRAINING


@sources.register
class Compression(SyntheticTask):
    """Reads a sequence back from one hidden state."""

    class Config(SyntheticConfig):
        """Compression into one hidden state."""

        kind: Literal["compression"] = "compression"
        lengths: Annotated[Lengths, Field(min_length=1)] = (32,)
        vocabulary: Annotated[int, Field(ge=3)] = 16
        """Symbols, with the compression symbol."""

        readout = "summary"
        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (32,), "vocabulary": 16},
            {"vocabulary": (32, 64, 128), "lengths": (64, 128, 256), "training_rows": MAD_ROWS},
            MAD_TRAINING,
        )

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / (self.vocabulary - 1)

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        tokens = generator.integers(self.config.vocabulary - 1, size=length)
        tokens[-1] = self.config.vocabulary - 1
        labels = {"length": length, "vocabulary": self.config.vocabulary}
        return Example(tokens, targets_at(length, np.arange(length - 1), tokens[:-1]), labels)
