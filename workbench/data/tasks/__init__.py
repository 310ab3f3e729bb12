"""Synthetic tasks, one file per task: token sequences in which some targets are answers.

A task lists its cases and draws one example of a case. This module does the rest: endless training rows, generated on
the fly; three splits for evaluation, written once; the card with their contents and their overlap with training.

Training rows are drawn from (seed of the run, row number), the splits from (seed of the task, split, example number):
four separate streams of a counter-based generator (Philox). A row depends on its number, never on earlier draws.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import polars as pl
from pydantic import Field

from workbench.config import require
from workbench.data.sources import Source, SourceConfig, digest, is_intact, sources, write_card
from workbench.data.splits import MEASURED, SplitName
from workbench.data.streams import IGNORE_INDEX, RowStream, bucket_of
from workbench.files import locked, replacing_folder
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS, Metric
from workbench.seeding import Seed, counter_generator

__all__ = ["Example", "Examples", "Published", "SplitName", "Task", "TaskConfig", "TaskStream", "sources"]

STREAMS: dict[SplitName, int] = {"train": 0, "selection": 1, "report": 2, "pilot": 3}
"""Split -> number of its random stream."""
FORMAT = 2
"""Part of the fingerprint; raised when the files or the rules change."""
OVERLAP_ROWS = 5_000
"""Training examples (of seed 0) among which evaluation examples are searched."""


class Example(NamedTuple):
    """One sequence of n tokens."""

    tokens: np.ndarray
    """(n,) token ids."""
    targets: np.ndarray
    """(n,) target at each position; :data:`IGNORE_INDEX` outside answers. Adjacent targets are one answer, unless the
    task has :attr:`Task.separate_answers`."""
    labels: Mapping[str, int | float | str]
    """Labels of the example in tables: {"pairs": 16}."""


class Published(NamedTuple):
    """The protocol of the paper that a task is taken from."""

    source: str
    """Where it is defined: "arXiv 2403.17844, appendix B"."""
    settings: Mapping[str, Any]
    """Fields of the task's configuration: the published baseline."""
    axes: Mapping[str, Sequence[Any]]
    """Field -> values by which the paper varies the difficulty, one field at a time."""
    training: str
    """How the paper trains its models."""


class TaskConfig(SourceConfig):
    """Base of a task's configuration."""

    examples: Annotated[int, Field(ge=1)] = 512
    """Examples in each of the selection, report and pilot splits; cases have equal shares."""
    seed: Seed = 0
    """Seed of the evaluation examples, which all runs share. Training examples derive from the seed of the run."""
    measure: Literal["errors", "loss"] = "errors"
    """The primary metric: the fraction of wrong answers, or the loss of an answer. Both are recorded."""

    measured_only: ClassVar[frozenset[str]] = frozenset({"examples", "seed", "measure"})
    published: ClassVar[Published | None] = None
    """The protocol of the paper, where the task is taken from one."""

    @property
    def metric(self) -> Metric:
        return replace(ANSWER_ERRORS if self.measure == "errors" else ANSWER_LOSS, task=self.kind)

    def chance(self, vocabulary: int) -> float:
        """Errors per answer of a guess that knows the format and no more: 1 − 1 / (symbols that may be an answer).

        Args:
            vocabulary: token ids of the model.
        """
        raise NotImplementedError(f"{type(self).__name__} states no level of chance")


class Task(Source):
    """A task. A subclass defines :meth:`cases` and :meth:`example`."""

    Config: ClassVar[type[TaskConfig]]
    separate_answers: ClassVar[bool] = False
    """Whether every target is an answer of its own; otherwise adjacent targets are one answer, right as a whole."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config: Any = self.Config.parse(self.card["config"])

    @abstractmethod
    def cases(self, split: SplitName) -> Sequence[Any]:
        """The kinds of examples in a split: training draws one per row, the evaluation splits cycle through them."""

    @abstractmethod
    def example(self, case: Any, split: SplitName, generator: np.random.Generator) -> Example:
        """Draw one example of ``case``. Its length depends on the case alone."""

    @classmethod
    def material(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> dict[str, str]:
        """Prepare other data that the task is made of.

        Returns:
            Name -> fingerprint, stored in the card as "material".
        """
        return {}

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> Task:
        card: dict[str, Any] = {
            "kind": config.kind,
            "config": {name: value for name, value in config.plain().items() if name != "allow_overlap"},
            "vocabulary": vocabulary,
            "material": cls.material(config, vocabulary, cache, progress),
        }
        folder = cache / digest(FORMAT, card)
        with locked(cache / f"{folder.name}.lock"):
            if not is_intact(folder):
                with replacing_folder(folder) as scratch:
                    write_card(scratch, card)
                    progress(f"drawing the evaluation examples of {config.kind}")
                    write_card(scratch, {**card, **cls(scratch)._write_splits()})
        return cls(folder)

    def draw(self, split: SplitName, number: int) -> Example:
        """Example ``number`` of an evaluation split."""
        cases = self.cases(split)
        generator = counter_generator(self.config.seed, STREAMS[split], number)
        return self.example(cases[number % len(cases)], split, generator)

    def clusters(self, split: SplitName, examples: Sequence[Example]) -> list[int]:
        """Cluster number of each example of an evaluation split. Default: examples are independent draws, one cluster
        each."""
        return list(range(len(examples)))

    def stream(self, *, context: int, seed: int, buckets: Sequence[int] = ()) -> TaskStream:
        return TaskStream(self, context=context, seed=seed, buckets=buckets)

    @cached_property
    def selection(self) -> Examples:  # type: ignore[override]
        return Examples(self.folder, "selection", self.separate_answers)

    @cached_property
    def report(self) -> Examples:  # type: ignore[override]
        return Examples(self.folder, "report", self.separate_answers)

    @cached_property
    def pilot(self) -> Examples:  # type: ignore[override]
        return Examples(self.folder, "pilot", self.separate_answers)

    def _write_splits(self) -> dict[str, Any]:
        """Write the evaluation examples. Returns their part of the card."""
        trained = self.training_examples()
        splits: dict[str, Any] = {}
        for name in MEASURED:
            drawn = [self.draw(name, number) for number in range(self.config.examples)]
            columns: dict[str, list[Any]] = {key: [example.labels[key] for example in drawn] for key in drawn[0].labels}
            columns["answers"] = [
                int(answer_starts(example.targets, separate=self.separate_answers).sum()) for example in drawn
            ]
            columns["cluster"] = self.clusters(name, drawn)
            offsets = np.cumsum([0, *(len(example.tokens) for example in drawn)])
            np.save(self.folder / f"{name}.offsets.npy", offsets)
            np.save(self.folder / f"{name}.tokens.npy", np.concatenate([e.tokens for e in drawn]).astype(np.int32))
            np.save(self.folder / f"{name}.targets.npy", np.concatenate([e.targets for e in drawn]).astype(np.int32))
            pl.DataFrame(columns).write_parquet(self.folder / f"{name}.parquet")
            splits[name] = {
                "documents": len(drawn),
                "clusters": len(set(columns["cluster"])),
                "tokens": int(offsets[-1]),
                "answers": sum(columns["answers"]),
                "overlap": sum(example.tokens.tobytes() in trained for example in drawn) / len(drawn),
            }
        return {"training_examples_compared": len(trained), "splits": splits}

    def training_examples(self) -> set[bytes]:
        """Tokens of training examples, among which those of the evaluation splits are searched."""
        return {example.tokens.tobytes() for row in range(OVERLAP_ROWS) for example in self.row_examples(0, row, 0)}

    def row_examples(self, seed: int, row: int, context: int) -> list[Example]:
        """The examples of a training row, all of one case: as many as fit into ``context`` tokens, at least one."""
        generator, cases = counter_generator(seed, STREAMS["train"], row), self.cases("train")
        case = cases[int(generator.integers(len(cases)))]
        first = self.example(case, "train", generator)
        more = context // len(first.tokens) - 1
        return [first, *(self.example(case, "train", generator) for _ in range(more))]


class Examples:
    """The examples of an evaluation split, memory-mapped."""

    indivisible = True

    def __init__(self, folder: Path, name: str, separate_answers: bool = False):
        self.separate_answers = separate_answers
        self.tokens, self.targets, self.offsets = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "targets", "offsets")
        )
        self.columns: Mapping[str, np.ndarray] = {
            column.name: column.to_numpy() for column in pl.read_parquet(folder / f"{name}.parquet", glob=False)
        }

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each."""
        return np.diff(self.offsets)

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens of an example from position ``first`` on, and their targets."""
        span = slice(int(self.offsets[document]) + first, int(self.offsets[document]) + first + count)
        return self.tokens[span], self.targets[span]


class TaskStream(RowStream):
    """Endless training rows of a task. Row r holds fresh examples, a function of (task, seed, r).

    Args:
        task: the task.
        context: tokens T in a row; what is left after the last example is padding.
        seed: seed of the run.
        buckets: lengths of rows of one example each, rising to ``context``. Default: all rows have ``context`` tokens
            and as many examples as fit.
    """

    def __init__(self, task: Task, *, context: int, seed: int, buckets: Sequence[int] = ()):
        self.task, self.context, self.seed, self.buckets = task, context, seed, buckets
        self._lengths = lru_cache(maxsize=4096)(lambda r: [len(example.tokens) for example in self._examples(r)])

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        examples = self._examples(r)
        length = bucket_of(len(examples[0].tokens), self.buckets) if self.buckets else self.context
        tokens = np.zeros(length, dtype=np.int64)
        targets = np.full(length, IGNORE_INDEX, dtype=np.int64)
        segments = np.full(length, -1, dtype=np.int32)
        documents = np.full(length, -1, dtype=np.int64)
        filled = 0
        for segment, example in enumerate(examples):
            span = slice(filled, filled + len(example.tokens))
            tokens[span], targets[span] = example.tokens, example.targets
            segments[span], documents[span] = segment, r
            filled = span.stop
        return tokens, targets, segments, documents

    def row_length(self, r: int) -> int:
        return bucket_of(self._lengths(r)[0], self.buckets) if self.buckets else self.context

    def segment_lengths(self, r: int) -> np.ndarray:
        return np.array(self._lengths(r))

    def _examples(self, r: int) -> list[Example]:
        return self.task.row_examples(self.seed, r, 0 if self.buckets else self.context)


def answer_starts(targets: np.ndarray, documents: np.ndarray | None = None, *, separate: bool = False) -> np.ndarray:
    """Mask of the first token of every answer, along the last axis.

    Args:
        targets: negative outside answers.
        documents: document numbers of the same shape; an answer never spans two documents.
        separate: whether every target is an answer of its own.
    """
    mask = targets >= 0
    if separate:
        return mask
    continues = mask[..., 1:] & mask[..., :-1]
    if documents is not None:
        continues &= documents[..., 1:] == documents[..., :-1]
    starts = mask.copy()
    starts[..., 1:] &= ~continues
    return starts


def check_lengths(path: str, lengths: Sequence[int], context: int) -> None:
    """Raise ConfigError if an example is longer than a row of ``context`` tokens."""
    require(
        max(lengths) <= context,
        path,
        got=f"an example of {max(lengths)} tokens",
        expected=f"at most training.context={context}",
        do=f"Set training.context={max(lengths)}, or make examples shorter.",
    )
