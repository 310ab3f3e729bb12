"""What of an ablation is worth keeping for good: a few small files, without checkpoints, curves and logs.

ablation.json    the whole configuration, the cost card, where it was launched
selection.json   each arm's chosen setting
runs.csv         one row a training run, tuning and failures included
report.parquet   what every confirmation run measured on every report document
verdict.json     the verdict as data
verdict.md       the verdict in words, with where its numbers come from
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from workbench.config import ConfigError
from workbench.files import write_json
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["archive"]

LOCAL = ("folder", "selected")
"""Columns of the runs' table that say nothing elsewhere."""


def archive(run: AblationRun, folder: str | Path) -> Path:
    """Write what is worth keeping of a finished ablation to ``folder``; files there are replaced.

    Raises:
        ConfigError: when the ablation is not finished.
    """
    folder = Path(folder)
    if run.archived:
        raise ConfigError.at(
            "folder",
            got=f"{run.folder}, an archive",
            expected="the folder that it was made from",
            do="An archive is copied as it is.",
        )
    verdict = run.verdict()
    if not run.finished or verdict is None:
        raise ConfigError.at(
            "folder",
            got=f"{run.folder}, which is not finished",
            expected="a finished ablation",
            do="The same `workbench run` command goes on with it.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    runs = run.runs()
    confirmed = runs.filter((pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE))
    reports = [
        frame.select(pl.lit(arm).alias("arm"), pl.lit(seed).alias("seed"), pl.all())
        for arm, seed, frame in run.reports()
    ]
    if reports:
        pl.concat(reports, how="diagonal").write_parquet(folder / "report.parquet")
    runs.drop(LOCAL).write_csv(folder / "runs.csv", float_precision=6)
    write_json(folder / "ablation.json", run.about)
    write_json(folder / "selection.json", run.selection())
    write_json(folder / "verdict.json", verdict.plain())
    places = sorted({_place(RunFolder(path)) for path in confirmed["folder"]})
    lines = [
        f"# {run.name}",
        "",
        run.question,
        "",
        "```",
        str(verdict),
        "```",
        "",
        "Ours, measured; where and with what the runs were trained:",
        "",
        *(f"- {place}" for place in places),
        "",
    ]
    (folder / "verdict.md").write_text("\n".join(lines), encoding="utf-8")
    return folder


def _place(folder: RunFolder) -> str:
    where = folder.environment()
    libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
    return f"{where['device']}, code {where['code']}, Python {where['python']}, {libraries}"
