"""Arms look the same everywhere."""

from __future__ import annotations

import pytest

from workbench.dashboards.figures.parts import legend, subplots
from workbench.dashboards.style import label, labels, styles_of


def test_forty_arms_look_different() -> None:
    assert len(set(styles_of([str(i) for i in range(40)]).values())) == 40


def test_colours_repeat_with_another_dash_and_symbol() -> None:
    first, *_, ninth = styles_of([str(i) for i in range(9)]).values()
    assert first.colour == ninth.colour and first.dash != ninth.dash and first.symbol != ninth.symbol


@pytest.mark.parametrize("titles", [(), ("left", "right")], ids=["plain", "titled"])
def test_the_legend_of_many_arms_is_beside_the_plots(titles: tuple[str, ...]) -> None:
    grid, _ = subplots(2, titles=titles)
    position = grid.update_layout(legend=legend([str(i) for i in range(9)])).layout.legend
    assert (position.orientation, position.yref, position.y, position.yanchor) == ("v", "paper", 1, "top")
    assert position.x > 1


def test_labels_are_escaped_and_shortened() -> None:
    assert label("<b>" + "x" * 100, 8) == "&lt;b&gt;…xxxx"


def test_labels_of_different_texts_differ() -> None:
    texts = ["x" * 30 + end + "x" * 30 for end in "ab"] + ["y" * 60]
    assert list(labels(texts).values()) == [*texts[:2], "y" * 23 + "…" + "y" * 24]
