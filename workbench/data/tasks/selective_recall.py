"""Selective recall (ours): the value of a key counts only where a mark says so.

An example is a list of triples flag–key–value. Each of P keys occurs once with the flag "counts" and, in all other
triples, with the flag "ignore" and another value; at the end every key is asked once. What is written must depend on
the flag, and an ignored triple must not overwrite an earlier one that counts:

    tokens    + a 7  · b 9  · a 3  + b 5  · a 8    b 5 a 7        targets at the last two keys: 5, 7

The number of ignored triples follows from the length, so that a longer example has the same answers among more
distractors. Tokens that fill no triple are "ignore" flags at the beginning.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.config import require
from workbench.data.synthetic import Lengths, SyntheticConfig, SyntheticTask, targets_at
from workbench.data.tasks import Example, SplitName, sources


@sources.register
class SelectiveRecall(SyntheticTask):
    """Recalls the marked value of each key."""

    class Config(SyntheticConfig):
        """Selective recall."""

        kind: Literal["selective_recall"] = "selective_recall"
        lengths: Annotated[Lengths, Field(min_length=1)] = (64,)
        vocabulary: Annotated[int, Field(ge=6)] = 34
        """Symbols: keys (the first half of what the two flags leave), values (the second half), flags."""
        pairs: Annotated[int, Field(ge=1)] = 4
        """Keys P of an example."""

        views = {"recall_curves": ("length", "pairs")}

        def model_post_init(self, _context: object) -> None:
            keys, values = self.halves
            require(
                keys >= self.pairs and values >= 2,
                "vocabulary",
                got=f"{self.vocabulary}: {keys} keys and {values} values",
                expected=f"{self.pairs} keys or more, and two values or more",
                do=f"Give at least {max(6, 2 * self.pairs + 2)} symbols, or fewer pairs.",
            )
            smallest = 5 * self.pairs
            self.require_lengths(lambda length: length >= smallest, f"at least {smallest}: five tokens a key")

        @property
        def halves(self) -> tuple[int, int]:
            """Numbers of key symbols and of value symbols."""
            return (self.vocabulary - 2) // 2, self.vocabulary - 2 - (self.vocabulary - 2) // 2

        def symbols(self) -> int:
            return self.vocabulary

        def chance(self, vocabulary: int) -> float:
            return 1 - 1 / self.halves[1]

        def target_share(self, context: int) -> float:
            return sum(self.pairs * (context // length) for length in self.lengths) / len(self.lengths) / context

    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        config = self.config
        (keys, values), P = config.halves, config.pairs
        ignore, counts = config.vocabulary - 2, config.vocabulary - 1
        chosen = generator.choice(keys, P, replace=False)
        value_of = generator.integers(values, size=P)
        triples = (length - 2 * P) // 3
        which = np.concatenate((np.arange(P), generator.integers(P, size=triples - P)))
        # an ignored value is another one than that which counts
        other = (value_of[which] + generator.integers(1, values, size=triples)) % values
        shown = np.where(np.arange(triples) < P, value_of[which], other)
        flags = np.where(np.arange(triples) < P, counts, ignore)
        order = generator.permutation(triples)
        body = np.stack((flags, chosen[which], shown + keys), axis=1)[order].reshape(-1)
        asked = generator.permutation(P)
        end = np.stack((chosen[asked], value_of[asked] + keys), axis=1).reshape(-1)
        lead = np.full(length - len(body) - len(end), ignore)
        positions = length - 2 * P + 2 * np.arange(P)
        return Example(
            np.concatenate((lead, body, end)).astype(np.int64),
            targets_at(length, positions, value_of[asked] + keys),
            {"length": length, "pairs": P, "vocabulary": config.vocabulary},
        )
