"""Token ids of a split in memory-mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SHARD_TOKENS = 2**25
"""Default number of tokens in one file, which is in memory while it is filled: at most 256 MB in all."""


class Tokens:
    """Token ids in memory-mapped shards, sliced as if they were one array. A document is in one shard.

    Args:
        shards: files, in order.
    """

    def __init__(self, shards: Sequence[Path]):
        self.shards = [np.load(path, mmap_mode="r") for path in shards]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids ``span.start`` to ``span.stop`` of one document."""
        shard = int(np.searchsorted(self.starts, span.start, side="right")) - 1
        base = int(self.starts[shard])
        return self.shards[shard][span.start - base : span.stop - base]


class ShardWriter:
    """Writes documents into shards, each file when it is full.

    Args:
        folder: where the files go.
        name: the split; files are ``NAME.tokens.00000.npy`` and so on.
        vocabulary: number of token ids; up to 2**16 take two bytes each, more take four.
        shard_tokens: largest number of tokens in a file; a longer document gets a separate file.
    """

    def __init__(self, folder: Path, name: str, vocabulary: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.vocabulary = vocabulary
        self.dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
        self.files: list[str] = []
        """Names of the files written so far."""
        self._buffer: list[np.ndarray] = []
        self._buffered = 0

    def add(self, ids: np.ndarray) -> None:
        """Add one document.

        Raises:
            ValueError: for an id beyond the vocabulary, which the files could not hold.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError(f"{self.name}: got token ids up to {ids.max()}; expected ids below {self.vocabulary}.")
        if self._buffered + len(ids) > self.shard_tokens:
            self.flush()
        self._buffer.append(ids.astype(self.dtype))
        self._buffered += len(ids)

    def flush(self) -> None:
        """Write the buffered documents as a file, if there are any."""
        if self._buffer:
            self.files.append(f"{self.name}.tokens.{len(self.files):05d}.npy")
            np.save(self.folder / self.files[-1], np.concatenate(self._buffer))
        self._buffer, self._buffered = [], 0
