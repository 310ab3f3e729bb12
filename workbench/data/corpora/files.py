"""Local files: plain text (a file is a document), JSON lines or Parquet (a row is a document)."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from workbench.config import ConfigError, nearest, require
from workbench.data.corpora import Corpus, CorpusConfig, corpora

ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""Suffixes of files with a document per row."""


@corpora.register
class Files(Corpus):
    """Text, JSONL or Parquet files by path."""

    class Config(CorpusConfig):
        """Local files."""

        kind: Literal["files"] = "files"
        path: str | tuple[str, ...]
        """A file, a folder (all files in it) or a pattern such as texts/**/*.txt; or several of them."""
        format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
        """File format; auto goes by the suffix."""
        field: str = "text"
        """Field or column with the text (JSONL, Parquet)."""

    def stamp(self) -> str:
        return "\n".join(f"{path.resolve()} {(s := path.stat()).st_size} {s.st_mtime_ns}" for path in self._paths())

    def documents(self) -> Iterator[str]:
        for path in self._paths():
            kind = ROWS.get(path.suffix, "text") if self.config.format == "auto" else self.config.format
            if kind == "text":
                yield self._read(path)
            elif kind == "jsonl":
                for number, line in enumerate(self._read(path).split("\n"), start=1):
                    if line.strip():
                        yield self._field(line, path, number)
            else:
                yield from self._column(path)

    def _paths(self) -> list[Path]:
        patterns = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        return sorted({path for pattern in patterns for path in self._matches(pattern)})

    @staticmethod
    def _matches(pattern: str) -> list[Path]:
        """The files of one pattern; of a folder, all that are not hidden."""
        root = Path(pattern).expanduser()
        if root.is_dir():
            below = ((path, path.relative_to(root).parts) for path in root.rglob("*"))
            candidates = [path for path, parts in below if not any(part.startswith(".") for part in parts)]
        else:
            candidates = [Path(name) for name in glob.glob(str(root), recursive=True)]
        files = [path for path in candidates if path.is_file()]
        missing = "" if root.exists() or glob.has_magic(pattern) else ", which does not exist"
        require(
            files,
            "data.corpus.path",
            got=f"{pattern}{missing}",
            expected="at least one file",
            do=f"Paths are relative to {Path.cwd()}.",
        )
        return files

    def _column(self, path: Path) -> Iterator[str]:
        """The texts of a Parquet file."""
        import polars as pl

        try:
            columns = pl.read_parquet_schema(path)
        except pl.exceptions.PolarsError as error:
            raise ConfigError.at("data.corpus.path", got=f"{path}: {error}", expected="a Parquet file") from None
        if self.config.field not in columns:
            raise self._no_field(columns, str(path))
        frame = pl.read_parquet(path, columns=[self.config.field])
        yield from frame[self.config.field].drop_nulls().cast(pl.String)

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError.at(
                "data.corpus.path",
                got=f"{path}, which is not UTF-8 at byte {error.start}",
                expected="UTF-8 text",
                do="Convert it, or choose files by a narrower pattern.",
            ) from None

    def _field(self, line: str, path: Path, number: int) -> str:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError.at(
                "data.corpus.path", got=f"{path} line {number}: {error}", expected="one JSON object a line"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get(self.config.field), str):
            raise self._no_field(row if isinstance(row, dict) else (), f"{path} line {number}")
        return row[self.config.field]

    def _no_field(self, names: object, where: str) -> ConfigError:
        return ConfigError.at(
            "data.corpus.field",
            got=f"{self.config.field!r}, which {where} does not have as text",
            expected="a field with text",
            do=nearest(self.config.field, list(names)),  # type: ignore[call-overload]
        )
