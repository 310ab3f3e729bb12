"""Local files: plain text (a file is a document), JSON lines or Parquet (a row is a document)."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from workbench.config import ConfigError, nearest
from workbench.data.corpora import Corpus, CorpusConfig, corpora

ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@corpora.register
class Files(Corpus):
    """Text, JSONL or Parquet files by path."""

    class Config(CorpusConfig):
        """Local files."""

        kind: Literal["files"] = "files"
        path: str | tuple[str, ...]
        """A file, a folder (read whole) or a pattern such as texts/**/*.txt; or several of them."""
        format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
        """How to read; auto goes by the ending."""
        field: str = "text"
        """Field or column that holds the text (JSONL, Parquet)."""

    def stamp(self) -> str:
        return "\n".join(f"{path.resolve()} {(at := path.stat()).st_size} {at.st_mtime_ns}" for path in self._paths())

    def documents(self) -> Iterator[str]:
        paths = self._paths()
        for path in paths:
            form = ROWS.get(path.suffix, "text") if self.config.format == "auto" else self.config.format
            if form == "text":
                yield self._read(path)
            elif form == "jsonl":
                for number, line in enumerate(self._read(path).split("\n"), start=1):
                    if line.strip():
                        yield self._field(line, path, number)
            else:
                import polars as pl

                try:
                    columns = pl.read_parquet_schema(path)
                except pl.exceptions.PolarsError as error:
                    raise ConfigError.at(
                        "data.corpus.path", got=f"{path}: {error}", expected="a Parquet file"
                    ) from None
                if self.config.field not in columns:
                    raise self._no_field(columns, str(path))
                yield from (
                    pl.read_parquet(path, columns=[self.config.field])[self.config.field].drop_nulls().cast(pl.String)
                )

    def _paths(self) -> list[Path]:
        given = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        found: set[Path] = set()
        for pattern in given:
            path = Path(pattern).expanduser()
            if path.is_dir():
                matches = [
                    p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)
                ]
            else:
                matches = [Path(p) for p in glob.glob(str(path), recursive=True)]
            matches = [p for p in matches if p.is_file()]
            if not matches:
                there = "" if path.exists() or glob.has_magic(pattern) else ", which is not there"
                raise ConfigError.at(
                    "data.corpus.path",
                    got=f"{pattern}{there}",
                    expected="at least one file",
                    do=f"Paths are relative to {Path.cwd()}.",
                )
            found.update(matches)
        return sorted(found)

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
            expected="a field that holds text",
            do=nearest(self.config.field, list(names)),  # type: ignore[call-overload]
        )
