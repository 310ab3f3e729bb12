"""Patterns: pure functions over names."""

from __future__ import annotations

import pytest

from workbench.config import ConfigError
from workbench.model.pattern import check_names, tile


def test_a_pattern_is_tiled_over_the_depth() -> None:
    assert tile("a a b", 6) == ["a", "a", "b", "a", "a", "b"]


def test_a_name_can_stand_for_a_pair_of_layers() -> None:
    assert tile("a b", 8, layers_per_name=2) == ["a", "b", "a", "b"]


def test_an_empty_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one name"):
        tile(" ", 4)


@pytest.mark.parametrize(
    ("layers_per_name", "message"),
    [(1, "got '3 names for depth=4'; .* divides the depth. .*multiple of 3, or"), (2, "in pairs. .*multiple of 6, or")],
)
def test_a_pattern_divides_the_depth(layers_per_name: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tile("a b c", 4, layers_per_name=layers_per_name, hint=", or look again")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'ful'; expected a registered mixer. Nearest valid name: 'full'"):
        check_names(["gdn", "ful"], ["full", "gdn"], "mixer")
