"""Local files: plain text (a file is a document), JSON lines, JSON arrays or Parquet (a row is a document)."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, TextIO

from workbench.config import ConfigError, nearest, require
from workbench.data.corpora import BYTE_ORDER_MARK, Corpus, CorpusConfig, corpora, decoded

ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""Suffixes of files with a document per row."""
OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""First bytes of a compressed file -> what decompresses it."""
REFUSED = {
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF file",
}
"""First bytes -> formats that are not read."""
TABLES = {".csv", ".tsv"}
"""Suffixes of tables, whose rows are not documents unless the format says so."""
TAR = b"ustar"
"""At byte 257 of a tar archive."""
ROWS_READ_TOGETHER = 256
"""Rows of a Parquet file in memory at a time."""
ARRAY_CHARACTERS = 2**16
"""Characters of a JSON array read at a time, at least."""
_DECODER, _SPACES = json.JSONDecoder(), re.compile(r"[ \t\n\r]*")


@corpora.register
class Files(Corpus):
    """Text, JSON or Parquet files by path; they may be compressed with gzip, bzip2 or xz.

    Text keeps its bytes: line endings are not translated. A byte-order mark is not part of the text. A null is an empty
    document, and is dropped as such.
    """

    class Config(CorpusConfig):
        """Local files."""

        kind: Literal["files"] = "files"
        path: str | tuple[str, ...]
        """A file, a folder (all files in it that are not hidden, linked ones too) or a pattern such as texts/**/*.txt;
        or several of them."""
        format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
        """File format. auto goes by suffix (.jsonl, .ndjson, .parquet) and content: a file whose first line is a JSON
        object with the field is JSON lines, a .json file that begins with a bracket is an array of such objects."""
        field: str = "text"
        """Field or column with the text (JSON, Parquet)."""

    def stamp(self) -> str:
        return "\n".join(f"{path.resolve()} {(s := path.stat()).st_size} {s.st_mtime_ns}" for path in self._paths())

    def documents(self) -> Iterator[str]:
        readers = {"text": self._text, "jsonl": self._lines, "json": self._array, "parquet": self._column}
        for path in self._paths():
            try:
                yield from readers[self._format(path)](path)
            except UnicodeDecodeError as error:
                raise _error(
                    f"{path}, which is not UTF-8 at byte {error.start}",
                    "UTF-8 text",
                    "Convert it, or choose files by a narrower pattern.",
                ) from None
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise _error(f"{path}: {error}", "a file that can be read", "Copy or download it again.") from None

    # -- paths -------------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        """Every file once, however often links or patterns name it."""
        patterns = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        try:
            paths = sorted({path for pattern in patterns for path in self._matches(pattern)})
        except OSError as error:
            raise _error(
                f"{error.filename}: {error.strerror}", "folders that can be read", "Change their rights."
            ) from None
        first_of = {os.path.realpath(path): path for path in reversed(paths)}
        return sorted(first_of.values())

    @staticmethod
    def _matches(pattern: str) -> list[Path]:
        """The files of one path or pattern. What exists is taken as it is, whatever characters it has: in
        ``runs[1]/*.txt`` only the name of the file is a pattern if there is a folder ``runs[1]``."""
        root = Path(pattern).expanduser()
        if root.is_dir():
            files = list(_walk(root, set()))
        elif root.exists():
            files = [root]
        else:
            folder = next(parent for parent in root.parents if parent.is_dir())
            names = glob.glob(str(root.relative_to(folder)), root_dir=folder, recursive=True)
            files = [folder / name for name in names if not (folder / name).is_dir()]
        files = [path for path in files if _is_file(path)]
        missing = "" if root.exists() or glob.has_magic(pattern) else ", which does not exist"
        require(
            files,
            "data.corpus.path",
            got=f"{pattern}{missing}",
            expected="at least one file",
            do=f"Paths are relative to {Path.cwd()}.",
        )
        return files

    # -- formats -----------------------------------------------------------------------------------------------------

    def _format(self, path: Path) -> str:
        if self.config.format != "auto":
            return self.config.format
        with open(path, "rb") as file:
            first = file.read(8)
        if name := next((name for magic, name in REFUSED.items() if first.startswith(magic)), None):
            raise _error(
                f"{path}, which is {name}",
                "text, JSON or Parquet, plain or compressed with gzip, bzip2 or xz",
                "Unpack or convert it.",
            )
        suffixes = [suffix.lower() for suffix in path.suffixes]
        if any(first.startswith(magic) for magic in OPENERS):
            suffixes = suffixes[:-1]
        with _open(path) as file:
            if file.read(257 + len(TAR))[257:] == TAR:
                raise _error(f"{path}, which is a tar archive", "text, JSON or Parquet", "Unpack it.")
        suffix = suffixes[-1] if suffixes else ""
        if first.startswith(b"PAR1"):
            return "parquet"
        if suffix in ROWS:
            return ROWS[suffix]
        if suffix in TABLES:
            raise _error(
                f"{path}, a table",
                "text, JSON or Parquet",
                "Convert it to Parquet, or set format=text if a whole file is a document.",
            )
        return self._by_content(path, is_json=suffix == ".json")

    def _by_content(self, path: Path, is_json: bool) -> str:
        """jsonl, json or text: by the first line that is not empty."""
        with _open(path) as file:
            start = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK).lstrip()
            while not start and (more := file.read(1)):
                start = more.strip()
            if start.startswith(b"{"):
                try:
                    row = json.loads(start + file.readline())
                except (ValueError, RecursionError):
                    row = {}
                if self.config.field in row:
                    return "jsonl"
        if not is_json:
            return "text"
        if start.startswith(b"["):
            return "json"
        raise _error(
            str(path),
            f"JSON lines with the field {self.config.field!r}, or an array of such objects",
            "Set field, or format=text if a whole file is a document.",
        )

    # -- readers -----------------------------------------------------------------------------------------------------

    def _text(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            data = file.read()
        if b"\0" in data:
            raise _error(f"{path}, which is not text: it has a zero byte", "UTF-8 text", "Choose files by a pattern.")
        yield decoded(data)

    def _lines(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield self._field(_parse(line, f"{path} line {number}"), f"{path} line {number}")

    def _array(self, path: Path) -> Iterator[str]:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(_JsonArray(file, path), start=1):
                yield self._field(row, f"{path} row {number}")

    def _field(self, row: Any, where: str) -> str:
        """The text of a row; a null is an empty text."""
        value = row.get(self.config.field, 0) if isinstance(row, dict) else 0
        if value is None or isinstance(value, str):
            return value or ""
        raise self._no_field(row if isinstance(row, dict) else (), where)

    def _column(self, path: Path) -> Iterator[str]:
        """The texts of a Parquet file, some rows at a time."""
        import polars as pl

        field = self.config.field
        try:
            schema = pl.read_parquet_schema(path)
            if field not in schema:
                raise self._no_field(schema, str(path))
            require(
                schema[field] in (pl.String, pl.Categorical, pl.Enum),
                "data.corpus.field",
                got=f"{field!r}, which {path} has as {schema[field]}",
                expected="a column of strings",
                do="Convert it, or choose another column.",
            )
            column = pl.scan_parquet(path, glob=False).select(pl.col(field).cast(pl.String))
            count = 0
            for batch in column.collect_batches(chunk_size=ROWS_READ_TOGETHER, maintain_order=True):
                count += len(batch)
                yield from batch[field].fill_null("")
        except pl.exceptions.PolarsError as error:
            raise _error(f"{path}: {error}", "a Parquet file that can be read", "Copy or download it again.") from None
        if not count:  # some damaged footers read as a file without rows
            raise _error(f"{path}, which has no rows", "a Parquet file with rows", "Remove it, or download it again.")

    def _no_field(self, names: object, where: str) -> ConfigError:
        others = [name for name in names if name != self.config.field]  # type: ignore[attr-defined]
        return ConfigError.at(
            "data.corpus.field",
            got=f"{self.config.field!r}, which {where} does not have as text",
            expected="a field with text",
            do=nearest(self.config.field, others),
        )


def _error(got: str, expected: str, do: str) -> ConfigError:
    return ConfigError.at("data.corpus.path", got=got, expected=expected, do=do)


def _walk(folder: Path, visited: set[str]) -> Iterator[Path]:
    """Files below ``folder`` that are not hidden. Linked folders are followed, each folder is entered once."""
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, visited)
        else:
            yield path


def _is_file(path: Path) -> bool:
    """Whether ``path`` is a file, not a pipe or socket.

    Raises:
        ConfigError: a link to nothing, which would leave text out silently.
    """
    if not path.exists():
        raise _error(f"{path}, a link to nothing", "files", f"Remove the link, or restore {os.path.realpath(path)}.")
    return path.is_file()


def _open(path: Path) -> IO[bytes]:
    """The file for reading, decompressed if it is compressed."""
    with open(path, "rb") as file:
        first = file.read(8)
    opener = next((opener for magic, opener in OPENERS.items() if first.startswith(magic)), open)
    return opener(path, "rb")


def _parse(data: bytes, where: str) -> Any:
    """JSON, or a ConfigError that names the file and the line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _error(f"{where}, which is not UTF-8 at byte {error.start}", "UTF-8 text", "Convert it.") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise ConfigError.at("data.corpus.path", got=f"{where}: {error}", expected="one JSON object a line") from None


class _JsonArray:
    """The elements of a JSON array, one at a time: the file is never in memory as a whole.

    Args:
        file: the array.
        path: its path, for messages.
    """

    def __init__(self, file: TextIO, path: Path):
        self._file, self._path = file, path
        self._text, self._position = "", 0
        """What has been read since the last element, and how much of it has been parsed."""

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._next() == "]":
            return
        while True:
            yield self._element()
            if self._take(",]") == "]":
                return

    def _more(self) -> bool:
        """Read at least as much as is left, so that a long element is parsed a few times only; False at the end."""
        left = self._text[self._position :]
        more = self._file.read(max(ARRAY_CHARACTERS, len(left)))
        self._text, self._position = left + more, 0
        return bool(more)

    def _next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._position = _SPACES.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def _take(self, expected: str) -> str:
        if not (found := self._next()) or found not in expected:
            raise self._error(f"{found or 'the end of the file'} where an array has {' or '.join(expected)}")
        self._position += 1
        return found

    def _element(self) -> Any:
        while self._next():
            try:
                element, self._position = _DECODER.raw_decode(self._text, self._position)
                return element
            except json.JSONDecodeError as error:  # it may be cut off by the end of what has been read
                if not self._more():
                    raise self._error(error.msg) from None
            except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits
                raise self._error(error) from None
        raise self._error("it ends within the array")

    def _error(self, reason: object) -> ConfigError:
        return _error(f"{self._path}: {reason}", "an array of objects", "Copy or download it again.")
