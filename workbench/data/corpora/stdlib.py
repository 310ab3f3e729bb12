"""The source text of Python's standard library: real text on every machine, without a network.

It is the default corpus because an upgrade of a package does not change it: data prepared today, by a pilot or on
another machine, is the data of tomorrow's ablation. Its content depends on the Python version, so results record the
hash of the text. Corpus ``packages`` is larger and more varied, and changes with every installation.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from workbench.config import require
from workbench.data.corpora import Corpus, CorpusConfig, corpora, decoded

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
"""Folders that are not read: installed packages, and tests (not on every machine)."""


def texts(paths: Iterable[Path], limit_bytes: int | None) -> Iterator[str]:
    """The text of files, up to ``limit_bytes`` in total; files that are unreadable or not UTF-8 are skipped."""
    left = limit_bytes
    for path in paths:
        if left is not None and left <= 0:
            return
        try:
            text = decoded(path.read_bytes())
        except (UnicodeDecodeError, OSError):
            continue
        if left is not None:
            left -= len(text.encode())
        yield text


@corpora.register
class StandardLibrary(Corpus):
    """Python sources of the running interpreter's standard library."""

    class Config(CorpusConfig):
        """Python's standard library."""

        kind: Literal["stdlib"] = "stdlib"
        limit_bytes: int | None = None
        """Stop after this many bytes; None reads all (about 11 MB)."""

    def stamp(self) -> str:
        return f"{sysconfig.get_paths()['stdlib']} {platform.python_version()} {platform.python_build()}"

    def documents(self) -> Iterator[str]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in root.rglob("*.py") if not EXCLUDED.intersection(path.relative_to(root).parts)]
        require(
            paths,
            "data.corpus",
            got=f"no Python source below {root}",
            expected="the standard library",
            do="Use corpus 'files' with a path to your own text.",
        )
        yield from texts(sorted(paths, key=lambda path: path.relative_to(root).as_posix()), self.config.limit_bytes)
