"""Arms look the same everywhere."""

from __future__ import annotations

from workbench.dashboards.style import label, labels, styles_of


def test_forty_arms_look_different() -> None:
    assert len(set(styles_of([str(i) for i in range(40)]).values())) == 40


def test_colours_repeat_with_another_dash() -> None:
    styles = list(styles_of([str(i) for i in range(9)]).values())
    assert styles[0].colour == styles[8].colour and styles[0].dash != styles[8].dash


def test_labels_are_escaped_and_shortened() -> None:
    assert label("<b>" + "x" * 100, 8) == "&lt;b&gt;…xxxx"


def test_labels_of_different_texts_differ() -> None:
    texts = ["x" * 30 + end + "x" * 30 for end in "ab"] + ["y" * 60]
    assert list(labels(texts).values()) == [*texts[:2], "y" * 23 + "…" + "y" * 24]
