"""A trial killed between any two of its file operations resumes to the same files.

One run is watched: before every operation on a file below its folder, the folder is copied. Each copy is what a kill at
that moment leaves behind.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import make_run, run_fields

from workbench.results import RunFolder
from workbench.results.ledger import FILE, Ledger
from workbench.training import checkpoint
from workbench.training.checkpoint import checkpoints_in, load_checkpoint
from workbench.training.trial import train

TIMES = ("seconds", "tokens_per_second", "flops_per_second", "memory_bytes")
"""Fields of a line of metrics that the clock decides."""


class Watch:
    """Copies a folder before every operation that changes a file in it.

    Args:
        folder: what is copied.
        copies: where to.
    """

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies = folder, copies
        self.count = 0
        self._is_copying = False
        self._copied: dict[Path, bytes | None] = {}

    def before(self, *paths: Any) -> None:
        """Copy the folder if one of ``paths`` is in it."""
        inside = any(isinstance(path, str | Path) and self.folder in Path(path).parents for path in paths)
        if not inside or self._is_copying:
            return
        self._is_copying = True
        files = {path: path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")}
        if files != self._copied:  # the last operation has changed something
            shutil.copytree(self.folder, self.copies / f"{self.count:03d}" / self.folder.name)
            self.count, self._copied = self.count + 1, files
        self._is_copying = False

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Watch the functions by which Python, safetensors and polars change files."""
        for module, name in (
            (os, "replace"),
            (os, "unlink"),
            (os, "mkdir"),
            (os, "rmdir"),
            (shutil, "rmtree"),
            (checkpoint, "save_file"),
            (pl.DataFrame, "write_parquet"),
        ):
            patch.setattr(module, name, self._watched(getattr(module, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", self._watched_open(module.open))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.before(*arguments)
            return function(*arguments, **options)

        return call

    def _watched_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                self.before(path)
            return function(path, mode, *arguments, **options)

        return call


Watched = tuple[RunFolder, list[Path]]


@pytest.fixture(scope="module")
def watched(corpus: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A finished run, and the copies of its folder, oldest first."""
    path = tmp_path_factory.mktemp("watched")
    model = {"depth": 1}
    training = {"tokens": 3 * 2 * 32, "checkpoint_every": 1, "evaluations": 1}
    folder = make_run(path / "watched", cache, run_fields(corpus, model=model, training=training))
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(folder.path, path / "copies")
        watch.patch(patch)
        assert train(folder.path, cache)["status"] == "done"
    yield folder, sorted((path / "copies").iterdir())


def content(folder: RunFolder) -> dict[str, Any]:
    """Everything that a run leaves, but the clock and its events."""
    (*_, last) = checkpoints_in(folder.path / "checkpoint")
    state = {name: value for name, value in load_checkpoint(last).items() if name != "seconds"}
    return {
        "status": folder.status()["status"],
        "result": {name: value for name, value in folder.result().items() if name != "seconds"},
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in folder.metrics()],
        "evaluations": folder.evaluations(),
        "diagnostics": folder.diagnostics(),
        "report": (folder.path / "report.parquet").read_bytes(),
        "checkpoints": [path.name for path in checkpoints_in(folder.path / "checkpoint")],
        "state": repr(state),
        "temporary": sorted(path.name for path in folder.path.rglob(".*")),
    }


def test_killed_between_any_two_file_operations_it_ends_with_the_same_files(watched: Watched, cache: Path) -> None:
    whole, copies = watched
    expected = content(whole)
    assert len(copies) > 40
    wrong = []
    for copy in copies:
        killed = RunFolder(copy / whole.path.name)
        before = killed.status()["status"]
        assert before in ("waiting", "killed", "done")
        assert train(killed.path, cache)["status"] == "done"
        found = content(killed)
        wrong += [(copy.name, name) for name in expected if found[name] != expected[name]]
    assert wrong == []


def test_the_ledger_has_one_opening_of_it(watched: Watched, cache: Path) -> None:
    openings = Ledger(cache.parent / FILE).openings
    assert [opening.run for opening in openings].count(watched[0].path.name) == 1
