"""Installed packages as a corpus."""

from __future__ import annotations

from workbench.data.corpora.packages import Packages

CORPUS = Packages(Packages.Config(limit_bytes=300_000))


def test_reading_stops_behind_the_limit() -> None:
    assert 300_000 <= sum(len(text.encode()) for text in CORPUS.documents()) < 1_300_001


def test_the_order_is_fixed() -> None:
    assert list(CORPUS.documents()) == list(CORPUS.documents())


def test_a_limit_takes_a_sample_of_all_packages() -> None:
    assert len({name.split("/")[0] for name, _, _ in CORPUS._files()[:60]}) > 5


def test_the_stamp_is_that_of_unchanged_files() -> None:
    assert CORPUS.stamp() == CORPUS.stamp()
