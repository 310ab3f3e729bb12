"""The ledger is only appended to, survives crashes and concurrent processes, and shows every change."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.config import ConfigError
from workbench.results.ledger import FILE, Ledger, Opening, documents_fingerprint, history

DOCUMENTS = ["b" * 16, "a" * 16]


def opening(seed: int = 0, **changes: str) -> Opening:
    documents = documents_fingerprint(DOCUMENTS)
    plain = Opening("test", "launch", f"run-{seed}", "full", "setting", seed, documents, at="2026-01-01T00:00:00Z")
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """With three openings: four lines, the first of them the documents."""
    ledger = Ledger(tmp_path / FILE)
    for seed in range(3):
        ledger.open(opening(seed), DOCUMENTS)
    return ledger


def lines(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines()


def test_every_line_holds_the_hash_of_the_line_before(ledger: Ledger) -> None:
    written = lines(ledger)
    previous = [json.loads(line)["previous"] for line in written]
    assert previous == ["0" * 64, *(hashlib.sha256(line).hexdigest() for line in written[:-1])]


def test_the_documents_are_written_once(ledger: Ledger) -> None:
    assert [json.loads(line)["kind"] for line in lines(ledger)] == ["documents", *["opening"] * 3]
    assert ledger.documents == {documents_fingerprint(DOCUMENTS): frozenset(DOCUMENTS)}


def test_the_fingerprint_does_not_depend_on_the_order() -> None:
    assert documents_fingerprint(DOCUMENTS) == documents_fingerprint(DOCUMENTS[::-1])


def test_an_opening_names_who_and_when(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE)
    ledger.open(opening(at=""), DOCUMENTS)
    (recorded,) = ledger.openings
    assert "@" in recorded.who and recorded.at.endswith("Z")


def test_an_opening_is_recorded_once(ledger: Ledger) -> None:
    line = ledger.open(opening(1), DOCUMENTS)
    assert len(lines(ledger)) == 4
    assert line == hashlib.sha256(lines(ledger)[2]).hexdigest()


def test_an_intact_chain_is_verified(ledger: Ledger) -> None:
    ledger.verify()


@pytest.mark.parametrize(
    ("edit", "number"),
    [
        (lambda text: text.replace(b'"seed": 1', b'"seed": 7'), 4),
        (lambda text: b"".join(text.splitlines(keepends=True)[:2] + text.splitlines(keepends=True)[3:]), 3),
        (lambda text: text.replace(b'"kind": "opening"', b'"kind" "opening"', 1), 2),
        (lambda text: text.replace(b"aaaa", b"aaab", 1), 1),
    ],
    ids=["changed", "removed", "damaged", "documents"],
)
def test_a_change_is_an_error_that_names_the_line(ledger: Ledger, edit: object, number: int) -> None:
    ledger.path.write_bytes(edit(ledger.path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=f"line {number}: "):
        ledger.verify()


def test_a_broken_chain_loses_nothing(ledger: Ledger) -> None:
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"seed": 1', b'"seed": 7'))
    ledger.open(opening(3), DOCUMENTS)
    assert [entry.seed for entry in ledger.openings] == [0, 7, 2, 3]
    assert [number for number, _ in ledger.breaks] == [4]


def test_a_line_torn_by_a_crash_is_no_part_of_the_ledger(ledger: Ledger) -> None:
    intact = ledger.path.read_bytes()
    with open(ledger.path, "ab") as file:
        file.write(b'{"kind": "opening", "ablat')
    ledger.verify()
    assert len(ledger.openings) == 3
    ledger.open(opening(3), DOCUMENTS)
    ledger.verify()
    assert ledger.path.read_bytes().startswith(intact) and len(ledger.openings) == 4


APPEND = """
import sys
from pathlib import Path
from workbench.results.ledger import Ledger, Opening, documents_fingerprint

path, name = sys.argv[1:]
documents = ["a", "b"]
for seed in range(40):
    opening = Opening(name, name, f"{seed}", "arm", "s", seed, documents_fingerprint(documents))
    Ledger(Path(path)).open(opening, documents)
"""


@pytest.mark.process
def test_processes_append_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / FILE
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in ("one", "two")]
    assert [process.wait(120) for process in processes] == [0, 0]
    ledger = Ledger(path)
    ledger.verify()
    assert len(ledger.openings) == 80 and len(ledger.hashes) == 81


def test_the_history_counts_an_opening_in_two_ledgers_once(tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    Ledger(tmp_path / FILE).open(opening(0), DOCUMENTS)
    for seed in (0, 1):
        Ledger(tmp_path / "archives" / FILE).open(opening(seed), DOCUMENTS)
    assert [entry.seed for entry in history(tmp_path).openings] == [0, 1]


def test_the_history_is_in_the_order_of_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE)
    for seed, day in ((0, 2), (1, 1)):
        ledger.open(opening(seed, at=f"2026-01-0{day}T00:00:00Z"), DOCUMENTS)
    assert [entry.seed for entry in history(tmp_path).openings] == [1, 0]
