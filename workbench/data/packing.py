"""Packing documents into rows of tokens, without leakage between documents.

A document's stream is [symbol, t1 … tn, symbol]; every token after the first is predicted exactly once. A row holds
pieces of documents one after another; each piece is a segment of its own and sees nothing of its neighbours.

Legend: B rows, T tokens in a row (the context).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from workbench.config import ConfigError
from workbench.data.streams import IGNORE_INDEX, Batch, RowStream, Split


class TrainingStream(RowStream):
    """Training rows from documents.

    An epoch visits the documents in a seeded order, cuts their targets into full rows, drops the incomplete last row
    and visits the rows in a seeded order.

    Args:
        documents: the training split.
        context: tokens T in a row.
        seed: seed of the order; independent of every global generator.

    Raises:
        ConfigError: when the split does not fill one row.
    """

    def __init__(self, documents: Split, *, context: int, seed: int):
        self.documents, self.context, self.seed = documents, context, seed
        self.lengths = documents.lengths
        self.rows_in_epoch = int(self.lengths.sum()) // context
        if self.rows_in_epoch < 1:
            raise ConfigError.at(
                "training.context",
                got=context,
                expected=f"at most the {int(self.lengths.sum())} tokens of the training split",
                do="Give more text, or a smaller context.",
            )
        self._epoch = -1

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        epoch, index = divmod(r, self.rows_in_epoch)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64)))
            self._order = generator.permutation(len(self.lengths))
            self._ends = self.lengths[self._order].cumsum()
            self._rows = generator.permutation(self.rows_in_epoch)
            self._epoch = epoch
        start = int(self._rows[index]) * self.context
        filled = 0
        tokens = np.empty(self.context, dtype=np.int64)
        targets, documents = np.empty_like(tokens), np.empty_like(tokens)
        segments = np.empty(self.context, dtype=np.int32)
        place = int(np.searchsorted(self._ends, start, side="right"))
        segment = 0
        while filled < self.context:
            document = int(self._order[place])
            begin = start + filled - (int(self._ends[place]) - int(self.lengths[document]))
            count = min(int(self.lengths[document]) - begin, self.context - filled)
            span = slice(filled, filled + count)
            tokens[span], targets[span] = self.documents.piece(document, begin, count)
            segments[span], documents[span] = segment, document
            filled, place, segment = filled + count, place + 1, segment + 1
        return tokens, targets, segments, documents


def evaluation_batches(documents: Split, *, batch_size: int, context: int) -> Iterator[Batch]:
    """Every target of every document exactly once, in order; documents that a row cannot end go on in the next row,
    unless they must be whole.

    Every batch is whole, so that a compiled model sees one shape: the last rows, and rows of nothing, are padded.
    """
    rows: list[list[tuple[int, int, int]]] = [[]]  # (document, first, count) of every piece of every row
    room = context
    for document, length in enumerate(documents.lengths):
        if documents.whole and room < length:
            assert length <= context, "checked with the configuration"
            rows.append([])
            room = context
        first = 0
        while first < length:
            if room == 0:
                rows.append([])
                room = context
            count = min(int(length) - first, room)
            rows[-1].append((document, first, count))
            first, room = first + count, room - count
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        shape = (batch_size, context)
        tokens = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int32)
        numbers = np.full(shape, -1, dtype=np.int64)
        for row, pieces in enumerate(part):
            filled = 0
            for segment, (document, first, count) in enumerate(pieces):
                span = slice(filled, filled + count)
                tokens[row, span], targets[row, span] = documents.piece(document, first, count)
                segments[row, span], numbers[row, span] = segment, document
                filled += count
        yield Batch(*map(torch.from_numpy, (tokens, targets, segments, numbers)))
