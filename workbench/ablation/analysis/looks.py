"""The ledger of a folder of results as tables, and its verification against the ablations in the folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import polars as pl

from workbench.ablation.folder import AblationFolder
from workbench.ablation.looks import missing_lines
from workbench.config import ConfigError, Problem
from workbench.results.ledger import history

__all__ = ["launch_table", "opening_table", "verify"]


def opening_table(results: str | Path) -> pl.DataFrame:
    """One row per opening, oldest first; the columns are the fields of :class:`workbench.results.ledger.Opening`."""
    rows = [asdict(opening) for opening in history(results).openings]
    return pl.DataFrame(rows, infer_schema_length=None)


def launch_table(results: str | Path) -> pl.DataFrame:
    """One row per launch, oldest first.

    Columns: at (first opening, UTC), who, ablation, runs (number), arms, seeds, documents (number), fingerprint, look
    (number at these documents), launch.
    """
    past = history(results)
    launches: dict[str, list[int]] = {}
    for position, opening in enumerate(past.openings):
        launches.setdefault(opening.launch, []).append(position)
    rows = []
    seen: dict[str, set[str]] = {}
    for launch, positions in launches.items():
        openings = [past.openings[position] for position in positions]
        names = dict.fromkeys(opening.documents for opening in openings)
        digests = {digest for name in names for digest in past.documents.get(name, ())}
        earlier = sum(not digests.isdisjoint(other) for other in seen.values())
        seen[launch] = digests
        rows.append(
            {
                "at": openings[0].at,
                "who": ", ".join(dict.fromkeys(opening.who for opening in openings)),
                "ablation": openings[0].ablation,
                "runs": len({opening.run for opening in openings}),
                "arms": ", ".join(dict.fromkeys(opening.arm for opening in openings)),
                "seeds": ", ".join(map(str, sorted({opening.seed for opening in openings}))),
                "documents": len(digests),
                "fingerprint": ", ".join(names),
                "look": earlier + 1,
                "launch": launch,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def verify(results: str | Path) -> int:
    """Check every ledger of a folder of results, and that it has the lines that launches and runs keep the hash of.

    Returns:
        Number of lines.

    Raises:
        ConfigError: naming the lines that were changed, and the ablations whose lines are gone.
    """
    past = history(results)
    problems: list[Problem] = []
    for ledger in past.ledgers:
        try:
            ledger.verify()
        except ConfigError as error:
            problems += error.problems
    for path in sorted(Path(results).glob("*/ablation.json")):
        folder = AblationFolder(path.parent)
        try:
            faults = missing_lines(folder, folder.record(), past)
        except ConfigError as error:
            problems += error.problems
            continue
        for fault in faults:
            expected = "a ledger that still has them"
            problems += ConfigError.at(str(folder.path), got=fault, expected=expected, do="Restore it.").problems
    if problems:
        raise ConfigError(problems)
    return sum(len(ledger.hashes) for ledger in past.ledgers)
