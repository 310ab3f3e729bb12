"""Numbers and names as people read them."""

from __future__ import annotations

import doctest

from workbench import formatting


def test_examples() -> None:
    assert doctest.testmod(formatting).failed == 0


def test_names_of_no_fields() -> None:
    assert formatting.setting({}) == ""
    assert formatting.distinct_ends([], ".") == []


def test_equal_paths_are_shown_whole() -> None:
    assert formatting.distinct_ends([("a", "b"), ("a", "b")], "/") == ["a/b", "a/b"]
