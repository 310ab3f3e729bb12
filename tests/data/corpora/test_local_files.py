"""Local files: text, JSON lines and Parquet read alike; mistakes name file and field."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.data import DataConfig
from workbench.data.corpora.files import Files

TAR = b"a.txt".ljust(257, b"\0") + b"ustar" + b"\0" * 250
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
        ("digits.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}\n", "digits.jsonl line 1: Exceeds the limit"),
        ("deep.jsonl", b"[" * 200_000, "deep.jsonl line 1: .*recursion"),
        ("cut.txt.gz", gzip.compress(b"word " * 999, mtime=0)[:-20], "cut.txt.gz: .*can be read"),
        ("zst.jsonl.zst", b"\x28\xb5\x2f\xfd0000", "a Zstandard file"),
        ("table.csv", b"text\nword\n", "table.csv, a table"),
        ("settings.json", b'{"other": 1}', "JSON lines with the field 'text'"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin.jsonl line 2, which is not UTF-8 at byte 13"),
        ("zero.bin", b"word\0word", "zero.bin, which is not text"),
        ("old.tar", TAR, "old.tar, which is a tar archive"),
        ("old.tar.gz", gzip.compress(TAR, mtime=0), "old.tar.gz, which is a tar archive"),
        ("named.txt", TAR, "named.txt, which is a tar archive"),
        ("cut.json", b'[{"text": "a"}, {"text": "b', "cut.json: Unterminated string"),
        ("open.json", b'[{"text": "a"}', "open.json: the end of the file where an array"),
        ("number.json", b"[12345]", "number.json row 1 does not have as text"),
        ("deep.json", b"[" * 200_000, "deep.json: .*recursion"),
        ("digits.json", b'[{"text": "x", "id": ' + b"9" * 5000 + b"}]", "digits.json: Exceeds the limit"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["ustar", "Archives of the format ustar", "ustar".rjust(261), "ustar".rjust(263)])
def test_text_that_names_the_tar_format(tmp_path: Path, text: str) -> None:
    """No archive: the word is not at byte 257."""
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path) == [text]


@pytest.mark.parametrize("name", ["part.json", "part.JSONL", "part", "part.txt"])
def test_json_lines_are_recognised_by_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_objects(tmp_path: Path, indent: int | None) -> None:
    texts = [*TEXTS, "long " * 100_000, "\u00fc" * 70_000]  # longer than what is read at a time
    array = json.dumps([{"text": text} for text in texts], indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(f" \n{array}\n", encoding="utf-8")
    assert read(tmp_path) == texts


@pytest.mark.parametrize("array", ["[]", "[ ]", "\ufeff[\n]\n"])
def test_an_empty_array(tmp_path: Path, array: str) -> None:
    (tmp_path / "a.json").write_text(array, encoding="utf-8")
    assert read(tmp_path) == []


@pytest.mark.parametrize(("suffix", "library"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files(tmp_path: Path, suffix: str, library: Any) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(library.compress(lines.encode()))
    assert read(tmp_path) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf[{"text": "three"}]')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffour", mtime=0))
    assert read(tmp_path) == ["one", "two", "three", "four"]


def test_line_endings_are_not_translated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree")
    assert read(tmp_path) == ["one\r\ntwo\rthree"]


def test_a_null_is_an_empty_text_in_every_format(tmp_path: Path) -> None:
    rows = ["one", None, "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"text": row} for row in rows]))
    pl.DataFrame({"text": rows}).write_parquet(tmp_path / "c.parquet")
    assert read(tmp_path) == 3 * ["one", "", "two"]


@pytest.mark.parametrize("column", [[["a", "b"]], [1], [b"caf\xe9"], [{"a": "b"}]])
def test_a_column_that_is_no_text(tmp_path: Path, column: list[Any]) -> None:
    pl.DataFrame({"text": column}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"data.corpus.field.*expected a column of strings"):
        read(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"text": TEXTS * 20}).write_parquet(tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20:90] = bytes(byte ^ 0x5A for byte in content[20:90])
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet"):
        read(tmp_path)


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name, text in (("corpus[1].txt", "one"), ("corpus1.txt", "other")):
        (tmp_path / name).write_text(text)
    assert read(tmp_path / "corpus[1].txt") == ["one"]


def test_a_folder_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for folder, text in (("x[1]", "one"), ("x1", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    assert read(tmp_path / "x[1]" / "*.txt") == ["one"]


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet, which has no rows"):
        read(tmp_path)


def test_a_parquet_path_is_no_pattern(tmp_path: Path) -> None:
    for folder, text in (("x[1]", "one"), ("x1", "other")):
        (tmp_path / folder).mkdir()
        pl.DataFrame({"text": [text]}).write_parquet(tmp_path / folder / "a.parquet")
    assert read(tmp_path / "x[1]") == ["one"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text("book")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "books")
    (tmp_path / "books" / "loop").symlink_to(tmp_path / "texts")
    assert read(tmp_path / "texts") == ["book"]


def test_a_file_is_read_once_whatever_names_it(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "texts" / "loop").symlink_to(tmp_path / "texts")
    (tmp_path / "b.txt").symlink_to(tmp_path / "texts" / "a.txt")
    paths = (str(tmp_path / "texts"), str(tmp_path / "**" / "*.txt"), str(tmp_path / "b.txt"))
    assert list(Files(Files.Config(path=paths)).documents()) == ["one"]


@pytest.mark.parametrize("pattern", ["texts", "texts/*.txt"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    (tmp_path / "texts" / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match=r"b\.txt, a link to nothing.*gone\.txt"):
        read(tmp_path / pattern)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_are_streamed(tmp_path: Path, kind: str) -> None:
    rows = [f"{i} " * 2_000 for i in range(3_000)]
    if kind == "json":
        (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in rows]))
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pl.DataFrame({"text": rows}).write_parquet(tmp_path / "a.parquet", row_group_size=100)
    total = sum(map(len, rows))
    del rows
    tracemalloc.start()
    for _ in Files(Files.Config(path=str(tmp_path))).documents():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < total / 3


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
