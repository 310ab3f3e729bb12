"""One run: found by its name, with everything known about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.answers import RunPage, plain
from workbench.config import ConfigError, nearest

if TYPE_CHECKING:
    from workbench.dashboards.tables.run import RunDetails

__all__ = ["details", "run_page", "show"]

SINGLE = "runs"
"""Folder of results that has the runs of ``workbench train``."""
LISTED = 4
"""At most so many names in an error."""
COMPONENTS = ("init", "order", "other")


def show(run: str | Path, results: str | Path = "results", log_lines: int = 20) -> RunPage:
    """Everything known about one run.

    Args:
        run: as in :func:`details`.
        results: folder of all results.
        log_lines: lines of the end of its log.

    Raises:
        ConfigError: as :func:`details`.
    """
    return run_page(details(run, results), log_lines)


def details(run: str | Path, results: str | Path = "results") -> RunDetails:
    """The run that a name means.

    Args:
        run: its folder, its name, or the beginning of one (``tuning-gdn-72``), also below an ablation:
            ``quickstart/tuning-gdn-72``, ``results/ablations/scmoe/tuning-scmoe-6``.
        results: folder of all results, in which names are looked up.

    Raises:
        ConfigError: for a name that no run has, or several have.
    """
    from workbench.ablation.run import AblationRun
    from workbench.dashboards.snapshot import Snapshot
    from workbench.dashboards.tables.run import run_details, single_run_details

    ablation, name = _found(str(run), Path(results))
    if ablation is None:
        return single_run_details(name)
    found = run_details(Snapshot(AblationRun(ablation)), name)
    if found is None:  # its record is damaged
        raise ConfigError.at(
            "run",
            got=f"{ablation / SINGLE / name}, whose run.json is damaged",
            expected="a readable run.json",
            do=f"`workbench run {ablation} --results {ablation.parent}` writes it again.",
        )
    return found


def run_page(found: RunDetails, log_lines: int = 20) -> RunPage:
    """What :func:`details` has found as an answer."""
    record, seeds = found.record, None
    if record is not None:
        declared = record.config.get("seeds", {})
        seeds = {name: record.seed if declared.get(name) is None else declared[name] for name in COMPONENTS}
    return RunPage(
        run=plain(found.row),
        metric=found.metric.unit,
        baseline=found.baseline or None,
        compared=found.compared,
        differences=[
            {"field": field, "baseline": plain(theirs), "run": plain(own)} for field, theirs, own in found.differences
        ],
        recorded=plain(found.last),
        measured=[plain(row) for row in found.measured],
        seeds=seeds,
        events=[{"at": at, "event": event, "about": about} for at, event, about in found.events],
        environment=plain(found.environment),
        folder=found.paths.get("folder"),
        checkpoint=found.paths.get("checkpoint"),
        log=None if found.log is None else found.log.splitlines()[-log_lines:] if log_lines else [],
    )


def _found(run: str, results: Path) -> tuple[Path | None, str]:
    """Folder of the ablation and name of the run; of a run of its own None and its folder."""
    from workbench.ablation.run import ablation_folders, named_ablations

    path = Path(run).absolute()
    if (path / "run.json").is_file():
        is_part = path.parent.name == SINGLE and (path.parent.parent / "ablation.json").exists()
        return (path.parent.parent, path.name) if is_part else (None, str(path))
    for folder in (results / run, Path(run)):
        if (folder / "ablation.json").exists():
            raise ConfigError.at("run", got=f"{run}, an ablation", expected="one of its runs", do=_listing(folder))
    head, _, beginning = run.rstrip("/").rpartition("/")
    ablation = "" if head == SINGLE else head.removesuffix(f"/{SINGLE}")
    folders = named_ablations([ablation], results) if ablation else [] if head else ablation_folders(results)
    known: dict[str, tuple[Path | None, str]] = {}
    for folder in folders:
        known |= {f"{folder}/{name}": (folder, name) for name in _names(folder)}
    if not ablation:
        known |= {str(file.parent): (None, str(file.parent)) for file in (results / SINGLE).glob("*/run.json")}
    names = {shown: Path(shown).name for shown in sorted(known)}
    chosen = [shown for shown, name in names.items() if name == beginning]
    chosen = chosen or [shown for shown, name in names.items() if name.startswith(beginning)]
    if len(chosen) == 1:
        return known[chosen[0]]
    where = folders[0] if ablation and len(folders) == 1 else results
    near = nearest(beginning, names.values())
    hints = [near] if near.startswith("Nearest") else []
    if chosen:
        more = f" and {len(chosen) - LISTED} more" if len(chosen) > LISTED else ""
        hints = [f"Runs: {', '.join(chosen[:LISTED])}{more}."]
    raise ConfigError.at(
        "run",
        got=f"{run}, which fits {len(chosen)} runs" if chosen else run,
        expected=f"the folder of a run, or the name of one run in {where}, or its beginning",
        do=" ".join([*hints, _listing(where) if folders else f"There is no ablation in {where}."]),
    )


def _listing(folder: Path) -> str:
    return f"`workbench table {folder} --runs --columns run` lists the names."


def _names(ablation: Path) -> list[str]:
    """Names of the runs of an ablation or an archive."""
    from workbench.ablation.folder import AblationFolder

    files = AblationFolder(ablation)
    if files.is_archived:
        return list(files.runs()["run"])
    return sorted(path.parent.name for path in files.runs_path.glob("*/run.json"))
