"""Installed packages as a corpus."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from workbench.data.corpora.packages import Packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 20 packages with three files each, of 1,000 bytes; nothing else is installed."""
    for number in range(60):
        path = tmp_path / f"package{number // 3:02d}" / f"part{number % 3}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number:03d} " * 250)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib"), str(tmp_path)))
    return tmp_path


def corpus(limit_bytes: int | None = None) -> Packages:
    return Packages(Packages.Config(limit_bytes=limit_bytes))


def test_every_file_is_read(installed: Path) -> None:
    assert sorted(text[:3] for text in corpus().documents()) == [f"{number:03d}" for number in range(60)]


def test_reading_stops_behind_the_limit(installed: Path) -> None:
    assert len(list(corpus(7_500).documents())) == 8


def test_the_order_is_fixed(installed: Path) -> None:
    assert list(corpus().documents()) == list(corpus().documents())


def test_a_limit_takes_a_sample_of_all_packages(installed: Path) -> None:
    assert len({int(text[:3]) // 3 for text in corpus(12_000).documents()}) > 5


def test_the_stamp_changes_with_a_file(installed: Path) -> None:
    before = corpus().stamp()
    assert corpus().stamp() == before
    os.utime(installed / "package07" / "part1.py", (1, 1))
    assert corpus().stamp() != before


def test_byte_order_marks_and_line_endings_are_as_in_local_files(installed: Path) -> None:
    (installed / "package00" / "part0.py").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert "one\r\ntwo" in list(corpus().documents())


def test_files_that_are_not_text_are_left_out(installed: Path) -> None:
    (installed / "package00" / "part0.py").write_bytes(b"caf\xe9")
    assert len(list(corpus().documents())) == 59
