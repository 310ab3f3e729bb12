"""The language in which rows are chosen."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.results.filters import Filter, find_column

ROWS: list[dict[str, Any]] = [
    {"arm": "sliding", "stage": "confirmation", "report": 2.7, "learning_rate": 0.003, "status": "done"},
    {"arm": "sliding", "stage": "tuning", "report": None, "learning_rate": 0.001, "status": "out_of_memory"},
    {"arm": "full", "stage": "confirmation", "report": 2.9, "learning_rate": 0.002, "status": "done"},
]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", [0, 1, 2]),
        ("sliding confirmation", [0]),
        ("CONFIRMATION", [0, 2]),
        ('"sliding confirmation"', [0]),
        ('"confirmation sliding"', []),
        ("report<2.8", [0]),
        ("report < 2.8", [0]),
        ("lr>0.002", [0]),
        ("lr>=2e-3", [0, 2]),
        ("learning_rate=0.001", [1]),
        ("learn!=0.001 sliding", [0]),
        ("arm=Full", [2]),
        ('stage="tuning"', [1]),
        ("status!=done", [1]),
        ("report!=2.7", [2]),
        ("nothing", []),
    ],
)
def test_rows_are_chosen(text: str, chosen: list[int]) -> None:
    found = Filter.parse(text, ROWS[0])
    assert [i for i, row in enumerate(ROWS) if found.matches(row)] == chosen


def test_words_are_sought_in_what_is_shown() -> None:
    assert Filter.parse("500 k", ["tokens"]).matches({"tokens": 499_712}, "500 k")


@pytest.mark.parametrize("value", [True, "fast"])
def test_only_numbers_are_larger(value: Any) -> None:
    assert not Filter.parse("speed>0", ["speed"]).matches({"speed": value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate>1", "filter: got 'rate'; expected a column.*learning_rate"),
        ("st=done", "filter: got 'st'; expected one column. It may mean stage, status"),
        ("lr>fast", "got 'lr>fast'; expected a number after >"),
    ],
)
def test_a_mistake_is_named(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Filter.parse(text, ROWS[0])


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("report", "report"),
        ("lr", "learning_rate"),
        ("hidden", "moe.hidden"),
        ("tokens per second", "tokens_per_second"),
    ],
)
def test_columns_have_short_names(name: str, column: str) -> None:
    columns = ["report", "report_sd", "learning_rate", "moe.hidden", "tokens", "tokens_per_second"]
    assert find_column(name, columns) == column


def test_numbers_as_names_and_truth_as_tables_show_it() -> None:
    row = {"arm": "16", "chosen": True, "seed": 16}
    for text in ("arm=16", "seed=16", "chosen=yes"):
        assert Filter.parse(text, row).matches(row), text
    for text in ("arm!=16", "chosen=no", "arm>3"):
        assert not Filter.parse(text, row).matches(row), text
