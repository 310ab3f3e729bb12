"""Shingles are hashes of runs of tokens; their positions and the batch do not matter."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from workbench.data import shingles as module
from workbench.data.shingles import shingles


def hashes(texts: Sequence[str], width: int) -> list[list[int]]:
    """Hashes of every text."""
    found: list[list[int]] = [[] for _ in texts]
    for batch in shingles(texts, width):
        for document, value in zip(batch.documents_N.tolist(), batch.hashes_N.tolist()):
            found[batch.first + document].append(value)
    return found


def test_tokens_are_words_and_marks() -> None:
    text = "def f(x, y_1): return x+10  # naïve"
    (found,) = hashes([text], 1)
    tokens = re.findall(r"\w+|[^\w\s]", text)
    assert len(found) == len(tokens) and len(set(found)) == len(set(tokens))


@pytest.mark.parametrize("width", [1, 5, 13])
def test_equal_shingles_have_equal_hashes_and_others_do_not(width: int) -> None:
    words = [str(i * i % 23) for i in range(300)]
    (found,) = hashes([" ".join(words)], width)
    tuples = [tuple(words[i : i + width]) for i in range(300 - width + 1)]
    assert len(found) == len(tuples) and len(set(found)) == len(set(tuples)) == len(set(zip(tuples, found)))


def test_white_space_does_not_matter() -> None:
    a, b = hashes(["a b(c)\nd e f", "\n a\tb ( c )\r\n\n  d e f  "], 3)
    assert a == b


def test_no_shingle_spans_two_texts() -> None:
    assert hashes(["a b c d", "e f g h"], 3) == hashes(["a b c d"], 3) + hashes(["e f g h"], 3)


def test_a_short_text_is_one_shingle() -> None:
    assert [len(found) for found in hashes(["a b c", "a b", "x " * 20], 5)] == [1, 1, 16]


def test_the_size_of_a_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(f"{i * k % 997}" for i in range(50)) for k in range(1, 20)]
    expected = hashes(texts, 5)
    monkeypatch.setattr(module, "BATCH_BYTES", 300)
    assert hashes(texts, 5) == expected


def test_a_long_text_is_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    texts = ["x y", " ".join(f"{i:04d}" for i in range(200)), "z"]
    batches = list(shingles(texts, 5))
    assert [(batch.first, batch.size) for batch in batches if batch.is_last] == [(0, 1), (1, 1), (2, 1)]
    assert sum(batch.first == 1 for batch in batches) == 10


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hashes(["the same everywhere"], 2) == [[12176509585900676764, 13111351871171929027]]


def test_bits_are_balanced() -> None:
    (found,) = hashes([" ".join(map(str, range(4000)))], 5)
    bits = (np.array(found, np.uint64)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.04
