"""Text as a data source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from workbench.data.config import DataConfig
from workbench.data.packing import DocumentStream, TrainingStream
from workbench.data.preparation import find_text, prepare_text
from workbench.data.shards import Tokens
from workbench.data.sources import Source, sources


@dataclass(frozen=True)
class Documents:
    """Tokenized documents of one split."""

    tokens: Tokens
    """Token ids; document d is ``tokens[offsets[d]:offsets[d+1]]``, the document symbol first."""
    offsets: np.ndarray
    """(documents + 1,) int64."""
    byte_counts: np.ndarray
    """(documents,) int64: bytes of UTF-8 text behind each document's targets."""
    clusters: np.ndarray
    """(documents,) int64: cluster of near-duplicates that each document belongs to, numbered over the whole corpus."""
    indivisible: bool = False

    def __len__(self) -> int:
        return len(self.byte_counts)

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) targets of each: every token after the first."""
        return np.diff(self.offsets) - 1

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        return {"bytes": np.asarray(self.byte_counts, np.int64), "cluster": np.asarray(self.clusters, np.int64)}

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` tokens of a document from position ``first`` on, and the token after each."""
        start = int(self.offsets[document]) + first
        tokens = self.tokens[start : start + count + 1]
        return tokens[:-1], tokens[1:]


@sources.register
class PreparedData(Source):
    """Text, measured in bits per byte. Its splits are memory-mapped."""

    Config = DataConfig

    @classmethod
    def prepare(cls, config: Any, vocabulary: int, cache: Path, progress: Callable[[str], None]) -> PreparedData:
        return cls(prepare_text(config, vocabulary, cache, progress))

    @classmethod
    def find(cls, config: Any, vocabulary: int, cache: Path) -> PreparedData | None:
        folder = find_text(config, vocabulary, cache)
        return None if folder is None else cls(folder)

    def stream(self, *, context: int, seed: int, buckets: Sequence[int] = ()) -> TrainingStream | DocumentStream:
        if buckets:
            return DocumentStream(self.train, buckets=buckets, seed=seed)
        return TrainingStream(self.train, context=context, seed=seed)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def train(self) -> Documents:
        return self._split("train")

    @cached_property
    def selection(self) -> Documents:  # type: ignore[override]
        return self._split("selection")

    @cached_property
    def report(self) -> Documents:  # type: ignore[override]
        return self._split("report")

    @cached_property
    def pilot(self) -> Documents:  # type: ignore[override]
        return self._split("pilot")

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split, decoded from its tokens."""
        documents: Documents = getattr(self, split)
        for index, length in enumerate(documents.lengths):
            _, tokens = documents.piece(index, 0, int(length))
            yield self.tokenizer.decode(tokens.tolist())

    def digests(self, split: str) -> list[str]:
        """Hashes of whole texts without regard to white space, even of documents that are measured in part."""
        path = self.folder / f"{split}.digests.npy"
        return np.load(path).tolist() if path.exists() else super().digests(split)  # prepared by an earlier version

    def _split(self, name: str) -> Documents:
        shards = [self.folder / file for file in self.card["splits"][name]["shards"]]
        parts = (np.load(self.folder / f"{name}.{part}.npy") for part in ("offsets", "bytes", "clusters"))
        return Documents(Tokens(shards), *parts)
