"""Shares of 13-token shingles in training, against a set of tuples."""

from __future__ import annotations

import random

from workbench.data.overlap import BOILERPLATE, overlap

GENERATOR = random.Random(0)


def text(words: int) -> list[str]:
    return [f"w{GENERATOR.randrange(10**9)}" for _ in range(words)]


def joined(*parts: list[str]) -> str:
    return " ".join(word for part in parts for word in part)


def test_shares_agree_with_sets_of_tuples() -> None:
    pool = [text(30) for _ in range(12)]
    documents = [[word for part in GENERATOR.sample(pool, 3) for word in part] + text(90) for _ in range(40)]
    measured, training = documents[:10], documents[10:]
    found = overlap([joined(words) for words in measured], [joined(words) for words in training])
    known = {tuple(words[i : i + 13]) for words in training for i in range(len(words) - 12)}
    expected = [sum(tuple(words[i : i + 13]) in known for i in range(len(words) - 12)) for words in measured]
    assert found.seen_M.tolist() == expected and found.shingles_M.tolist() == [168] * 10
    assert found.containing == []


def test_a_training_document_that_contains_a_measured_one_is_found_and_not_counted() -> None:
    measured, others = text(100), [text(500) for _ in range(3)]
    found = overlap([joined(measured)], [joined(others[0]), joined(others[1], measured, others[2])])
    assert (found.containing, found.seen_M.tolist()) == ([1], [0])


def test_half_of_the_measured_document_is_needed() -> None:
    measured = text(112)
    found = overlap([joined(measured)], [joined(text(500), measured[:61]), joined(text(500), measured[:62])])
    assert (found.containing, found.seen_M.tolist()) == ([1], [49])


def test_boilerplate_removes_no_training_document() -> None:
    licence = text(100)
    found = overlap([joined(licence)], [joined(licence, text(500)) for _ in range(BOILERPLATE + 1)])
    assert (found.containing, found.seen_M.tolist()) == ([], [88])
