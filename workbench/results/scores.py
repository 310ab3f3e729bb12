"""What evaluation suites measured of one model: the folder ``suites/`` of a run, or any other folder.

    <suite>.parquet   the long table of a suite, rewritten atomically after each task: columns in ``SCORE_SCHEMA``, then
                      the labels of its documents. Its metadata keep the settings and the material behind the rows.
    journal.jsonl     the documents of the task in hand: a first line that names the task, then a key and a value per
                      line. Removed when the task is in the table.

A process may be killed at any moment: tasks in a table are never measured again, and the task in hand resumes from its
journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from workbench.config import ConfigError, difference
from workbench.files import append_json, read_jsonl, replacing

__all__ = ["FOLDER", "JOURNAL", "READS", "SCORE_SCHEMA", "ScoreTable", "TaskJournal", "read_scores", "truncate_scores"]

FOLDER = "suites"
"""Folder of the tables in the folder of a run."""
JOURNAL = "journal.jsonl"
SCORE_SCHEMA: dict[str, Any] = {
    "step": pl.Int64,
    "split": pl.String,
    "suite": pl.String,
    "task": pl.String,
    "document": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "count": pl.Float64,
    "higher_is_better": pl.Boolean,
    "upper": pl.Float64,
}
"""Columns of every table: document is null in the row of all documents; count is the denominator behind value; upper is
the largest value of a metric that is a rate, from 0 on, and null for others."""
METADATA = "workbench"
READS = "reads"
"""Name, among the suites of a run, of what the steps of its decoding policy read; "documents" are steps and layers."""

T = TypeVar("T")


class ScoreTable:
    """The table of one suite.

    Args:
        folder: of the tables; created with the first task.
        suite: name of the suite.
        basis: plain data that the rows depend on: settings of the suite, material.

    Raises:
        ConfigError: when the folder has a table of the same name on another basis, or a damaged one.
    """

    def __init__(self, folder: Path, suite: str, basis: Mapping[str, Any]):
        self.folder, self.suite, self.path = folder, suite, folder / f"{suite}.parquet"
        self._basis: dict[str, Any] = json.loads(json.dumps(basis))
        self._frame = pl.DataFrame(schema=SCORE_SCHEMA)
        if self.path.exists():
            self._frame, existing = _read(self.path)
            if changes := difference(existing, self._basis):
                shown = "; ".join(
                    f"{path}: {old!r} there, {new!r} here" for path, (old, new) in list(changes.items())[:4]
                )
                raise ConfigError.at(
                    "name",
                    got=f"{suite!r}, which {self.path} has with other settings ({shown})",
                    expected="a separate name for every setting of a suite",
                    do="Give the suite another name.",
                )

    def has(self, step: int, split: str, task: str) -> bool:
        """Whether the task was measured after this step on this split."""
        key = (pl.col("step") == step) & (pl.col("split") == split) & (pl.col("task") == task)
        return not self._frame.filter(key).is_empty()

    def add(self, step: int, split: str, task: str, rows: pl.DataFrame) -> None:
        """Add the rows of a task (columns of ``SCORE_SCHEMA`` from ``document`` on, and labels), atomically."""
        key = (pl.lit(v, SCORE_SCHEMA[n]).alias(n) for n, v in zip(SCORE_SCHEMA, (step, split, self.suite, task)))
        values = [name for name in SCORE_SCHEMA if name in rows.columns]
        labels = [name for name in rows.columns if name not in SCORE_SCHEMA]
        named = rows.select(*key, *(pl.col(name).cast(SCORE_SCHEMA[name]) for name in values), *labels)
        self._frame = pl.concat([self._frame, named], how="diagonal_relaxed")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.path, self._frame, self._basis)

    def journal(self, step: int, split: str, task: str, on_add: Callable[[], None] = lambda: None) -> TaskJournal:
        """The journal of a task: what an earlier process left of the same task, or an empty one.

        Args:
            on_add: called after every document; may raise to stop.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"suite": self.suite, "step": step, "split": split, "task": task, "basis": self._basis}
        return TaskJournal(self.folder / JOURNAL, about, on_add)


class TaskJournal:
    """Values of single documents, on disk as soon as they are added.

    Args:
        path: the file; that of another task is replaced.
        about: plain data that identifies the task.
        on_add: called after every document.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], on_add: Callable[[], None] = lambda: None):
        self.path, self._on_add = path, on_add
        first, *rest = read_jsonl(path) or [{}]
        self._values: dict[str, Any] = {}
        if first == about:
            self._values = {row["key"]: row["value"] for row in rest if "key" in row and "value" in row}
        else:
            path.unlink(missing_ok=True)
            append_json(path, about)

    def get(self, key: object) -> Any:
        """The value of a document; None if there is none."""
        return self._values.get(str(key))

    def add(self, key: object, value: T) -> T:
        """Store the value of a document, fit for JSON and not None, and return it."""
        append_json(self.path, {"key": str(key), "value": value})
        self._values[str(key)] = value
        self._on_add()
        return value

    def remove(self) -> None:
        """Remove the file: the task is in its table."""
        self.path.unlink(missing_ok=True)


def read_scores(folder: Path) -> pl.DataFrame:
    """The tables of all suites in ``folder``, below one another; a damaged one is left out."""
    frames = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            frames.append(_read(path)[0])
        except ConfigError:
            continue
    return pl.concat([pl.DataFrame(schema=SCORE_SCHEMA), *frames], how="diagonal_relaxed")


def truncate_scores(folder: Path, step: int) -> None:
    """Drop what was measured after ``step``: a run that resumes there measures it again."""
    for path in sorted(folder.glob("*.parquet")):
        try:
            frame, basis = _read(path)
        except ConfigError:
            path.unlink()  # damaged: measured again
            continue
        if (kept := frame.filter(pl.col("step") <= step)).is_empty():
            path.unlink()
        elif len(kept) < len(frame):
            _write(path, kept, basis)
    first: Iterable[dict[str, Any]] = read_jsonl(folder / JOURNAL)[:1]
    if any(not isinstance(about.get("step"), int) or about["step"] > step for about in first):
        (folder / JOURNAL).unlink(missing_ok=True)


def _read(path: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    try:
        basis = json.loads(pl.read_parquet_metadata(path)[METADATA])
        frame = pl.read_parquet(path, glob=False)
        if missing := [name for name in SCORE_SCHEMA if name not in frame.columns]:
            raise ValueError(f"no column {', '.join(missing)}")
        return frame, basis
    except (pl.exceptions.PolarsError, OSError, ValueError, KeyError) as error:
        raise ConfigError.at(
            str(path),
            got=f"a damaged file: {str(error).splitlines()[0]}",
            expected="a table of scores",
            do="Remove it, and measure again.",
        ) from None


def _write(path: Path, frame: pl.DataFrame, basis: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        frame.write_parquet(temporary, metadata={METADATA: json.dumps(basis)})
