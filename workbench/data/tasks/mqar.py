"""Multi-query associative recall, MQAR (arXiv 2312.04927, definition 3.1 and appendix E).

An example is P key–value pairs, then the P keys again, each once, scattered among fillers. At each repeated key the
model must predict its value; loss and errors are counted at those P positions only:

    tokens   k1 v1 k2 v2 … kP vP  f f k2 f f f k1 f …        targets   – – … – v2 – – – v1 –

Keys come from the lower half of the vocabulary, values from the upper half, all different within an example. The gap
between the pairs and a query is 2 i tokens, i drawn without replacement with probability ∝ a i^(a − 1), i from 1: the
published power law, whose a = 0.01 puts most queries near the pairs. The token after a query is a filler, as in the
published generator.

One departure, ours: fillers are drawn from the vocabulary *without the keys and values of the example*, so that a
filler is never mistaken for a query (the published code draws them from the whole vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from workbench.config import Config, require
from workbench.data.splits import MEASURED
from workbench.data.streams import IGNORE_INDEX
from workbench.data.tasks import Example, Published, SplitName, Task, TaskConfig, check_lengths, sources


class Mix(Config):
    """Examples of one size."""

    length: Annotated[int, Field(ge=4)]
    """Tokens of an example: pairs, queries and fillers."""
    pairs: Annotated[int, Field(ge=1)]
    """Key–value pairs P, each queried once; at most a quarter of the length."""

    def model_post_init(self, _context: object) -> None:
        require(
            4 * self.pairs <= self.length,
            "pairs",
            got=f"{self.pairs} pairs in {self.length} tokens",
            expected="4 · pairs ≤ length",
            do=f"Give at most {self.length // 4} pairs, or {4 * self.pairs} tokens or more.",
        )


@sources.register
class MultiQueryRecall(Task):
    """Multi-query associative recall (MQAR)."""

    class Config(TaskConfig):
        """Multi-query associative recall."""

        kind: Literal["mqar"] = "mqar"
        mixes: Annotated[tuple[Mix, ...], Field(min_length=1)] = (Mix(length=64, pairs=4), Mix(length=128, pairs=8))
        """Sizes of the training examples; each row draws one. One that is listed twice is drawn twice as often."""
        measured: tuple[Mix, ...] = ()
        """Sizes of the evaluation examples, also above the context of training. Default: those of training."""
        vocabulary: Annotated[int | None, Field(ge=4)] = None
        """Number of token ids used. Default: the model's vocabulary (published: 8192)."""
        power: Annotated[float, Field(gt=0)] = 0.01
        """Power-law exponent a of the gaps between pairs and queries; 1 is uniform."""

        views = {"recall_curves": ("pairs", "length")}
        published = Published(
            "Zoology, arXiv 2312.04927, definition 3.1 and appendix E",
            {
                "vocabulary": 8192,
                "power": 0.01,
                "mixes": tuple(Mix(length=length, pairs=length // 16) for length in (64, 128, 256, 512)),
            },
            {},
            "100,000 rows, 64 epochs, AdamW, weight decay 0.1; the best of learning rates 1e-4 to 1e-2, two layers",
        )

        def check(self, vocabulary: int, context: int) -> None:
            used = self.vocabulary or vocabulary
            require(used <= vocabulary, "vocabulary", got=used, expected=f"at most model.vocabulary={vocabulary}")
            for index, mix in enumerate(self.mixes):
                check_lengths(f"mixes[{index}].length", [mix.length], context)
            for name in ("mixes", "measured"):
                for mix in getattr(self, name):
                    require(
                        used // 2 - 1 >= mix.pairs,
                        "vocabulary",
                        got=used,
                        expected=f"at least {2 * mix.pairs + 2} ids: {mix.pairs} keys, as many values, a filler",
                        do="Set model.vocabulary (published: 8192), or give fewer pairs.",
                    )

        def chance(self, vocabulary: int) -> float:
            used = self.vocabulary or vocabulary
            return 1 - 1 / (used - used // 2)

        def target_share(self, context: int) -> float:
            return sum(mix.pairs * (context // mix.length) for mix in self.mixes) / len(self.mixes) / context

    @cached_property
    def _mixes(self) -> dict[SplitName, Sequence[Mix]]:
        measured = tuple(dict.fromkeys(self.config.measured or self.config.mixes))
        return {"train": self.config.mixes, **dict.fromkeys(MEASURED, measured)}

    def cases(self, split: SplitName) -> Sequence[Mix]:
        return self._mixes[split]

    def example(self, case: Mix, split: SplitName, generator: np.random.Generator) -> Example:
        P, length, V = case.pairs, case.length, self.config.vocabulary or self.vocabulary
        keys = generator.choice(V // 2 - 1, P, replace=False) + 1
        values = generator.choice(V - V // 2, P, replace=False) + V // 2
        used = np.sort(np.concatenate((keys, values)))
        # uniform over the unused ids: the j-th one is j plus the number of used ids before it
        tokens = generator.integers(V - len(used), size=length)
        tokens += np.searchsorted(used - np.arange(len(used)), tokens, side="right")
        tokens[0 : 2 * P : 2], tokens[1 : 2 * P : 2] = keys, values
        slots = (length - 2 * P) // 2
        # the P largest of log-probability + Gumbel noise, in order, are P draws without replacement
        score = (self.config.power - 1) * np.log(np.arange(1, slots + 1)) + generator.gumbel(size=slots)
        queries = 2 * P + 2 * np.argsort(-score, kind="stable")[:P]
        tokens[queries] = keys
        targets = np.full(length, IGNORE_INDEX, dtype=np.int64)
        targets[queries] = values
        return Example(tokens, targets, {"length": length, "pairs": P})
