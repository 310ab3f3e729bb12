"""Packing documents into rows of tokens, without leakage between documents.

A document's stream is [symbol, t1 … tn, symbol]; every token after the first is predicted exactly once. A row holds
pieces of documents one after another; each piece is a segment, and segments do not see each other.

Legend: B rows, T tokens in a row (the context).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch

from workbench.config import require
from workbench.data.streams import IGNORE_INDEX, Batch, RowStream, Split, bucket_of
from workbench.seeding import counter_generator

Piece: TypeAlias = tuple[int, int, int]
"""Document, its first position, number of positions."""


class TrainingStream(RowStream):
    """Training rows from documents.

    An epoch visits the documents in a seeded order, cuts their targets into full rows, drops the incomplete last row
    and visits the rows in a seeded order.

    Args:
        documents: the training split.
        context: tokens T in a row.
        seed: seed of the order; independent of every global generator.

    Raises:
        ConfigError: the split does not fill one row.
    """

    rows_in_epoch: int

    def __init__(self, documents: Split, *, context: int, seed: int):
        self.documents, self.context, self.seed = documents, context, seed
        self.lengths = documents.lengths
        total = int(self.lengths.sum())
        self.rows_in_epoch = total // context
        require(
            self.rows_in_epoch,
            "training.context",
            got=context,
            expected=f"at most the {total} tokens of the training split",
            do="Give more text, or a smaller context.",
        )
        self._order_of = lru_cache(maxsize=2)(self._shuffled)  # rows are read in two threads

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        epoch, index = divmod(r, self.rows_in_epoch)
        order, ends, rows = self._order_of(epoch)
        first = int(rows[index]) * self.context  # target of the epoch at which the row begins
        position = int(np.searchsorted(ends, first, side="right"))  # in the epoch's order of documents
        pieces = []
        filled = 0
        while filled < self.context:
            document = int(order[position])
            length = int(self.lengths[document])
            start = first + filled - (int(ends[position]) - length)
            count = min(length - start, self.context - filled)
            pieces.append((document, start, count))
            filled, position = filled + count, position + 1
        return _filled(self.documents, pieces, self.context)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of ``epoch`` in its order, the ends of their targets, and its rows in their order."""
        generator = counter_generator(self.seed, epoch)
        order = generator.permutation(len(self.lengths))
        return order, self.lengths[order].cumsum(), generator.permutation(self.rows_in_epoch)


class DocumentStream(RowStream):
    """Training rows of one document each, padded to the smallest bucket that it fits in.

    A document that is longer than the largest bucket continues in further rows, in fresh contexts. An epoch visits
    every row once, in a seeded order.

    Args:
        documents: the training split.
        buckets: lengths of rows, rising.
        seed: seed of the order; independent of every global generator.
    """

    rows_in_epoch: int

    def __init__(self, documents: Split, *, buckets: Sequence[int], seed: int):
        self.documents, self.buckets, self.seed = documents, buckets, seed
        rows_D = -(-documents.lengths // buckets[-1])  # rows of every document
        self._ends = rows_D.cumsum()
        self.rows_in_epoch = int(self._ends[-1])
        self._order_of = lru_cache(maxsize=2)(  # rows are read in two threads
            lambda epoch: counter_generator(seed, epoch).permutation(self.rows_in_epoch)
        )

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        piece = self._piece(r)
        return _filled(self.documents, [piece], bucket_of(piece[2], self.buckets))

    def row_length(self, r: int) -> int:
        return bucket_of(self._piece(r)[2], self.buckets)

    def segment_lengths(self, r: int) -> np.ndarray:
        return np.array([self._piece(r)[2]])

    def _piece(self, r: int) -> Piece:
        epoch, index = divmod(r, self.rows_in_epoch)
        row = int(self._order_of(epoch)[index])
        document = int(np.searchsorted(self._ends, row, side="right"))
        length, longest = int(self.documents.lengths[document]), self.buckets[-1]
        first = (row - (int(self._ends[document - 1]) if document else 0)) * longest
        return document, first, min(longest, length - first)


def evaluation_batches(documents: Split, *, batch_size: int, context: int) -> Iterator[Batch]:
    """Every target of every document exactly once, in order.

    A document that does not fit in the rest of its row continues in the next row, unless documents are indivisible.
    Where one of these is longer than ``context``, rows are as long as the longest, and a batch has fewer of them: as
    many tokens as before, or a single row. All batches have the same shape, so that a compiled model sees one: the last
    one is padded.
    """
    batch_size, context = _evaluation_shape(documents, batch_size, context)
    rows = _evaluation_rows(documents, context)
    rows += [[] for _ in range(-len(rows) % batch_size)]
    for first in range(0, len(rows), batch_size):
        parts = zip(*(_filled(documents, pieces, context) for pieces in rows[first : first + batch_size]))
        yield Batch(*(torch.from_numpy(np.stack(part)) for part in parts))


def num_evaluation_batches(documents: Split, *, batch_size: int, context: int) -> int:
    """Number of :func:`evaluation_batches`; reads the lengths of the documents alone."""
    batch_size, context = _evaluation_shape(documents, batch_size, context)
    return -(-len(_evaluation_rows(documents, context)) // batch_size)


def _evaluation_shape(documents: Split, batch_size: int, context: int) -> tuple[int, int]:
    """Rows of a batch and tokens of a row."""
    if documents.indivisible and (longest := int(max(documents.lengths, default=0))) > context:
        return max(1, batch_size * context // longest), longest
    return batch_size, context


def _evaluation_rows(documents: Split, context: int) -> list[list[Piece]]:
    """The pieces of every row."""
    rows: list[list[Piece]] = [[]]
    free = context
    for document, length in enumerate(documents.lengths):
        if documents.indivisible and free < length:
            rows.append([])
            free = context
        first = 0
        while first < length:
            if free == 0:
                rows.append([])
                free = context
            count = min(int(length) - first, free)
            rows[-1].append((document, first, count))
            first, free = first + count, free - count
    return rows


def _filled(
    documents: Split, pieces: Sequence[Piece], context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A row made of pieces, padded at its end: tokens, targets, segments, documents, each (T,)."""
    tokens = np.zeros(context, dtype=np.int64)
    targets = np.full(context, IGNORE_INDEX, dtype=np.int64)
    segments = np.full(context, -1, dtype=np.int32)
    numbers = np.full(context, -1, dtype=np.int64)
    filled = 0
    for segment, (document, first, count) in enumerate(pieces):
        span = slice(filled, filled + count)
        tokens[span], targets[span] = documents.piece(document, first, count)
        segments[span], numbers[span] = segment, document
        filled += count
    return tokens, targets, segments, numbers
