"""Files are replaced whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.files import append_json, locked, read_json, read_jsonl, replacing, replacing_folder, write_json


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_with_everything_in_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with replacing_folder(tmp_path / "a") as temporary:
        (temporary / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/new"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_file_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == {}


def test_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert (read_json(tmp_path / "none"), read_jsonl(tmp_path / "none")) == ({}, [])


def test_a_line_follows_a_torn_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2')
    append_json(tmp_path / "a.jsonl", {"a": 3})
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 3}]


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), locked(tmp_path / "lock", timeout=0) as second:
        assert not second
