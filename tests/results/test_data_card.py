"""The data card in words, its warning and its refusal."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.results.data_card import check_lossless, check_overlap, describe, is_mostly_seen, repetition, warnings


def card(overlap: float) -> dict[str, Any]:
    measured = {"documents": 312, "clusters": 311, "bytes": 620_000, "overlap": overlap}
    return {"splits": {"train": {"documents": 9_000}, "report": measured}}


def test_a_line_per_measured_split() -> None:
    line = "report: 312 documents, 311 clusters, 620 kB, 7 % of 13-token shingles also in training"
    assert describe(card(0.071)) == [line]


def test_examples_of_a_task_have_no_bytes() -> None:
    split = {"documents": 512, "clusters": 512, "overlap": 0.0}
    assert describe({"splits": {"pilot": split}}) == [
        "pilot: 512 examples, 512 clusters, 0 % of examples also in training"
    ]


def test_a_card_from_before_overlap_was_measured() -> None:
    old = {"splits": {"report": {"documents": 44, "bytes": 88_384}}}
    assert (describe(old), warnings(old)) == (["report: 44 documents, 88.4 kB"], [])


@pytest.mark.parametrize(("overlap", "count"), [(0.2, 0), (0.21, 1)])
def test_more_than_a_fifth_is_a_warning(overlap: float, count: int) -> None:
    assert len(warnings(card(overlap))) == count


def test_more_than_half_is_refused() -> None:
    check_overlap(card(0.5), "report", None, "arms.full.data")
    with pytest.raises(ConfigError, match="a report split of which 51 % is also in the training data"):
        check_overlap(card(0.51), "report", None, "arms.full.data")


def test_a_reason_overrides_the_refusal() -> None:
    check_overlap(card(0.9), "report", "copies on purpose", "arms.full.data")
    assert is_mostly_seen(card(0.9), "report") and not is_mostly_seen(card(0.5), "report")


def lossy(documents: int) -> dict[str, Any]:
    return {"splits": {"report": {"documents": 44, "bytes": 88_384, "lossy_documents": documents}}}


def test_a_lossy_tokenizer_is_refused() -> None:
    check_lossless(lossy(0), "report", None, "arms.full.data")
    with pytest.raises(ConfigError, match="a tokenizer that is lossy on 3 report documents"):
        check_lossless(lossy(3), "report", None, "arms.full.data")


def test_a_reason_allows_a_lossy_tokenizer() -> None:
    check_lossless(lossy(3), "report", "compared with itself", "arms.full.data")


def test_a_lossy_tokenizer_is_a_warning() -> None:
    assert len(warnings(lossy(1))) == 1 and not warnings(lossy(0))


@pytest.mark.parametrize(
    ("epochs", "sentences"),
    [
        ({"a": 0.8, "b": None}, []),
        ({"a": None}, []),
        ({"a": 2.52, "b": 2.49}, ["Training reads its text 2.5 times."]),
        ({"a": 0.9, "b": 3.0}, ["Training reads its text 0.9 times (a), 3 times (b)."]),
    ],
)
def test_epochs_in_words(epochs: dict[str, float | None], sentences: list[str]) -> None:
    assert repetition(epochs) == sentences


@pytest.mark.parametrize(("epochs", "count"), [(4.0, 1), (4.1, 2)])
def test_more_than_four_epochs_are_a_warning(epochs: float, count: int) -> None:
    assert len(repetition({"a": epochs})) == count


def test_a_space_more_or_less_is_stated_and_no_loss() -> None:
    card = {"splits": {"report": {"documents": 44, "lossy_documents": 0, "space_documents": 44}}}
    assert "44 documents of the report split decode with one space more or less" in "".join(warnings(card))
    check_lossless(card, "report", None, "data")
