"""Synthetic tasks with a guarantee: no training row contains an evaluation example, however small the task.

The first byte of a hash of an example's tokens decides to which split the example belongs; examples of the other splits
are drawn again. So the splits are disjoint sets of sequences, whatever the seed of a run, where independent draws would
only make overlap unlikely (bit strings of length 12 for parity are 4,096 in all).

A task states its lengths twice, for training and for evaluation: measured lengths may exceed the context of training,
so that length extrapolation (trained at T, measured at 2 T … 16 T) is a setting of every task.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from workbench.config import ConfigError, require
from workbench.data.splits import SplitName
from workbench.data.streams import IGNORE_INDEX
from workbench.data.tasks import Example, Task, TaskConfig, TaskStream, check_lengths

__all__ = ["Lengths", "SyntheticConfig", "SyntheticTask", "split_of", "targets_at"]

SHARES = 10
"""Tenths of all examples: selection, report and pilot have one each, training the rest."""
ATTEMPTS = 2_000
"""Draws until an example of a split is found; where 2,000 fail, the task has hardly any of that split."""

Lengths = tuple[Annotated[int, Field(ge=2)], ...]


class SyntheticConfig(TaskConfig):
    """Base of the configuration of a synthetic task."""

    lengths: Annotated[Lengths, Field(min_length=1)]
    """Tokens of the training examples; each row draws one."""
    measured_lengths: Lengths = ()
    """Tokens of the evaluation examples, also above the context of training. Default: those of training."""
    training_rows: Annotated[int | None, Field(ge=1)] = None
    """Different training rows, repeated in order, where the amount of training data is an axis. Default: every row is
    new."""

    views = {"recall_curves": ("length",)}
    measured_only = TaskConfig.measured_only | {"measured_lengths"}
    size_field: ClassVar[str] = "vocabulary"
    """The field that decides the number of symbols."""

    def check(self, vocabulary: int, context: int) -> None:
        check_lengths("lengths", self.lengths, context)
        symbols = self.symbols()
        require(
            symbols <= vocabulary,
            self.size_field,
            got=f"{symbols} symbols",
            expected=f"at most model.vocabulary={vocabulary}",
            do=f"Set model.vocabulary={symbols}, or make the task smaller.",
        )

    @abstractmethod
    def symbols(self) -> int:
        """Number of token ids that the task uses, 0 to symbols − 1."""

    def require_lengths(self, possible: Callable[[int], bool], expected: str) -> None:
        """Check every length by the predicate ``possible``.

        Raises:
            ConfigError: naming the first length that is not possible.
        """
        for name in ("lengths", "measured_lengths"):
            for index, length in enumerate(getattr(self, name)):
                require(possible(length), f"{name}[{index}]", got=f"{length} tokens", expected=expected)


class SyntheticTask(Task):
    """A task whose cases are lengths. A subclass defines :meth:`sample`."""

    separate_answers = True

    def cases(self, split: SplitName) -> Sequence[int]:
        measured = tuple(dict.fromkeys(self.config.measured_lengths or self.config.lengths))
        return self.config.lengths if split == "train" else measured

    @abstractmethod
    def sample(self, length: int, split: SplitName, generator: np.random.Generator) -> Example:
        """Draw one example of ``length`` tokens."""

    def example(self, case: int, split: SplitName, generator: np.random.Generator) -> Example:
        for _ in range(ATTEMPTS):
            example = self.sample(case, split, generator)
            if split_of(example.tokens) == split:
                return example
        raise ConfigError.at(
            "data.lengths",
            got=f"no example of {case} tokens for the {split} split in {ATTEMPTS:,} draws",
            expected="a task with more different examples",
            do="Give longer examples, or more symbols.",
        )

    def training_examples(self) -> set[bytes]:
        return set()  # none is in a measured split

    def row_examples(self, seed: int, row: int, context: int) -> list[Example]:
        rows = self.config.training_rows
        return super().row_examples(seed, row if rows is None else row % rows, context)

    def stream(self, *, context: int, seed: int, buckets: Sequence[int] = ()) -> TaskStream:
        stream = super().stream(context=context, seed=seed, buckets=buckets)
        stream.rows_in_epoch = self.config.training_rows
        return stream


def split_of(tokens: np.ndarray) -> SplitName:
    """The split to which the sequence ``tokens`` (n,) belongs."""
    share = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=1).digest()[0] % SHARES
    measured: tuple[SplitName, ...] = ("selection", "report", "pilot")
    return measured[share] if share < len(measured) else "train"


def targets_at(length: int, positions: Any, values: Any) -> np.ndarray:
    """(length,) targets: ``values`` at ``positions``, no target elsewhere."""
    targets = np.full(length, IGNORE_INDEX, dtype=np.int64)
    targets[positions] = values
    return targets
