"""How much of the measured text is in the training text: exact shares of 13-token shingles.

13 tokens is the length of the n-grams by which contamination of evaluation text is usually measured (GPT-3, arXiv
2005.14165, appendix C). Shingles of the measured text are in memory; the training text is read once, at 39 s per
gigabyte on one core.

Legend: N shingles of the measured documents, U different ones, M measured documents, P pairs of shingle and document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from workbench.data.shingles import Batch, shingles

WIDTH = 13
"""Tokens of a shingle."""
CONTAINED = 0.5
"""Share of a measured document's shingles from which on a training document contains it."""
BOILERPLATE = 20
"""Shingles in more measured documents than this do not count for containment, and a measured document in more training
documents than this (a licence, an empty template) removes none of them."""


class Overlap(NamedTuple):
    """What the training text shares with the measured documents."""

    seen_M: np.ndarray
    """int64: shingles of each measured document that are in the training text, without :attr:`containing`."""
    shingles_M: np.ndarray
    """int64: shingles of each measured document."""
    containing: list[int]
    """Training documents that contain a measured document; they are to be left out of training."""


def overlap(measured: Sequence[str], training: Sequence[str]) -> Overlap:
    """Compare measured with training documents.

    Near-duplicates (:mod:`workbench.data.dedup`) are alike as wholes. A measured document may also be a part of a
    longer training document: one that has at least half of its shingles is listed in ``containing``.

    Args:
        measured: the measured parts of the documents.
        training: the documents of the training split; may be on disk.
    """
    index = _Index(measured)
    containing: dict[int, list[int]] = {}
    for batch in shingles(training, WIDTH):
        document_P, shingle_P = index.found(batch)
        index.counts_U += np.bincount(shingle_P, minlength=len(index.counts_U))
        for document, owner in index.contained(document_P, shingle_P):
            containing.setdefault(owner, []).append(batch.first + document)
    dropped = sorted(set(chain(*(found for found in containing.values() if len(found) <= BOILERPLATE))))
    for batch in shingles((training[document] for document in dropped), WIDTH):
        index.counts_U -= np.bincount(index.found(batch)[1], minlength=len(index.counts_U))
    return Overlap(index.seen(), index.shingles_M, dropped)


class _Index:
    """The shingles of the measured documents.

    Args:
        measured: the documents.
    """

    def __init__(self, measured: Sequence[str]):
        batches = list(shingles(measured, WIDTH))
        hashes_N = np.concatenate([batch.hashes_N for batch in batches])
        self._owners_N = np.concatenate([batch.first + batch.documents_N for batch in batches])
        self._hashes_U, self._shingle_N = np.unique(hashes_N, return_inverse=True)
        U, M = len(self._hashes_U), len(measured)
        self.shingles_M = np.bincount(self._owners_N, minlength=M)
        self.counts_U = np.zeros(U, np.int64)
        """Training documents (or parts of long ones) with each shingle."""
        shingle_P, owner_P = np.divmod(np.unique(self._shingle_N * M + self._owners_N), M)
        self._different_M = np.bincount(owner_P, minlength=M)
        self._owner_P = owner_P
        self._first_U = np.searchsorted(shingle_P, np.arange(U))
        self._owners_of_U = np.bincount(shingle_P, minlength=U)
        bits = max(8, (8 * U).bit_length())
        self._shift = np.uint64(64 - bits)
        self._may_contain = np.zeros(2**bits, bool)  # spares the binary search for almost every training shingle
        self._may_contain[self._hashes_U >> self._shift] = True

    def found(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Document of the batch and measured shingle, each pair once, (P,) each."""
        possible = np.flatnonzero(self._may_contain[batch.hashes_N >> self._shift])
        hashes = batch.hashes_N[possible]
        positions = np.minimum(np.searchsorted(self._hashes_U, hashes), len(self._hashes_U) - 1)
        exact = self._hashes_U[positions] == hashes
        pairs = np.unique(batch.documents_N[possible][exact] * len(self._hashes_U) + positions[exact])
        document_P, shingle_P = np.divmod(pairs, len(self._hashes_U))
        return document_P, shingle_P

    def contained(self, document_P: np.ndarray, shingle_P: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pairs of a document of the batch and a measured document that it contains."""
        counted = self._owners_of_U[shingle_P] <= BOILERPLATE
        document_P, shingle_P = document_P[counted], shingle_P[counted]
        repeats = self._owners_of_U[shingle_P]
        within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        owners = self._owner_P[np.repeat(self._first_U[shingle_P], repeats) + within]
        M = len(self.shingles_M)
        pairs, shared = np.unique(np.repeat(document_P, repeats) * M + owners, return_counts=True)
        for pair in pairs[shared >= CONTAINED * self._different_M[pairs % M]].tolist():
            yield divmod(pair, M)

    def seen(self) -> np.ndarray:
        """(M,) shingles of each measured document that the training text has."""
        is_seen_N = self.counts_U[self._shingle_N] > 0
        return np.bincount(self._owners_N, weights=is_seen_N, minlength=len(self.shingles_M)).astype(np.int64)
