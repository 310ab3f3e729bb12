"""The text of the Python packages installed here: hundreds of megabytes where nothing can be downloaded.

Its content is that of this machine, so results name the hash of what was read.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from workbench.config import ConfigError
from workbench.data.corpora import Corpus, CorpusConfig, corpora
from workbench.data.corpora.stdlib import texts

ENDINGS = {".py", ".pyi", ".md", ".rst", ".txt"}
LARGEST = 1_000_000
"""Bytes of the largest file that is read; beyond are tables and generated code."""


@corpora.register
class Packages(Corpus):
    """Sources and documentation of the installed Python packages."""

    class Config(CorpusConfig):
        """Installed Python packages."""

        kind: Literal["packages"] = "packages"
        limit_bytes: int | None = None
        """Stop after this many bytes; None reads all."""

    def _files(self) -> list[tuple[str, os.stat_result, Path]]:
        roots = {Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")}
        found = []
        for root in roots:
            for folder, _, names in os.walk(root):
                for name in names:
                    path = Path(folder, name)
                    if path.suffix in ENDINGS and (at := path.stat()).st_size <= LARGEST:
                        found.append((path.relative_to(root).as_posix(), at, path))
        if not found:
            raise ConfigError.at(
                "data.corpus",
                got="no text below " + ", ".join(map(str, sorted(roots))),
                expected="installed packages",
                do="Use corpus 'files' with a path to your own text.",
            )
        return sorted(found, key=lambda entry: entry[0])

    def stamp(self) -> str:
        return "\n".join(f"{name} {at.st_size} {at.st_mtime_ns}" for name, at, _ in self._files())

    def documents(self) -> Iterator[str]:
        yield from texts((path for _, _, path in self._files()), self.config.limit_bytes)
