"""Functions that change or sum up launched ablations: extend, rename, annotate, remove, the journal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.answers import Extension, Journal, NotesAnswer, Removed
from workbench.config import ConfigError, require
from workbench.files import replacing

if TYPE_CHECKING:
    from workbench.ablation.analysis.journal import Entry
    from workbench.ablation.run import AblationRun

__all__ = ["annotate", "extend", "is_refused_launch", "journal", "remove", "rename"]

JOURNAL = "JOURNAL.md"
HEAD = "<!-- Written by `workbench journal`; notes belong into `workbench annotate`. -->"


def extend(folder: str | Path, seeds: int | Sequence[int], why: str | None = None) -> Extension:
    """Add confirmation seeds to a finished ablation; starts no worker.

    Args:
        folder: of the ablation.
        seeds: their number, or the seeds.
        why: the reason, which the verdict quotes; needed unless the design is anytime-valid.

    Raises:
        ConfigError: as :func:`workbench.ablation.execution.extension.extend`.
    """
    from workbench.ablation.run import AblationRun

    run = AblationRun(folder)
    before = run.record.config.confirmation.seeds
    deviation = run.extend(seeds, why)
    return Extension(
        folder=str(run.folder),
        seeds=list(run.record.config.confirmation.seeds[len(before) :]),
        planned=deviation.planned,
        what=deviation.what,
        why=deviation.why,
    )


def rename(folder: str | Path, names: Mapping[str, str]) -> NotesAnswer:
    """Give arms of an ablation display names, which change neither its hash nor its runs.

    Args:
        folder: of the ablation.
        names: arm -> display name; an empty one removes it.
    """
    from workbench.ablation.run import AblationRun

    run = AblationRun(folder)
    run.rename(names)
    return _notes(run)


def annotate(folder: str | Path, text: str = "", tags: Sequence[str] = (), untag: Sequence[str] = ()) -> NotesAnswer:
    """Add a note or tags to an ablation, or remove tags; without any of them, what there is.

    Args:
        folder: of the ablation.
        text: of the note.
        tags: to add.
        untag: tags to remove.
    """
    from workbench.ablation.run import AblationRun

    run = AblationRun(folder)
    if text.strip() or tags or untag:
        run.annotate(text, tags, untag)
    return _notes(run)


def _notes(run: AblationRun) -> NotesAnswer:
    notes = run.notes()
    return NotesAnswer(
        folder=str(run.folder), names=run.names, tags=notes.tags, notes=[note.model_dump() for note in notes.notes]
    )


def remove(folder: str | Path) -> Removed:
    """Delete an ablation with its runs and checkpoints, or what a refused launch has left. The ledger of results stays.

    Raises:
        ConfigError: while workers are alive, or if the folder has no ablation.
    """
    from workbench.ablation.run import AblationRun

    if is_refused_launch(folder):
        shutil.rmtree(folder)
        return Removed(folder=str(Path(folder).absolute()), runs=0, kept=[])
    run = AblationRun(folder)
    count, storage = len(run.runs()), run.record.config.launch.storage
    run.delete()
    kept = [str(run.results / "ledger.jsonl")] if (run.results / "ledger.jsonl").exists() else []
    return Removed(folder=str(run.folder), runs=count, kept=[*kept, *([f"studies in {storage}"] if storage else [])])


def is_refused_launch(folder: str | Path) -> bool:
    """Whether a folder is all that a refused launch has left: a lock and nothing else."""
    folder = Path(folder)
    return folder.is_dir() and [path.name for path in folder.iterdir()] == ["plan.lock"]


def journal(results: str | Path = "results") -> Journal:
    """Write the journal of a folder of results, ``JOURNAL.md``: every ablation with its question, its verdict and a
    line of why, undecided and failed ones too. Newest first.

    Args:
        results: folder of all results, or of archives.

    Raises:
        ConfigError: if there is no such folder, or its JOURNAL.md was not written by this function.
    """
    from workbench.ablation.analysis.journal import entry_of
    from workbench.ablation.run import AblationRun

    results = Path(results)
    path = results / JOURNAL
    require(results.is_dir(), "results", got=str(results), expected="a folder of results")
    require(
        not path.exists() or path.read_text(encoding="utf-8").startswith(HEAD),
        str(path),
        got="a file that `workbench journal` did not write",
        expected="none, or an earlier journal",
        do="Rename it.",
    )
    entries = []
    for record in sorted(results.glob("*/ablation.json")):
        try:
            run = AblationRun(record.parent)
            entry = entry_of(run)
            entries.append((entry.created, _entry(entry)))
        except ConfigError as error:
            entries.append(("", f"## {record.parent.name}\n\nIt cannot be read: {error}\n"))
    entries.sort(key=lambda entry: entry[0], reverse=True)
    text = "\n".join([HEAD, "", "# Journal", "", *(entry for _, entry in entries)])
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Journal(path=str(path.absolute()), ablations=len(entries), text=text)


def _entry(entry: Entry) -> str:
    """A section of the journal."""
    about = [part for part in (entry.created[:16], entry.unit, ", ".join(entry.tags)) if part]
    lines = [f"## {entry.name}", "", " · ".join(about), "", entry.question or "No question was declared.", ""]
    lines += [f"Exploratory: {entry.exploratory}.", ""] if entry.exploratory else []
    lines += [f"- {entry.state}"] if entry.state else []
    lines += [f"- **{finding.name}**: {finding.word}. {finding.why}" for finding in entry.findings]
    for note in entry.notes:
        lines += ["", f"> {note.at[:16]}: {' '.join(note.text.split())}"]
    return "\n".join([*lines, ""])
