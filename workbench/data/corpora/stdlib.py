"""The source text of Python's own standard library: real text on every machine, no network needed.

Its content varies with the Python version, so results name the hash of what was read.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from workbench.config import ConfigError
from workbench.data.corpora import Corpus, CorpusConfig, corpora

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
"""Folders not read: packages that are not the library's, and tests (not on every machine)."""


@corpora.register
class StandardLibrary(Corpus):
    """Python sources of the running interpreter's standard library."""

    class Config(CorpusConfig):
        """Python's standard library."""

        kind: Literal["stdlib"] = "stdlib"
        limit_bytes: int | None = None
        """Stop after this many bytes; None reads all (about 11 MB)."""

    def documents(self) -> Iterator[str]:
        root = Path(sysconfig.get_paths()["stdlib"])
        left = self.config.limit_bytes
        found = False
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            if LEFT_OUT.intersection(path.relative_to(root).parts):
                continue
            if left is not None and left <= 0:
                break
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            found = True
            if left is not None:
                left -= len(text.encode())
            yield text
        if not found:
            raise ConfigError.at("data.corpus", got=f"no Python source below {root}", expected="the standard library",
                                 do="Use corpus 'files' with a path to your own text.")  # fmt: skip
