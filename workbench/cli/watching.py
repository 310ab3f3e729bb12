"""Watching an ablation from a shell: a bar per running trial, a line per ended one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from workbench.api.answers import Error
from workbench.cli.output import Failure, console
from workbench.formatting import count, duration, setting
from workbench.status import ENDED, LOST, Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun


def run_until_done(launched: AblationRun, workers: int, detach: bool = False) -> bool:
    """Start workers and watch them until every run has ended; ``detach`` returns False at once.

    Ctrl-C stops the workers. It, and an end before every run has ended, exit the command with an error code.
    """
    try:
        if not launched.finished:
            launched.start_workers(workers)
        if detach:
            console.print(f"Running in the background. Follow with: workbench watch {launched.folder}", soft_wrap=True)
            return False
        follow(launched)
    except KeyboardInterrupt:
        console.print("\nStopping: running trials write a checkpoint …")
        remaining = launched.stop()
        console.print(
            "Still writing a checkpoint, then they end." if remaining else "Stopped.", "The same command resumes."
        )
        raise Failure(Error(kind="interrupted", message="Stopped. The same command resumes.")) from None
    if not launched.finished:
        reason = _stop_reason(launched)
        console.print("Not finished: no worker is left.", style="bold")
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
        console.print("The same command resumes.")
        raise Failure(Error(kind="unfinished", field=str(launched.folder), message=reason))
    return True


def follow(launched: AblationRun) -> None:
    """Show a bar per running trial and print a line per ended one, until all have ended or no worker is left.

    Raises:
        ConfigError: if the ablation's folder is removed meanwhile.
    """
    from workbench.config import ConfigError

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    live = console.is_terminal
    printed: dict[str, str] = {}
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not live, refresh_per_second=4) as progress:
        while True:
            is_over = launched.wait(timeout=0.5) or not (launched.workers() or launched.waiting_workers())
            frame = launched.runs()
            num_ended = frame["status"].is_in(ENDED).sum()
            for row in frame.iter_rows(named=True):
                title, numbers = f"{row['arm']} {row['stage']} {_setting(row)}", _numbers(row)
                ended = row["status"] in ENDED
                is_news = printed.get(row["run"]) != row["status"]
                if is_news and (ended or (row["status"] == Status.RUNNING and not live)):
                    line = f"[{num_ended}/{launched.total}] {title}: {numbers}"
                    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                printed[row["run"]] = row["status"]
                if ended and row["run"] in bars:
                    progress.remove_task(bars.pop(row["run"]))
                elif live and not ended:
                    if row["run"] not in bars:
                        bars[row["run"]] = progress.add_task(title, total=row["steps"], numbers=numbers)
                    progress.update(bars[row["run"]], completed=row["step"], numbers=numbers)
            if not launched.exists:
                raise ConfigError.at(
                    str(launched.folder),
                    got="a folder that has been removed meanwhile",
                    expected="the ablation that was being watched",
                )
            if is_over:
                return


def _stop_reason(launched: AblationRun) -> str:
    """The reasons of runs that stopped early; without any, the end of the workers' log."""
    frame = launched.runs()
    stopped = frame.filter(frame["status"].is_in((Status.INTERRUPTED, *LOST)))
    if len(stopped):
        return "\n".join(f"{row['run']} is {row['status']}: {row['reason']}" for row in stopped.iter_rows(named=True))
    log = launched.folder / "workers" / "log.txt"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return "\n".join([f"The end of {log}:", *lines[-8:]])


def _setting(row: dict[str, Any]) -> str:
    """The seed of a confirmation run, the hyper-parameters of a tuning run."""
    if row["stage"] == Stage.CONFIRMATION:
        return f"seed {row['seed']}"
    return setting(json.loads(row["hyperparameters"]))


def _numbers(row: dict[str, Any]) -> str:
    parts = []
    if row["status"] == Status.RUNNING and row["loss"] is not None:
        parts = [
            f"loss {row['loss']:.3f}",
            f"{count(row['tokens_per_second'])} tokens/s",
            f"{duration(row['seconds_left'])} left",
        ]
    elif row["report_value"] is not None:
        parts = [f"{row['report_value']:.4f} {row['metric']} (report)"]
    elif row["selection_value"] is not None and row["status"] == Status.DONE:
        parts = [f"{row['selection_value']:.4f} {row['metric']} (selection)"]
    if row["status"] != Status.DONE:
        parts.insert(0, row["status"] + (f" ({row['reason']})" if row["reason"] else ""))
    return ", ".join(parts)
