"""Archives: the part of a finished ablation that is worth committing (files: workbench.ablation.folder)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from workbench.ablation.analysis.savings import savings_sentences
from workbench.ablation.folder import NOTES, SCORES, AblationFolder
from workbench.config import ConfigError, require
from workbench.files import replacing_folder, write_json
from workbench.results.ledger import FILE, Ledger, history
from workbench.results.store import RunFolder
from workbench.results.tables import POINT_SCHEMA, Points, confirmed, frame_of, thinned
from workbench.status import Stage

if TYPE_CHECKING:
    from workbench.ablation.looks import Look
    from workbench.ablation.run import AblationRun
    from workbench.ablation.verdict.verdict import Verdict

__all__ = ["archive"]

FILES = {
    "ablation.json",
    "selection.json",
    "runs.csv",
    "report.parquet",
    "curves.parquet",
    SCORES,
    "verdict.json",
    "verdict.md",
    "openings.json",
    "looks.json",
    NOTES,
    "report.html",
}
"""What an archive may contain; ``report.html`` was written into archives by earlier versions, and is left out of new
ones (:func:`workbench.dashboards.report.render.report_path`)."""
POINTS = 200
"""Points kept of the curves of a run, evaluations included."""
LOCAL = ("folder", "selected")
"""Columns of the table of runs that mean nothing on another machine."""


def archive(run: AblationRun, folder: str | Path) -> Path:
    """Write a finished ablation without checkpoints and logs to ``folder``, atomically. An earlier archive of the same
    ablation is replaced.

    Returns:
        the folder.

    Raises:
        ConfigError: if the ablation is not finished or is an archive, or if ``folder`` contains anything else.
    """
    folder = Path(folder).resolve()
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
    require(
        run.folder.resolve() not in (folder, *folder.parents),
        "folder",
        got=f"{folder}, which is {'' if folder == run.folder.resolve() else 'inside '}the ablation itself",
        expected="another folder",
        do=f"Example: workbench archive {run.folder} results/ablations/{run.name}",
    )
    _check_replaceable(folder, run)
    look = run.look()
    with replacing_folder(folder) as temporary:
        _write(run, verdict, look, temporary)
    if look:
        _copy_openings(run, folder.parent)
    return folder


def _check_replaceable(folder: Path, run: AblationRun) -> None:
    """Check that nothing but an archive of the same ablation would be lost.

    Raises:
        ConfigError: if there is anything else.
    """
    if folder.is_dir() and any(folder.iterdir()):
        archived = AblationFolder(folder)
        is_same = archived.is_archived and archived.has_record() and archived.record().name == run.name
        others = {path.name for path in folder.iterdir()} - FILES
        reason = "" if is_same and not others else f"a folder that contains {min(others or FILES)!r}"
        reason = reason or ("" if is_same else "another ablation")
    else:
        reason = "a file" if folder.exists() and not folder.is_dir() else ""
    require(
        not reason,
        "folder",
        got=f"{folder}, {reason}",
        expected="a new or empty folder, or an earlier archive of this ablation",
        do="Choose another folder; nothing was written.",
    )


def _write(run: AblationRun, verdict: Verdict, look: Look | None, folder: Path) -> None:
    """Write the files of an archive."""
    runs = run.runs()
    reports = [
        frame.select(pl.lit(arm).alias("arm"), pl.lit(seed).alias("seed"), pl.all())
        for arm, seed, frame in run.files.reports()
    ]
    if reports:
        pl.concat(reports, how="diagonal").write_parquet(folder / "report.parquet")
    curves = [
        line._replace(points=Points(thinned(line.points.frame, POINTS)))
        for line in run.lines()
        if line.stage == Stage.CONFIRMATION
    ]
    _compact(frame_of(curves)).write_parquet(folder / "curves.parquet", compression_level=15)
    if len(scores := run.scores()):
        scores.write_parquet(folder / SCORES)
    runs.drop(LOCAL).write_csv(folder / "runs.csv", float_precision=6)
    record = copy.deepcopy(run.record.raw)
    record.get("config", {}).get("launch", {}).pop("notify", None)  # addresses: an archive is for others
    write_json(folder / "ablation.json", record)
    write_json(folder / "selection.json", run.selection())
    write_json(folder / "verdict.json", verdict.plain())
    if look:
        write_json(folder / "openings.json", look.model_dump(mode="json"))
    if looks := run.files.looks():
        write_json(folder / "looks.json", {"looks": looks})
    if (run.folder / NOTES).exists():
        write_json(folder / NOTES, run.notes().model_dump())
    environments = sorted({_environment(RunFolder(path)) for path in confirmed(runs)["folder"]})
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


def _compact(curves: pl.DataFrame) -> pl.DataFrame:
    """Curves without columns that no run has recorded, and with the digits that a figure shows."""
    empty = [name for name in POINT_SCHEMA if curves[name].null_count() == len(curves)]
    exact = ("tokens", "flops", "seconds", "selection_value")  # conclusions are drawn from these
    shown = [name for name, kind in POINT_SCHEMA.items() if kind == pl.Float64 and name not in (*exact, *empty)]
    return curves.drop(empty).with_columns(pl.col(shown).round_sig_figs(5).cast(pl.Float32))


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
