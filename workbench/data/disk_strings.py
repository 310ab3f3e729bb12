"""Deduplicated texts on disk: memory grows with their number, not with their size."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Self, overload


class DiskStrings(Sequence[str]):
    """Texts appended to a temporary file and read back by number. Repeated texts are stored once.

    A context manager: the file is removed at the end.

    Args:
        path: the file; overwritten.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "wb+")  # noqa: SIM115 (closed by __exit__)
        self._ends = array("q", [0])
        self._digest = hashlib.sha256()
        self._normalised: set[bytes] = set()
        self.keys: list[bytes] = []
        """SHA-256 of every stored text."""
        self.added = 0
        """Texts passed to :meth:`add`, repeated ones included."""

    def add(self, text: str) -> None:
        """Store a text, unless one that differs in white space only is already stored.

        Lone surrogates, which JSON can encode and UTF-8 cannot, become question marks.
        """
        data = text.encode("utf-8", "replace")
        self.added += 1
        key = hashlib.sha256(data).digest()
        self._digest.update(key)
        normalised = hashlib.sha256(b" ".join(data.split())).digest()
        if normalised in self._normalised:
            return
        self._normalised.add(normalised)
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self.keys.append(key)

    @property
    def digest(self) -> str:
        """Hash of all added texts, in order."""
        return self._digest.hexdigest()

    @property
    def sizes(self) -> list[int]:
        """Bytes of every stored text."""
        return [end - start for start, end in zip(self._ends, self._ends[1:])]

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
        return self._file.read(self._ends[index + 1] - self._ends[index]).decode("utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
