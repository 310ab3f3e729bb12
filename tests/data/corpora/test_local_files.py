"""Local files: text, JSON lines and Parquet read alike; mistakes name file and field."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.data import DataConfig
from workbench.data.corpora.files import Files

TEXTS = [f"text number {i} with \u2028 and \x85 in it, word {i * i}" for i in range(8)]


def read(path: Path, field: str = "text") -> list[str]:
    return list(Files(Files.Config(path=str(path), field=field)).documents())


def test_a_line_of_json_is_a_document(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert read(tmp_path / "a.jsonl", "body") == TEXTS


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    pl.DataFrame({"body": TEXTS}).write_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "body") == TEXTS


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("x.jsonl", b'{"txt": "a"}\n', "line 1 .*Nearest valid name: 'txt'"),
        ("y.jsonl", b"{no\n", "line 1: .*one JSON object a line"),
        ("bad.parquet", b"xxxx", "a Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_without_the_field(tmp_path: Path) -> None:
    pl.DataFrame({"txt": ["a"]}).write_parquet(tmp_path / "z.parquet")
    with pytest.raises(ConfigError, match=r"data.corpus.field.*Nearest valid name: 'txt'"):
        read(tmp_path / "z.parquet")


def test_a_path_without_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.corpus.path: got .*at least one file"):
        read(tmp_path / "none")


def test_an_unknown_corpus_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'stdlib'"):
        DataConfig.parse({"corpus": "stdlb"})
