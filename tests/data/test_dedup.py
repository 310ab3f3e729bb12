"""Near-duplicates share a cluster, however many they are and however they are laid out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from workbench.data.dedup import BINS, near_duplicates, signatures


def made_up_texts(count: int, words: int = 300) -> list[str]:
    generator = random.Random(0)
    return [" ".join(f"{generator.random():.6f}" for _ in range(words)) for _ in range(count)]


def clusters(texts: list[str]) -> int:
    return len(set(near_duplicates(texts).tolist()))


def test_different_texts_have_different_clusters() -> None:
    assert clusters(made_up_texts(30)) == 30


def test_a_text_with_one_more_line_is_a_near_duplicate() -> None:
    texts = made_up_texts(30)
    numbers = near_duplicates([*texts, *(text + "\nanother line that makes it another text" for text in texts[:10])])
    assert numbers[30:].tolist() == numbers[:10].tolist()


@pytest.mark.parametrize("copies", [50, 51, 400])
def test_any_number_of_copies_is_one_cluster(copies: int) -> None:
    body = "\n".join(f"this is licence line number {i} of a long text" for i in range(100))
    assert clusters([f"{body}\nCopyright holder number {k:04d} of many" for k in range(copies)]) == 1


def test_one_line_documents_that_differ_in_a_word() -> None:
    text = " ".join(f"word{i}" for i in range(2000))
    assert clusters([text, text.replace("word1999", "another")]) == 1


def test_a_copy_at_another_width() -> None:
    text = "\n".join(f"a line of ordinary text with number {i}" for i in range(40))
    assert clusters([text, text.replace("text with", "text\n    with")]) == 1


def test_files_of_short_lines() -> None:
    text = "\n".join(f"x{i} = {i}" for i in range(200))
    assert clusters([text, text.replace("x7 = 7", "x7 = 8")]) == 1


def test_a_text_without_spaces() -> None:
    text = "".join(chr(0x4E00 + (i * i * 37) % 2000) for i in range(600))
    assert clusters([text, text[:-5] + "\u4e00" * 5, text[::-1]]) == 2


def test_texts_longer_than_a_batch() -> None:
    text = " ".join(f"{i * i % 99991:x}" for i in range(400_000))
    assert clusters([text, "one word first " + text, text[::-1]]) == 2


def test_boilerplate_does_not_join_different_texts() -> None:
    licence = "a licence that stands at the top of very many files " * 3
    assert clusters([f"{licence}\n{text}" for text in made_up_texts(60)]) == 60


@pytest.mark.parametrize("words", [10, 60, 1000])
def test_signatures_estimate_the_jaccard_index(words: int) -> None:
    """Texts with half of their words in common have a Jaccard index of 5-token shingles of (h - 4) / (2n - h - 4)."""
    generator = random.Random(1)
    estimates, half = [], words // 2
    for _ in range(60):
        common, *others = ([f"w{generator.randrange(10**9)}" for _ in range(half)] for _ in range(3))
        a, b = signatures([" ".join(common + other) for other in others])
        estimates.append((a == b).mean())
    exact = (half - 4) / (2 * (2 * half - 4) - (half - 4))
    assert np.mean(estimates) == pytest.approx(exact, abs=0.035)


def test_signatures_do_not_depend_on_the_other_texts() -> None:
    texts = made_up_texts(5)
    assert np.array_equal(signatures(texts)[2:3], signatures(texts[2:3])) and signatures(texts).shape == (5, BINS)
