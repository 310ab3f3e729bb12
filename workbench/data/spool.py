"""Documents of a corpus on disk, each content once: memory grows with their number, not with their text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload


class Spool(Sequence[str]):
    """Texts appended to a file and read back by number.

    Args:
        path: the file; made anew.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb+")  # noqa: SIM115 (closed by close())
        self._ends = array("q", [0])
        self._digest = hashlib.sha256()
        self._seen: set[bytes] = set()
        self.keys: list[bytes] = []
        """SHA-256 of every text."""
        self.read = 0
        """Texts offered, repeated ones included."""

    def add(self, text: str) -> None:
        """Take a text, unless one that differs from it in white space only is there already."""
        data = text.encode(
            "utf-8", "replace"
        )  # half surrogates, which JSON can write and UTF-8 cannot, as question marks
        self.read += 1
        key = hashlib.sha256(data).digest()
        self._digest.update(key)
        words = hashlib.sha256(b" ".join(data.split())).digest()
        if words in self._seen:
            return
        self._seen.add(words)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self.keys.append(key)

    @property
    def digest(self) -> str:
        """Hash of everything that was offered, in order."""
        return self._digest.hexdigest()

    def size(self, index: int) -> int:
        """Bytes of text ``index``."""
        return self._ends[index + 1] - self._ends[index]

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._file.seek(self._ends[index])
        return self._file.read(self.size(index)).decode("utf-8")

    def close(self) -> None:
        """Close the file; the texts cannot be read any more."""
        self._file.close()
