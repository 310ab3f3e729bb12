"""Synthetic tasks, one file a task: token sequences in which some targets are answers, made from numbered random streams.

A task says which cases there are and how one example of a case is drawn. The rest is here: endless training rows, made on
the fly; two splits to measure on, written once; the card with what they hold and how far training overlaps them.

Training draws from (run's seed, row number), the splits from (task's seed, split, example number): three separate streams
of a counter-based generator (Philox), so a row depends on its number and on nothing that was drawn before.
"""

from __future__ import annotations

import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import polars as pl
from pydantic import Field

from workbench.config import ConfigError
from workbench.data.sources import Source, SourceConfig, digest, is_whole, sources, write_card
from workbench.data.streams import IGNORE_INDEX, RowStream
from workbench.files import locked
from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS, Metric

__all__ = ["Example", "Examples", "SplitName", "Task", "TaskConfig", "TaskStream", "sources"]

SplitName: TypeAlias = Literal["train", "selection", "report"]
STREAMS: dict[SplitName, int] = {"train": 0, "selection": 1, "report": 2}
"""Split -> the second word of its generator's key."""
FORMAT = 1
"""Part of the fingerprint; raised when the files or the rules change."""
COMPARED = 5_000
"""Training examples, of a run with seed 0, that the measured ones are looked for in."""


class Example(NamedTuple):
    """One sequence of n tokens."""

    tokens: np.ndarray
    """(n,) token ids."""
    targets: np.ndarray
    """(n,) what to predict at each position; -100 where nothing is asked. Neighbouring targets are one answer."""
    labels: Mapping[str, int | float | str]
    """What it is by, in the tables of measured examples: {"pairs": 16}."""


class TaskConfig(SourceConfig):
    """Base of a task's configuration."""

    examples: Annotated[int, Field(ge=1)] = 512
    """Examples in the selection split, and in the report split; every case has its share."""
    seed: int = 0
    """Seed of the measured examples, which all runs share. Training examples come from the run's own seed."""
    measure: Literal["errors", "loss"] = "errors"
    """What arms are judged by: the share of wrong answers, or the loss of an answer. Both are recorded."""

    @property
    def metric(self) -> Metric:
        return replace(ANSWER_ERRORS if self.measure == "errors" else ANSWER_LOSS, task=self.kind)


class Task(Source):
    """A task. A subclass gives :meth:`cases` and :meth:`example`."""

    Config: ClassVar[type[TaskConfig]]

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config: Any = self.Config.parse(self.card["config"])

    @abstractmethod
    def cases(self, split: SplitName) -> Sequence[Any]:
        """What examples there are in a split: training draws one for every row, the measured splits go through them."""

    @abstractmethod
    def example(self, case: Any, split: SplitName, generator: np.random.Generator) -> Example:
        """One example of ``case``, a function of what ``generator`` gives. Its length depends on the case alone."""

    @classmethod
    def material(cls, config: Any, vocabulary: int, cache: Path, say: Callable[[str], None]) -> dict[str, str]:
        """Prepare other data that the task is made of. Returns name -> fingerprint, which the card holds as "material"."""
        return {}

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, say: Callable[[str], None]) -> Task:
        card: dict[str, Any] = {
            "kind": config.kind,
            "config": config.plain(),
            "vocabulary": vocabulary,
            "material": cls.material(config, vocabulary, cache, say),
        }
        folder = cache / digest(FORMAT, card)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not is_whole(folder):
                temporary = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                try:
                    write_card(temporary, card)
                    say(f"drawing the measured examples of {config.kind}")
                    write_card(temporary, {**card, **cls(temporary)._write_splits()})
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(temporary, folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        return cls(folder)

    def draw(self, split: SplitName, number: int) -> Example:
        """Example ``number`` of a measured split."""
        cases = self.cases(split)
        return self.example(cases[number % len(cases)], split, numbered(self.config.seed, split, number))

    def stream(self, *, context: int, seed: int) -> TaskStream:
        return TaskStream(self, context=context, seed=seed)

    @cached_property
    def selection(self) -> Examples:  # type: ignore[override]
        return Examples(self.folder, "selection")

    @cached_property
    def report(self) -> Examples:  # type: ignore[override]
        return Examples(self.folder, "report")

    def _write_splits(self) -> dict[str, Any]:
        """Write the measured examples. Returns their part of the card."""
        trained = {example.tokens.tobytes() for row in range(COMPARED) for example in self.row_examples(0, row, 0)}
        splits: dict[str, Any] = {}
        names: tuple[SplitName, SplitName] = ("selection", "report")
        for name in names:
            made = [self.draw(name, number) for number in range(self.config.examples)]
            columns: dict[str, list[Any]] = {key: [example.labels[key] for example in made] for key in made[0].labels}
            columns["answers"] = [int(answer_starts(example.targets).sum()) for example in made]
            ends = np.cumsum([0, *(len(example.tokens) for example in made)])
            np.save(self.folder / f"{name}.offsets.npy", ends)
            np.save(self.folder / f"{name}.tokens.npy", np.concatenate([e.tokens for e in made]).astype(np.int32))
            np.save(self.folder / f"{name}.targets.npy", np.concatenate([e.targets for e in made]).astype(np.int32))
            pl.DataFrame(columns).write_parquet(self.folder / f"{name}.parquet")
            splits[name] = {
                "examples": len(made),
                "tokens": int(ends[-1]),
                "answers": sum(columns["answers"]),
                "seen_in_training": sum(example.tokens.tobytes() in trained for example in made),
            }
        return {"training_examples_compared": len(trained), "splits": splits}

    def row_examples(self, seed: int, row: int, context: int) -> list[Example]:
        """The examples of a training row, all of one case: as many as fit into ``context`` tokens, one at least."""
        generator, cases = numbered(seed, "train", row), self.cases("train")
        case = cases[int(generator.integers(len(cases)))]
        first = self.example(case, "train", generator)
        more = context // len(first.tokens) - 1
        return [first, *(self.example(case, "train", generator) for _ in range(more))]


class Examples:
    """The measured examples of a split, memory-mapped."""

    whole = True
    answered = True

    def __init__(self, folder: Path, name: str):
        self.tokens, self.targets, self.offsets = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "targets", "offsets")
        )
        self.columns: Mapping[str, np.ndarray] = {
            column.name: column.to_numpy() for column in pl.read_parquet(folder / f"{name}.parquet")
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
        task: what to draw.
        context: tokens T in a row; what is left behind the last whole example is padding.
        seed: of the run.
    """

    def __init__(self, task: Task, *, context: int, seed: int):
        self.task, self.context, self.seed = task, context, seed

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.zeros(self.context, dtype=np.int64)
        targets = np.full(self.context, IGNORE_INDEX, dtype=np.int64)
        segments = np.full(self.context, -1, dtype=np.int32)
        documents = np.full(self.context, -1, dtype=np.int64)
        filled = 0
        for segment, example in enumerate(self.task.row_examples(self.seed, r, self.context)):
            span = slice(filled, filled + len(example.tokens))
            tokens[span], targets[span] = example.tokens, example.targets
            segments[span], documents[span] = segment, r
            filled = span.stop
        return tokens, targets, segments, documents


def numbered(seed: int, split: SplitName, number: int) -> np.random.Generator:
    """A generator of its own for row or example ``number``; nothing is drawn from any other."""
    key = np.array([seed % 2**64, STREAMS[split]], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, number, 0], np.uint64)))


def answer_starts(targets: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    """Where, along the last axis, a run of targets begins; a document (by number) begins one of its own."""
    there = targets >= 0
    goes_on = there[..., 1:] & there[..., :-1]
    if documents is not None:
        goes_on &= documents[..., 1:] == documents[..., :-1]
    starts = there.copy()
    starts[..., 1:] &= ~goes_on
    return starts


def check_lengths(path: str, lengths: Sequence[int], context: int) -> None:
    """Raise ConfigError where an example is longer than a row of ``context`` tokens."""
    if max(lengths) > context:
        raise ConfigError.at(
            path,
            got=f"an example of {max(lengths)} tokens",
            expected=f"at most training.context={context}",
            do=f"Set training.context={max(lengths)}, or make examples shorter.",
        )
