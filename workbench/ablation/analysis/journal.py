"""What is known of an ablation in a few lines: its question, its verdict, why, and the notes of people."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.ablation.folder import Note
    from workbench.ablation.run import AblationRun
    from workbench.ablation.verdict.verdict import ArmVerdict, Verdict

__all__ = ["Entry", "Finding", "entry_of"]


@dataclass(frozen=True)
class Finding:
    """What came out for one arm."""

    name: str
    """Its display name."""
    word: str
    why: str
    """A sentence."""


@dataclass(frozen=True)
class Entry:
    """An ablation in the journal."""

    name: str
    folder: str
    created: str
    unit: str
    question: str
    """Empty if none was declared."""
    state: str
    """Why there is no finding yet; empty where there is one."""
    exploratory: str
    findings: tuple[Finding, ...]
    tags: tuple[str, ...]
    notes: tuple[Note, ...]


def entry_of(run: AblationRun, verdict: Verdict | None = None) -> Entry:
    """The journal's entry for a launched or archived ablation.

    Args:
        run: the ablation.
        verdict: its verdict, where it is known already.

    Raises:
        ConfigError: if a file of it is damaged.
    """
    notes, names, verdict = run.notes(), run.names, verdict or run.verdict()
    state = "" if verdict is not None else "No run was confirmed." if run.finished else "Not finished: no verdict yet."
    rows = () if verdict is None else verdict.rows[1:]
    return Entry(
        name=run.folder.name,
        folder=str(run.folder),
        created=run.provenance().get("created", ""),
        unit=run.metric.unit,
        question=run.question,
        state=state,
        exploratory="" if verdict is None else verdict.exploratory or "",
        findings=tuple(Finding(names.get(row.arm, row.arm), row.verdict, why(row)) for row in rows),
        tags=tuple(notes.tags),
        notes=tuple(notes.notes),
    )


def why(row: ArmVerdict) -> str:
    """The first clause of a row's sentence, without the mark of an exploratory verdict."""
    sentence = row.sentence
    if sentence.startswith("Exploratory ("):
        sentence = sentence.partition("): ")[2] or sentence
    return re.split(r"[.;] ", sentence, maxsplit=1)[0].rstrip(".") + "."
