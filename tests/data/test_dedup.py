"""Near-duplicates share a cluster."""

from __future__ import annotations

import random

from workbench.data.dedup import MAX_TEXTS_PER_LINE, near_duplicates


def made_up_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["\n".join(f"line {generator.random()} of text number {i}" for _ in range(10)) for i in range(count)]


def test_different_texts_have_different_clusters() -> None:
    assert len(set(near_duplicates(made_up_texts(30)))) == 30


def test_a_text_with_one_more_line_is_a_near_duplicate() -> None:
    texts = made_up_texts(30)
    clusters = near_duplicates([*texts, *(text + "\nanother line that makes it another text" for text in texts[:10])])
    assert clusters[30:] == clusters[:10]


def test_half_of_the_lines_of_the_smaller_text_decide() -> None:
    a, b = (text.splitlines() for text in made_up_texts(2))
    half, less = "\n".join(a[:5] + b[:5]), "\n".join(a[:4] + b[4:])
    assert [len(set(near_duplicates(["\n".join(a), other]))) for other in (half, less)] == [1, 2]


def test_short_lines_are_not_compared() -> None:
    assert len(set(near_duplicates(["short\nlines\n", "short\nlines\nonly"]))) == 2


def test_boilerplate_is_not_compared() -> None:
    licence = "a line that stands at the top of very many files"
    texts = [f"{licence}\n{text}" for text in made_up_texts(MAX_TEXTS_PER_LINE + 1)]
    assert len(set(near_duplicates(texts))) == len(texts)
