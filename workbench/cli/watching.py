"""Watching from a shell: bars on a terminal, lines with the time of day elsewhere.

One bar for the ablation, one per running trial; a line per run that has ended.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from workbench.api.answers import Error
from workbench.cli.output import Failure, console
from workbench.formatting import count, duration, flops, setting
from workbench.status import ENDED, LOST, Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun


def run_until_done(launched: AblationRun, workers: int, detach: bool = False) -> bool:
    """Start workers and watch them until every run has ended; ``detach`` returns False at once.

    Ctrl-C stops the workers. It, and an end before every run has ended, exit the command with an error code.
    """
    try:
        if not launched.finished:
            words = f"Starting {workers} worker{'s' * (workers != 1)} …"
            if not console.is_terminal:
                print_timed(words)
            with console.status(words):
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


OVERALL_SECONDS = 2.0
"""Between two estimates of the time left of an ablation."""
LINE_SECONDS = 60.0
"""Between two lines about the whole ablation where there are no bars."""


def bars() -> Progress:
    """Bars with numbers beside them; nothing where standard output is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4)


def print_timed(line: str) -> None:
    """Print a line; where there are no bars, after the time of day."""
    clock = "" if console.is_terminal else time.strftime("%H:%M:%S ")
    console.print(clock + line, markup=False, highlight=False, soft_wrap=True)


def follow(launched: AblationRun) -> None:
    """Show how far the ablation is and print a line per ended run, until all have ended or no worker is left.

    On a terminal: a bar of the whole ablation above a bar per running trial.

    Raises:
        ConfigError: if the ablation's folder is removed meanwhile.
    """
    from workbench.config import ConfigError

    live = console.is_terminal
    printed: dict[str, str] = {}
    tasks: dict[str, TaskID] = {}
    with bars() as progress:
        overall = _Overall(launched, progress)
        while True:
            overall.update()
            is_over = launched.wait(timeout=0.5) or not (launched.workers() or launched.waiting_workers())
            frame = launched.runs()
            num_ended = frame["status"].is_in(ENDED).sum()
            for row in frame.iter_rows(named=True):
                title, numbers = f"{row['arm']} {row['stage']} {_setting(row)}", _numbers(row)
                ended = row["status"] in ENDED
                is_news = printed.get(row["run"]) != row["status"]
                if is_news and (ended or (row["status"] == Status.RUNNING and not live)):
                    print_timed(f"[{num_ended}/{launched.total}] {title}: {numbers}")
                printed[row["run"]] = row["status"]
                if ended and row["run"] in tasks:
                    progress.remove_task(tasks.pop(row["run"]))
                elif live and not ended:
                    if row["run"] not in tasks:
                        tasks[row["run"]] = progress.add_task(title, total=row["steps"], numbers=numbers)
                    progress.update(tasks[row["run"]], completed=row["step"], numbers=numbers)
            if not launched.exists:
                raise ConfigError.at(
                    str(launched.folder),
                    got="a folder that has been removed meanwhile",
                    expected="the ablation that was being watched",
                )
            if is_over:
                overall.update(at_once=True)
                return


class _Overall:
    """Progress of a whole ablation: a bar, or a line a minute."""

    def __init__(self, launched: AblationRun, progress: Progress):
        self.launched, self.progress = launched, progress
        self._task = progress.add_task(launched.name, total=1.0, numbers="")
        self._read_at = self._printed_at = float("-inf")

    def update(self, at_once: bool = False) -> None:
        """Read it again where that is due."""
        from workbench.dashboards.snapshot import Snapshot
        from workbench.dashboards.tables.progress import overall_progress

        now = time.monotonic()
        if now - self._read_at < OVERALL_SECONDS and not at_once:
            return
        self._read_at = now
        state = overall_progress(Snapshot(self.launched))
        numbers = ", ".join(filter(None, [f"{state.ended} of {state.planned} runs", state.times]))
        self.progress.update(self._task, completed=state.share, numbers=numbers)
        if not console.is_terminal and (now - self._printed_at >= LINE_SECONDS or at_once):
            self._printed_at = now
            print_timed(f"{self.launched.name}: {state.state}, {numbers}")


@contextlib.contextmanager
def training_bar(name: str, steps: int, unit: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of one run, where standard output is a terminal, else a line per logged step.

    Args:
        name: of the run.
        steps: of the run.
        unit: of the metric.

    Yields:
        what is to be called with every line of metrics.jsonl.
    """
    began = time.monotonic()
    first: tuple[float, int] | None = None

    def show(row: dict[str, Any]) -> None:
        nonlocal first
        now, step = time.monotonic(), row["step"]
        first = first or (now, step)
        # at the pace since the first line, evaluations and checkpoints included; until then at that of training alone
        left = (steps - step) * (row["seconds"] / step if step == first[1] and step else 0.0)
        if step > first[1]:
            left = (steps - step) * (now - first[0]) / (step - first[1])
        parts = [] if row.get("loss") is None else [f"loss {row['loss']:.4f}"]
        if "tokens_per_second" in row:
            parts += [f"{count(row['tokens_per_second'])} tokens/s", f"{flops(row['flops_per_second'])}/s"]
        if row.get("selection_value") is not None:
            parts.append(f"{row['selection_value']:.4f} {unit} (selection)")
        times = f"{duration(now - began)} elapsed, {duration(left)} left"
        bar.update(task, completed=step, description=f"{name} step {step}/{steps}", numbers=", ".join([*parts, times]))
        if not console.is_terminal or row.get("selection_value") is not None:
            print_timed(f"step {step}/{steps}  {'  '.join(parts)}  {times}")

    with bars() as bar:
        task = bar.add_task(name, total=max(1, steps), numbers="loading data, building the model …")
        yield show


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
