"""Ranges as scales: what is a number, and whether distances are ratios."""

from __future__ import annotations

import pytest

from workbench.ranges import Range


@pytest.mark.parametrize(
    ("choice", "logarithmic"),
    [
        (Range(values=(1e-3, 3e-3, 9e-3)), True),
        (Range(values=(0.1, 0.2, 0.3)), False),
        (Range(values=(0.0, 0.1, 1.0)), False),
        (Range(low=1e-3, high=1e-2, log=True), True),
        (Range(low=1e-3, high=1e-2), False),
    ],
)
def test_listed_values_are_logarithmic_where_that_spaces_them_evenly(choice: Range, logarithmic: bool) -> None:
    assert choice.is_numeric
    assert choice.is_logarithmic is logarithmic


@pytest.mark.parametrize("values", [("wsd", "cosine"), (True, False), (1e-3,)])
def test_words_and_single_values_have_no_scale(values: tuple[object, ...]) -> None:
    assert not Range(values=values).is_numeric  # type: ignore[arg-type]
