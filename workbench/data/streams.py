"""Batches, the streams of rows they are made of, and the documents of a split.

Legend: B rows, T tokens in a row (the context).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target at positions without a loss: padding, and tokens of a task that are not part of an answer."""


class Batch(NamedTuple):
    """Rows of tokens."""

    tokens_BT: Tensor
    """int64 token ids."""
    targets_BT: Tensor
    """int64 next tokens; :data:`IGNORE_INDEX` where there is no loss."""
    segments_BT: Tensor
    """int32 document number within the row; -1 where padded."""
    documents_BT: Tensor
    """int64 index of the document in its split; -1 where padded."""


class Split(Protocol):
    """Documents (texts, or examples of a task) for training or evaluation."""

    @property
    def indivisible(self) -> bool:
        """Whether a document must fit in one row; otherwise it may continue in the next row, in a fresh context."""

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) positions of each document in a row."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Sizes and labels of the documents, (documents,) each; they do not depend on a model. ``cluster`` numbers the
        groups of documents that are alike, which resampling keeps together."""

    def piece(self, document: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets (negative: no loss) of positions ``first`` to ``first + count`` of a document."""

    def __len__(self) -> int: ...


class RowStream(ABC):
    """Endless training rows. A row is a function of (data, seed, row number), so a loader's state is one integer."""

    rows_in_epoch: int | None = None
    """Rows after which the data are read again; None where every row is new."""
    _length: int | None = None

    def epochs(self, rows: int) -> float | None:
        """How often ``rows`` rows read the data; None where every row is new."""
        return None if self.rows_in_epoch is None else rows / self.rows_in_epoch

    @abstractmethod
    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The r-th row of the stream: tokens, targets, segments, documents, each (T,)."""

    def row_length(self, r: int) -> int:
        """Tokens of the r-th row, padding included. Here those of the first row, which all rows have."""
        if self._length is None:
            self._length = len(self.row(0)[0])
        return self._length

    def segment_lengths(self, r: int) -> np.ndarray:
        """(segments,) tokens of each segment of the r-th row, in order, without padding."""
        segments = self.row(r)[2]
        return np.unique(segments[segments >= 0], return_counts=True)[1]

    def batch(self, rows: Iterable[int]) -> Batch:
        """The rows with these numbers, in this order, padded to the longest of them."""
        parts = zip(*map(self.row, rows))
        return Batch(*(torch.from_numpy(_stacked(part, fill)) for part, fill in zip(parts, PADDING)))


PADDING = (0, IGNORE_INDEX, -1, -1)
"""What pads tokens, targets, segments and documents."""


def _stacked(rows: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """(B, T) rows, padded to the longest."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows])


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest of ``buckets``, rising, that ``length`` tokens fit in."""
    return buckets[bisect_left(buckets, length)]
