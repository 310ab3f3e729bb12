"""Documents to train on in the form of RULER's tasks: prompts with their answers (:mod:`workbench.data.ruler`).

A model of text knows the form of the suite ``ruler`` only if its training text has it: mix this source with text
(:mod:`workbench.data.tasks.mixture`). Documents are packed into rows and predicted token by token as text is.

Haystacks and questions are made of ``text``, each split of the documents of the same split, so that nothing that is
measured is trained on. Every task and length gets the same number of tokens: short prompts are many, long ones few.
Documents of a task that do not fit a length are left out; the card counts those that there are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from workbench.config import ConfigError, require
from workbench.data import tokenizer as tokenizers
from workbench.data.config import DataConfig
from workbench.data.ruler import TASKS, Generator, TaskName
from workbench.data.shards import ShardWriter
from workbench.data.sources import SourceConfig, digest, is_intact, prepare, sources, write_card
from workbench.data.splits import SPLITS, SplitName
from workbench.data.tasks import STREAMS
from workbench.data.text import PreparedData
from workbench.environment import usable_cores
from workbench.files import locked, replacing_folder
from workbench.metric import BITS_PER_BYTE, Metric
from workbench.seeding import Seed

FORMAT = 2
"""Part of the fingerprint; raised when the files or the rules change."""
TOLERANCE = 0.05
"""Share of its length that a document may lack: to fill the last percents takes as long as all the rest."""
DOCUMENTS_OF_A_WORKER = 64
"""Documents for which a further process is worth starting."""
HAYSTACK_TOKENS = 4_000_000
"""Tokens of a split that haystacks are made of, to the end of a document."""


@sources.register
class RulerDocuments(PreparedData):
    """Prompts of RULER's tasks with their answers, as text to train on."""

    class Config(SourceConfig):
        """Prompts of RULER's tasks with their answers."""

        kind: Literal["ruler"] = "ruler"
        tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = TASKS
        """Which of the 13 tasks."""
        lengths: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1)] = (256, 512, 1024)
        """Tokens of a prompt without its answer, at most; up to 5 % fewer. Longer documents than a row continue in the
        next row."""
        further: Annotated[int, Field(ge=0)] = 0
        """Questions about other needles that follow the first answer, at most: more answers per token."""
        tokens: Annotated[int, Field(ge=1)] = 2_000_000
        """Tokens of the training documents, about; they are read again when a run needs more."""
        examples: Annotated[int, Field(ge=1)] = 64
        """Documents in each of the selection, report and pilot splits, about: equally many of every task and length."""
        seed: Seed = 0
        """Seed of the documents, which all runs share."""
        text: Annotated[DataConfig, BeforeValidator(lambda data: DataConfig.parse(data))] = Field(
            default={}, validate_default=True
        )
        """Corpus and tokenizer."""

        @property
        def metric(self) -> Metric:
            return BITS_PER_BYTE

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> RulerDocuments:
        text: PreparedData = prepare(config.text, vocabulary, cache, progress)
        plain = {name: value for name, value in config.plain().items() if not name.startswith("allow_")}
        card = {"kind": config.kind, "config": plain, "vocabulary": vocabulary, "material": {"text": text.fingerprint}}
        folder = cache / digest(FORMAT, card)
        with locked(cache / f"{folder.name}.lock"):
            if not is_intact(folder):
                with replacing_folder(folder) as scratch:
                    (scratch / "tokenizer.json").write_bytes((text.folder / "tokenizer.json").read_bytes())
                    splits = {name: _write(config, text, name, vocabulary, scratch, progress) for name in SPLITS}
                    write_card(scratch, {**card, "splits": splits})
        return cls(folder)

    @classmethod
    def find(cls, config: Any, vocabulary: int, cache: Path) -> RulerDocuments | None:
        return None


def _write(
    config: Any, text: PreparedData, split: SplitName, vocabulary: int, folder: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write the documents of a split. Returns their part of the card."""
    progress(f"drawing the {split} documents of {config.kind}")
    tokenizer, writer = text.tokenizer, ShardWriter(folder, split, vocabulary)
    lengths, sizes = [0], []
    cells: Counter[str] = Counter()
    for cell, document in _documents(config, text, split, tokenizer):
        encoded = tokenizers.encode(tokenizer, [document])[0]
        writer.add(encoded.ids)
        lengths.append(len(encoded.ids))
        sizes.append(encoded.size)
        cells[cell] += 1
    writer.flush()
    np.save(folder / f"{split}.offsets.npy", np.cumsum(lengths))
    np.save(folder / f"{split}.bytes.npy", np.array(sizes, np.int64))
    np.save(folder / f"{split}.clusters.npy", np.arange(len(sizes)))
    return {
        "documents": len(sizes),
        "clusters": len(sizes),
        "bytes": sum(sizes),
        "tokens": sum(lengths),
        "shards": writer.files,
        "cells": cells,
    }


def _documents(config: Any, text: PreparedData, split: SplitName, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Task and length, then the text, of every document of a split."""
    generator = Generator(
        count=lambda written: len(tokenizer.encode(written, add_special_tokens=False).ids),
        texts=_first_texts(text, split),
        seed=config.seed,
        stream=STREAMS[split],
        tolerance=TOLERANCE,
    )
    cells = list(itertools.product(config.tasks, config.lengths))
    # here and not in a worker process, which would wrap the errors of a text
    fitting = [cell for cell in cells if _document(generator, *cell, 0)]
    require(fitting, "data.lengths", got=list(config.lengths), expected="a length that one of the tasks fits into")
    draws = [
        (task, length, number, config.further)
        for task, length in fitting
        for number in range(-(-(config.tokens // length if split == "train" else config.examples) // len(cells)))
    ]
    workers = min(usable_cores(), len(draws) // DOCUMENTS_OF_A_WORKER)
    documents = DataLoader(_Draws(generator, draws), batch_size=None, num_workers=workers)  # in the order of the draws
    for (task, length, *_), document in zip(draws, documents):
        if document:
            yield f"{task}/{length}", document


@dataclass
class _Draws(Dataset[str]):
    """Documents by their number; one may need a longer prompt than the first of its cell."""

    generator: Generator
    draws: list[tuple[str, int, int, int]]

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> str:
        return _document(self.generator, *self.draws[index])


def _document(generator: Generator, task: str, length: int, number: int, further: int = 0) -> str:
    """A document; empty where it needs a longer prompt."""
    try:
        return generator.document(task, length, number, further)
    except ConfigError as error:
        if error.problems[0].path != "lengths":
            raise
        return ""


def _first_texts(text: PreparedData, split: SplitName) -> list[str]:
    """The texts of the first documents of a split, with at least :data:`HAYSTACK_TOKENS` tokens if it has them."""
    ends = getattr(text, split).lengths.cumsum()
    count = int(np.searchsorted(ends, HAYSTACK_TOKENS)) + 1
    return list(itertools.islice(text.texts(split), count))
