"""Selective copying: one of MAD's six tasks (arXiv 2403.17844, section 3.1 and appendix B).

Content symbols are scattered among blanks; behind a copy symbol the model writes them in order, one at each of as many
blanks, all at once (no symbol is fed back):

    tokens    – a – – b – c – > – – –        targets at the last three blanks: a b c

In the published generator the last content symbol always precedes the copy symbol immediately; here the places of all
of them are uniform (ours).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, Published, SplitName, sources
from workbench.data.tasks.in_context_recall import MAD_ROWS, MAD_TRAINING


@sources.register
class SelectiveCopying(SyntheticTask):
    """Copies the symbols that are no blanks."""

    class Config(SyntheticConfig):
        """Selective copying."""

        kind: Literal["selective_copying"] = "selective_copying"
        lengths: Annotated[Lengths, Field(min_length=1)] = (256,)
        vocabulary: Annotated[int, Field(ge=3)] = 16
        """Symbols: content, the blank and the copy symbol."""
        copied: Annotated[int, Field(ge=1)] = 16
        """Content symbols of an example."""

        published = Published(
            "MAD, arXiv 2403.17844, appendix B.1",
            {"lengths": (256,), "vocabulary": 16, "copied": 16},
            {
                "vocabulary": (32, 64, 128),
                "lengths": (512, 1024),
                "copied": (32, 64, 96),
                "training_rows": MAD_ROWS,
            },
            MAD_TRAINING,
        )

        def model_post_init(self, _context: object) -> None:
            smallest = 2 * self.copied + 1
            self.require_lengths(lambda length: length >= smallest, f"at least {smallest}: the symbols twice, and one")

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / (self.vocabulary - 2)

        def target_share(self, context: int) -> float:
            return sum(self.copied / length for length in self.lengths) / len(self.lengths)

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        n, blank = self.config.copied, self.config.vocabulary - 2
        content = generator.integers(blank, size=n)
        tokens = np.full(length, blank, dtype=np.int64)
        tokens[np.sort(generator.choice(length - n - 1, n, replace=False))] = content
        tokens[length - n - 1] = blank + 1
        labels = {"length": length, "copied": n, "vocabulary": self.config.vocabulary}
        return Example(tokens, targets_at(length, np.arange(length - n, length), content), labels)
