"""Texts on disk are read back, each content once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.data.disk_strings import DiskStrings

TEXTS = ["äöü\n", "plain", "  plain  ", "日本語 text", "plain", "half \ud800 surrogate"]


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[DiskStrings]:
    with DiskStrings(tmp_path / "texts") as texts:
        for text in TEXTS:
            texts.add(text)
        yield texts


def test_every_text_is_read_back_once(stored: DiskStrings) -> None:
    assert list(stored) == ["äöü\n", "plain", "日本語 text", "half ? surrogate"]


def test_repeated_texts_are_counted(stored: DiskStrings) -> None:
    assert stored.added == 6


def test_sizes_are_bytes(stored: DiskStrings) -> None:
    assert stored.sizes == [len(text.encode()) for text in stored]


def test_the_digest_depends_on_the_order(stored: DiskStrings, tmp_path: Path) -> None:
    with DiskStrings(tmp_path / "reversed") as other:
        for text in reversed(TEXTS):
            other.add(text)
        assert other.digest != stored.digest


def test_the_file_is_removed(tmp_path: Path) -> None:
    with DiskStrings(tmp_path / "texts") as texts:
        texts.add("a")
    assert not (tmp_path / "texts").exists()
