"""Shingles: hashes of every run of consecutive words and punctuation marks of a text, whatever its white space.

A token is a run of letters, digits and underscores, or one other character; a character of three or more bytes of
UTF-8 (Chinese, Japanese, Korean, typographic punctuation) begins a token. A text of fewer tokens than the width of a
shingle has one shingle: the whole text. Hashes have 64 bits and depend on the text alone, on every machine.

Legend: N shingles of a batch, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

BATCH_BYTES = 2**19
"""Bytes hashed at once; bounds the memory and fits into a processor's cache."""

_CONSTANTS = np.random.Philox(7).random_raw(256 + 64)
_BYTES, _MULTIPLIERS = _CONSTANTS[:256].copy(), _CONSTANTS[256:] | np.uint64(1)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_SPACES = bytes([9, 10, 11, 12, 13, 28, 29, 30, 31, 32])
_BYTES[list(_SPACES)] = 0  # white space adds nothing to the hash of the token before it
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(_SPACES)] = True
_IS_MARK = np.array([b < 128 and not (chr(b).isalnum() or b == ord("_") or b in _SPACES) for b in range(256)])
_BEGINS = _IS_MARK | (np.arange(256) >= 0xE2)
_ENDS = _IS_MARK | _IS_SPACE


class Batch(NamedTuple):
    """The shingles of documents ``first`` to ``first + size``, or of a part of one long document."""

    first: int
    size: int
    hashes_N: np.ndarray
    """uint64."""
    documents_N: np.ndarray
    """int64: document of each shingle, from 0 for ``first``."""
    is_last: bool
    """Whether the batch ends its documents."""


def shingles(texts: Iterable[str], width: int) -> Iterator[Batch]:
    """Shingles of texts, in batches of about :data:`BATCH_BYTES`.

    A longer text is hashed in parts; a shingle across two of them is left out.

    Args:
        texts: the texts, read once and in order.
        width: tokens of a shingle, at most 64.
    """
    waiting: list[bytes] = []
    first = total = 0
    for text in texts:
        data = text.encode()
        if waiting and total + len(data) > BATCH_BYTES:
            yield Batch(first, len(waiting), *_hash(waiting, width), True)
            first, total, waiting = first + len(waiting), 0, []
        if len(data) > 2 * BATCH_BYTES:
            for start in range(0, len(data), BATCH_BYTES):
                part = data[start : start + BATCH_BYTES]
                yield Batch(first, 1, *_hash([part], width), start + BATCH_BYTES >= len(data))
            first += 1
            continue
        waiting.append(data)
        total += len(data)
    if waiting:
        yield Batch(first, len(waiting), *_hash(waiting, width), True)


def _hash(parts: Sequence[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and part numbers of all shingles of byte strings."""
    data = np.frombuffer(b"\n" + b"\n".join(parts), np.uint8)
    begins, ends = _BEGINS[data], _ENDS[data]
    begins[1:] |= ends[:-1]
    starts = np.flatnonzero(begins & ~_IS_SPACE[data])
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    powers, inverses = _powers(1 << (len(data) - 1).bit_length())
    tokens = np.add.reduceat(_BYTES[data] * powers[: len(data)], starts) * inverses[starts]
    part_starts = np.cumsum([1, *(len(part) + 1 for part in parts)])
    parts_of = np.searchsorted(part_starts, starts, side="right") - 1
    hashes = tokens * _MULTIPLIERS[0]
    for offset in range(1, min(width, len(tokens))):
        same = parts_of[offset:] == parts_of[: len(tokens) - offset]
        hashes[: len(tokens) - offset] += tokens[offset:] * _MULTIPLIERS[offset] * same
    whole = np.zeros(len(tokens), bool)
    whole[: max(0, len(tokens) - width + 1)] = parts_of[width - 1 :] == parts_of[: max(0, len(tokens) - width + 1)]
    whole[np.flatnonzero(np.diff(parts_of, prepend=-1))] = True  # a part of fewer tokens is one shingle
    return _mixed(hashes[whole]), parts_of[whole]


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base from 0 on, and of its inverse, modulo 2**64."""
    powers = np.full((2, count), [[_BASE], [pow(_BASE, -1, 2**64)]], np.uint64)
    powers[:, 0] = 1
    return tuple(np.cumprod(powers, axis=1, dtype=np.uint64))


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every bit depends on every bit."""
    hashes = hashes ^ (hashes >> np.uint64(33))
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))
