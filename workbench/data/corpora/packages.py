"""The text of the installed Python packages: hundreds of megabytes on machines that cannot download anything.

Its content depends on the machine, so results record the hash of the text. Files are read in the order of a hash of
their names, so that a limit takes a sample of all packages instead of the first ones of the alphabet.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from workbench.config import require
from workbench.data.corpora import Corpus, CorpusConfig, corpora
from workbench.data.corpora.stdlib import texts

SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
MAX_BYTES = 1_000_000
"""Size of the largest file that is read; larger ones are tables and generated code."""


@corpora.register
class Packages(Corpus):
    """Sources and documentation of the installed Python packages."""

    class Config(CorpusConfig):
        """Installed Python packages."""

        kind: Literal["packages"] = "packages"
        limit_bytes: int | None = None
        """Stop after this many bytes; None reads all."""

    def _files(self) -> list[tuple[str, os.stat_result, Path]]:
        """Name below its root, size and times, path; in the order of a hash of the name."""
        roots = {Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")}
        files = []
        for root in roots:
            for folder, _, names in os.walk(root):
                for path in (Path(folder, name) for name in names):
                    if path.suffix in SUFFIXES and (stat := path.stat()).st_size <= MAX_BYTES:
                        files.append((path.relative_to(root).as_posix(), stat, path))
        require(
            files,
            "data.corpus",
            got="no text below " + ", ".join(map(str, sorted(roots))),
            expected="installed packages",
            do="Use corpus 'files' with a path to your own text.",
        )
        return sorted(files, key=lambda file: hashlib.sha256(file[0].encode("utf-8", "surrogateescape")).digest())

    def stamp(self) -> str:
        return "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat, _ in self._files())

    def documents(self) -> Iterator[str]:
        yield from texts((path for _, _, path in self._files()), self.config.limit_bytes)
