"""The tables of docs/speed.md are those that the files of measurements give."""

from __future__ import annotations

import re

import pytest
import speed_tables


def test_the_page_is_what_the_script_writes() -> None:
    page = speed_tables.PAGE.read_text(encoding="utf-8")
    assert speed_tables.written(page) == page, "run python benchmarks/speed_tables.py"


def test_a_table_that_was_edited_by_hand_is_written_again() -> None:
    page = speed_tables.PAGE.read_text(encoding="utf-8")
    edited = page.replace("0.63 / 2.06", "0.30 / 1.00")
    assert edited != page
    assert speed_tables.written(edited) == page


def test_a_page_without_a_table_is_refused() -> None:
    page = speed_tables.PAGE.read_text(encoding="utf-8").replace("<!-- table: experts -->", "")
    with pytest.raises(SystemExit, match=r"got tables .*; expected each of .*'experts'"):
        speed_tables.written(page)


def test_a_case_that_is_missing_is_named() -> None:
    with pytest.raises(SystemExit, match=re.escape("got 0 rows with {'op': 'b'}; expected 1.")):
        speed_tables.find([{"op": "a"}], op="b")


@pytest.mark.parametrize(
    ("value", "text"), [(0.6282, "0.63"), (1.325, "1.33"), (9.996, "10.0"), (26.85, "26.9"), (115.48, "115")]
)
def test_milliseconds_have_three_digits(value: float, text: str) -> None:
    assert speed_tables.ms(value) == text
