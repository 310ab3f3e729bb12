"""The ledger of a folder of results: who opened which report documents with which runs, and when.

``ledger.jsonl`` has one JSON object per line. Lines are only ever appended, and each holds the SHA-256 of the line
before it (``previous``), so that a changed, removed or inserted line is detected. Two kinds:

    documents   a set of report documents: its fingerprint and the content hash of each
    opening     a run that was measured on them: ablation, launch, run, arm, setting, seed, who, at

The line is on disk before the run sees the first report document. A last line without line break, torn by a crash, is
not part of the ledger; the run that wrote it has opened nothing. A chain does not show that its end was cut off or
changed; every run therefore keeps the hash of its line, and every launch that of the last line before it.

All definitions are ours.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from workbench.config import ConfigError
from workbench.files import locked, stamp

__all__ = ["FILE", "ORIGIN", "History", "Ledger", "Opening", "documents_fingerprint", "history"]

FILE = "ledger.jsonl"
"""Name of the ledger in a folder of results."""
ORIGIN = "0" * 64
""":attr:`Ledger.head` of an empty ledger."""


@dataclass(frozen=True)
class Opening:
    """A run that was measured on report documents."""

    ablation: str
    """Its name; the run's folder for a run outside an ablation."""
    launch: str
    """Identifier of the launch: a folder that is removed and launched again has another one."""
    run: str
    """Name of the run's folder."""
    arm: str
    setting: str
    """:attr:`workbench.training.RunConfig.setting`: with the seed it decides the trained weights."""
    seed: int
    documents: str
    """Fingerprint of the report documents (:func:`documents_fingerprint`)."""
    arm_identity: str = ""
    """The arm's setting before tuning."""
    identity: str = ""
    """Hash of the run's configuration."""
    code: str = ""
    who: str = ""
    """user@host."""
    at: str = ""
    """UTC, ISO 8601."""

    @property
    def key(self) -> tuple[str, str, str]:
        """An opening is recorded once: launch, run, documents."""
        return self.launch, self.run, self.documents

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self | None:
        """The opening on a line; None if it is another kind of line, or incomplete."""
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        try:
            return cls(**known) if data.get("kind") == "opening" else None
        except TypeError:
            return None


def documents_fingerprint(digests: Iterable[str]) -> str:
    """Sixteen hexadecimal digits of a set of documents, given the content hash of each in any order."""
    return hashlib.sha256("\n".join(sorted(set(digests))).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Content:
    """A ledger as it was read."""

    openings: tuple[Opening, ...] = ()
    documents: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Fingerprint -> content hashes of the documents."""
    hashes: tuple[str, ...] = ()
    """SHA-256 of every line."""
    lines: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """Key of an opening -> SHA-256 of its line."""
    breaks: tuple[tuple[int, str], ...] = ()
    """Line number (from 1) and fault, of lines that do not continue the chain."""
    torn: bytes = b""
    """What a crash left after the last line break."""


_read: dict[str, tuple[tuple[int, int], _Content]] = {}


class Ledger:
    """A ledger file; it need not exist yet.

    Args:
        path: ``results/ledger.jsonl``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}: {len(self.openings)} openings)"

    @property
    def openings(self) -> tuple[Opening, ...]:
        """Every opening, in the order of the lines."""
        return self._content().openings

    @property
    def documents(self) -> Mapping[str, frozenset[str]]:
        """Fingerprint of a set of report documents -> content hashes of the documents."""
        return self._content().documents

    @property
    def hashes(self) -> tuple[str, ...]:
        """SHA-256 of every line."""
        return self._content().hashes

    @property
    def head(self) -> str:
        """SHA-256 of the last line."""
        return self.hashes[-1] if self.hashes else ORIGIN

    @property
    def breaks(self) -> tuple[tuple[int, str], ...]:
        """Line number (from 1) and fault, of lines that do not continue the chain. Every other line is still read."""
        return self._content().breaks

    def verify(self) -> None:
        """Check the chain.

        Raises:
            ConfigError: naming every line that does not continue it.
        """
        if self.breaks:
            faults = "; ".join(f"line {number}: {fault}" for number, fault in self.breaks)
            raise ConfigError.at(
                str(self.path),
                got=faults,
                expected="lines that each hold the hash of the line before",
                do="Restore the file from a copy. Nothing is lost: other lines are still read and new ones appended, "
                "but every verdict in this folder is exploratory until then.",
            )

    def open(self, opening: Opening, digests: Sequence[str]) -> str:
        """Record an opening, and its documents where they are new; an opening that is recorded stays as it is.

        ``who`` and ``at`` are filled in where they are empty, ``documents`` is checked. The lines are on disk when this
        returns, and other processes may call it at the same time.

        Args:
            opening: the run that is about to be measured.
            digests: content hash of every report document.

        Returns:
            SHA-256 of the opening's line, for the run to keep.
        """
        assert opening.documents == documents_fingerprint(digests)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_suffix(".lock")):
            content = _parse(self.path)
            if opening.key in content.lines:
                return content.lines[opening.key]
            rows: list[dict[str, Any]] = []
            if opening.documents not in content.documents:
                digests = sorted(set(digests))
                rows.append({"kind": "documents", "documents": opening.documents, "digests": digests})
            where = {"who": opening.who or _user(), "at": opening.at or _now()}
            rows.append({"kind": "opening", **asdict(opening), **where})
            return self._append(rows, content)

    def _append(self, rows: Iterable[Mapping[str, Any]], content: _Content) -> str:
        """Append rows with the hash of the line before each; the hash of the last one. Call it with the lock held."""
        head, lines = content.hashes[-1] if content.hashes else ORIGIN, b""
        for row in rows:
            line = json.dumps({**row, "previous": head}).encode()
            head, lines = _hash(line), lines + line + b"\n"
        with open(self.path, "ab") as file:
            if content.torn:
                file.truncate(file.tell() - len(content.torn))
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        return head

    def _content(self) -> _Content:
        """The file, parsed again only after a change."""
        path, current = str(self.path.absolute()), stamp(self.path)
        if current is None:
            return _Content()
        entry = _read.get(path)
        if entry is None or entry[0] != current:
            entry = _read[path] = current, _parse(self.path)
        return entry[1]


def _parse(path: Path) -> _Content:
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return _Content()
    openings: list[Opening] = []
    documents: dict[str, frozenset[str]] = {}
    line_of: dict[tuple[str, str, str], str] = {}
    hashes: list[str] = []
    breaks: list[tuple[int, str]] = []
    head = ORIGIN
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
        except (ValueError, AssertionError):
            row = {}
            breaks.append((number, "no JSON object"))
        if row and row.get("previous") != head:
            breaks.append((number, f"it does not hold the hash of line {number - 1}, or one of the two was changed"))
        head = _hash(line)
        hashes.append(head)
        if opening := Opening.read(row):
            openings.append(opening)
            line_of.setdefault(opening.key, head)
        elif row.get("kind") == "documents":
            digests = frozenset(map(str, row.get("digests", ())))
            if documents_fingerprint(digests) != row.get("documents"):
                breaks.append((number, "the documents do not have the fingerprint of the line"))
            documents[str(row.get("documents"))] = digests
    return _Content(tuple(openings), documents, tuple(hashes), line_of, tuple(breaks), torn)


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True)
class History:
    """The openings of several ledgers as one, each once, oldest first."""

    ledgers: tuple[Ledger, ...]

    @cached_property
    def openings(self) -> tuple[Opening, ...]:
        """Every opening, by time."""
        every = {opening.key: opening for ledger in reversed(self.ledgers) for opening in ledger.openings}
        return tuple(sorted(every.values(), key=lambda opening: opening.at))

    @cached_property
    def documents(self) -> Mapping[str, frozenset[str]]:
        """Fingerprint of a set of report documents -> content hashes of the documents."""
        return {name: digests for ledger in self.ledgers for name, digests in ledger.documents.items()}

    @property
    def breaks(self) -> list[str]:
        """Every fault of a chain, with file and line."""
        return [f"{ledger.path}, line {number}: {fault}" for ledger in self.ledgers for number, fault in ledger.breaks]


def history(results: str | Path) -> History:
    """The ledger of a folder of results with those of the folders directly in it (single runs, archives)."""
    results = Path(results)
    return History(tuple(map(Ledger, [results / FILE, *sorted(results.glob(f"*/{FILE}"))])))
