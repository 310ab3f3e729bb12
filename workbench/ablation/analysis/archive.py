"""Archives: the part of a finished ablation that is worth committing (files: workbench.ablation.folder)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from workbench.ablation.analysis.savings import savings_sentences
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results.ledger import FILE, Ledger, history
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["archive"]

LOCAL = ("folder", "selected")
"""Columns of the table of runs that mean nothing on another machine."""


def archive(run: AblationRun, folder: str | Path) -> Path:
    """Write a finished ablation without checkpoints and logs to ``folder``; existing files are replaced.

    Returns:
        the folder.

    Raises:
        ConfigError: if the ablation is not finished, or is an archive.
    """
    folder = Path(folder)
    if run.archived:
        raise ConfigError.at(
            "folder",
            got=f"{run.folder}, an archive",
            expected="the folder of an ablation",
            do="Copy an archive as it is.",
        )
    verdict = run.verdict()
    if not run.finished or verdict is None:
        raise ConfigError.at(
            "folder",
            got=f"{run.folder}, which is not finished",
            expected="a finished ablation",
            do="The same `workbench run` command resumes it.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    runs = run.runs()
    confirmed = runs.filter((pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE))
    reports = [
        frame.select(pl.lit(arm).alias("arm"), pl.lit(seed).alias("seed"), pl.all())
        for arm, seed, frame in run.files.reports()
    ]
    if reports:
        pl.concat(reports, how="diagonal").write_parquet(folder / "report.parquet")
    evaluated = (pl.col("stage") == Stage.CONFIRMATION) & pl.col("selection_value").is_not_null()
    run.curves().filter(evaluated).write_parquet(folder / "curves.parquet")
    runs.drop(LOCAL).write_csv(folder / "runs.csv", float_precision=6)
    write_json(folder / "ablation.json", run.record.raw)
    write_json(folder / "selection.json", run.selection())
    write_json(folder / "verdict.json", verdict.plain())
    if look := run.look():
        write_json(folder / "openings.json", look.model_dump(mode="json"))
        _copy_openings(run, folder.parent)
    if looks := run.files.looks():
        write_json(folder / "looks.json", {"looks": looks})
    environments = sorted({_environment(RunFolder(path)) for path in confirmed["folder"]})
    lines = [
        f"# {run.name}",
        "",
        run.question,
        "",
        "```",
        str(verdict),
        "```",
        "",
        *(f"{sentence}\n" for sentence in savings_sentences(run)),
        "Our measurement; the runs were trained on and with:",
        "",
        *(f"- {line}" for line in environments),
        "",
    ]
    (folder / "verdict.md").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _copy_openings(run: AblationRun, archives: Path) -> None:
    """Enter the openings of an ablation in the ledger of the folder of archives, so that they are counted there too."""
    past, ledger = history(run.results), Ledger(archives / FILE)
    for opening in past.openings:
        if opening.launch == run.record.launch:
            ledger.open(opening, sorted(past.documents[opening.documents]))


def _environment(folder: RunFolder) -> str:
    """Device, code and versions of a run."""
    where = folder.environment()
    libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
    return f"{where['device']}, code {where['code']}, Python {where['python']}, {libraries}"
