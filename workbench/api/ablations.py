"""Functions about ablations: what one costs, its launch, how far it is, what it concludes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.api.answers import Cost, Error, Status, Stopped, Unpaired, VerdictAnswer, plain, plain_rows
from workbench.config import ConfigError, require
from workbench.formatting import duration
from workbench.results.store import RunFolder
from workbench.results.tables import points_of, seconds_left
from workbench.results.wall_time import WallTime
from workbench.status import ENDED, FAILED

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["cost", "launch", "status", "status_of", "stop", "unpaired", "verdict", "verdict_of"]

Progress = Callable[[str], None]


def cost(
    file: str | Path,
    overrides: Sequence[str] = (),
    results: str | Path = "results",
    measure: bool = True,
    progress: Progress | None = None,
) -> Cost:
    """What an ablation costs before anything runs, and what does not match.

    Args:
        file: the ablation as YAML.
        overrides: fields to change: ``"base.model.width=256"``.
        results: folder of all results.
        measure: train every arm for a few real steps on this machine, to measure time and memory.
        progress: called with a line about each step.

    Raises:
        ConfigError: with every mistake of the file.
    """
    from workbench.ablation.ablation import Ablation
    from workbench.ablation.cost.card import check_budget
    from workbench.ablation.estimate import total_seconds

    ablation = Ablation.load(file, overrides, results)
    table = ablation.cost(measure=measure, progress=progress)
    problems, rows = [], plain_rows(table)
    try:
        check_budget(ablation.arms, table)
    except ConfigError as error:
        problems = Error.of(error).problems
    return Cost(
        name=ablation.config.name,
        identity=ablation.config.identity,
        folder=str(ablation.folder.absolute()),
        workers=ablation.workers,
        arms=rows,
        seconds=total_seconds(rows, ablation.workers),
        problems=problems,
        cautions=[text for text in (ablation.config.confirmation.caution,) if text],
    )


def launch(
    file: str | Path,
    overrides: Sequence[str] = (),
    results: str | Path = "results",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Status:
    """Launch or resume an ablation and return at once; its trials are processes of their own.

    Args:
        file: as in :func:`cost`.
        overrides: as in :func:`cost`.
        results: as in :func:`cost`.
        progress: as in :func:`cost`.
        workers: worker processes; default ``launch.workers`` of the file.

    Raises:
        ConfigError: as :meth:`workbench.ablation.ablation.Ablation.create`.
    """
    from workbench.ablation.ablation import Ablation

    return status_of(Ablation.load(file, overrides, results).launch(workers, progress or (lambda line: None)))


def status(folder: str | Path) -> Status:
    """How far an ablation or a single run has come.

    Raises:
        ConfigError: if the folder has neither.
    """
    from workbench.ablation.run import AblationRun

    folder = Path(folder)
    if (folder / "run.json").is_file() and not (folder / "ablation.json").exists():
        return _run_status(RunFolder(folder))
    return status_of(AblationRun(folder))


def status_of(run: AblationRun) -> Status:
    """How far a launched ablation has come."""
    from workbench.dashboards.snapshot import Snapshot
    from workbench.dashboards.tables.progress import overall_progress

    progress = overall_progress(Snapshot(run))
    workers, frame = len(run.workers()), run.runs()
    failed, running = (int(frame["status"].is_in(list(words)).sum()) for words in (FAILED, ("running",)))
    parts = [f"{run.name}: {progress.state}, {progress.ended} of {progress.planned} runs ended"]
    parts += [f"{running} running ({100 * progress.share:.0f} % of all steps)"] if running else []
    parts += [f"{failed} failed"] if failed else []
    parts += [progress.times] if progress.times else []
    return Status(
        name=run.name,
        folder=str(run.folder),
        state=progress.state,
        ended=progress.ended,
        planned=progress.planned,
        share=progress.share,
        failed=failed,
        workers=workers,
        elapsed_seconds=progress.elapsed,
        seconds_left=progress.seconds_left,
        line=", ".join(parts),
    )


def _run_status(run: RunFolder) -> Status:
    record, state, last = run.record(), run.status()["status"], points_of(run).last
    step, seconds = last.get("step", 0), last.get("seconds", 0.0)
    wall = WallTime.of(run.events())
    spent = wall.seconds(time.time() if state == "running" else None)
    left = seconds_left(step, record.steps, seconds, spent - wall.startup) if state == "running" else None
    line = f"{run.path.name}: {state}, step {step} of {record.steps}, {duration(seconds)} of training"
    return Status(
        name=run.path.name,
        folder=str(run.path),
        state=state,
        ended=step,
        planned=record.steps,
        share=step / record.steps if record.steps else float(state in ENDED),
        failed=int(state in FAILED),
        workers=int(run.is_locked()),
        elapsed_seconds=spent,
        seconds_left=left,
        line=line if left is None else f"{line}, about {duration(left)} left",
    )


def stop(folder: str | Path, wait: float = 60.0) -> Stopped:
    """Stop the workers of an ablation; running trials write a checkpoint first.

    Args:
        folder: of the ablation.
        wait: seconds to wait for them to end.
    """
    from workbench.ablation.run import AblationRun

    run = AblationRun(folder)
    count = len(run.workers())
    remaining = run.stop(wait)
    return Stopped(stopped=count - len(remaining), remaining=remaining)


def verdict(folder: str | Path, against: str | Path | None = None, arm: str | None = None) -> VerdictAnswer:
    """The verdict of an ablation: which arm is better, by how much, with what certainty.

    Args:
        folder: of the ablation.
        against: an ablation of somebody else, usually an archive, to compare the arms with as well; unpaired.
        arm: its arm; default its baseline.

    Raises:
        ConfigError: if the folder has no ablation, or a file of it is damaged; with ``against`` as
            :func:`workbench.ablation.analysis.against.against`.
    """
    from workbench.ablation.run import AblationRun

    run = AblationRun(folder)
    answer = verdict_of(run)
    if against is None:
        require(arm is None, "arm", got=arm, expected="none without an ablation to compare with")
        return answer
    return answer.model_copy(update={"against": unpaired(run, AblationRun(against), arm)})


def unpaired(run: AblationRun, other: AblationRun, arm: str | None = None) -> Unpaired:
    """The arms of an ablation against an arm of another one, over seeds that are no pairs."""
    from workbench.ablation.analysis.against import against

    found = against(run, other, arm)
    return Unpaired(
        folder=str(run.folder),
        against=str(other.folder),
        reference=found.reference,
        metric=found.unit,
        alpha=found.alpha,
        label=found.label,
        rows=[plain(row) for row in found.plain()["rows"]],
        text=str(found),
    )


def verdict_of(run: AblationRun) -> VerdictAnswer:
    """The verdict of a launched ablation."""
    from workbench.ablation.analysis.diagnostics import notes
    from workbench.ablation.analysis.savings import savings_sentences

    conclusion = run.verdict()
    summary = None if conclusion is None else run.summary(conclusion)
    return VerdictAnswer(
        name=run.name,
        folder=str(run.folder),
        question=run.question,
        finished=run.finished,
        metric=run.metric.unit,
        verdict=None if conclusion is None else plain(conclusion.plain()),
        summary="" if summary is None else str(summary),
        failed=summary is not None and summary.failed,
        text="" if conclusion is None else str(conclusion),
        savings=[] if conclusion is None else list(savings_sentences(run)),
        notes=[] if conclusion is None else list(notes(run)),
        names=run.names,
    )
