"""A trial's process: from its start to how it ended, and its evaluations as Optuna sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import optuna

from workbench.ablation.execution.timing import Timing
from workbench.ablation.execution.watchdog import Watchdog
from workbench.ablation.spec.tuning import SMOOTHING, Tuning
from workbench.results.store import RunFolder
from workbench.status import Status

__all__ = ["Evaluations", "Outcome", "RunningTrial", "run_trial"]


def run_trial(path: str, cache: str, threads: int, devices: int = 1, loggers: Sequence[str] = ()) -> None:
    """Train the run in folder ``path``; run by a trial's process. The import is slow, and not needed by the worker."""
    from workbench.training.trial import run_in_process

    run_in_process(path, cache, threads, devices, loggers)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    status: Status
    reason: str | None = None
    selection_value: float | None = None
    report_value: float | None = None

    @classmethod
    def of(cls, result: dict[str, Any]) -> Self:
        """From ``result.json`` or ``status.json``."""
        values = {name: result.get(name) for name in ("reason", "selection_value", "report_value")}
        return cls(Status(result["status"]), **values)


class RunningTrial:
    """One run in a process of its own. A context manager: the process has ended when the block is left.

    It waits while another process holds the run, starts its own, and ends that if the run makes no progress, is pruned,
    or the worker has to stop.

    Args:
        run: the run's folder.
        start: starts the process.
        hung_after: seconds without progress after which the run counts as hung.
        timing: intervals and time limits.
    """

    def __init__(self, run: RunFolder, start: Callable[[], Any], hung_after: float, timing: Timing):
        self.run, self.timing = run, timing
        self._start, self._hung_after = start, hung_after
        self._watchdog = Watchdog(run, hung_after)
        self._process: Any = None
        self._is_waiting, self._is_stopping = True, False
        self._silent: float | None = None
        self._prune_reason: str | None = None
        self._status_before: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None or not self._process.is_alive():
            return
        if self._silent is not None:  # a hung process does not react to SIGTERM
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)  # it dumps its stack traces to its log
            self._process.join(self.timing.stack_dump_timeout)
        else:  # it writes a checkpoint
            self._process.terminate()
            self._process.join(self.timing.stop_timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(self.timing.stop_timeout)

    @property
    def is_blocked(self) -> bool:
        """Whether another process holds the run."""
        return self._is_waiting

    def poll(self, should_stop: bool) -> bool:
        """Advance by one interval. Returns whether to go on; afterwards leave the block and ask for :meth:`outcome`."""
        self._is_stopping = self._is_stopping or should_stop
        if self._is_waiting:
            return self._wait_for_run()
        if self._process is None or not self._process.is_alive() or self._is_stopping or self._prune_reason:
            return False
        self._silent = self._watchdog.silent_seconds()
        self._process.join(self.timing.poll)
        return self._silent is None

    def prune(self, reason: str) -> None:
        """End the run as pruned, unless it already has a result."""
        self._prune_reason = reason

    def _wait_for_run(self) -> bool:
        if self.run.is_locked() and not self._is_stopping:  # the process of a dead worker has not noticed yet
            self._silent = self._watchdog.silent_seconds()
            time.sleep(self.timing.poll)
            return self._silent is None
        self._is_waiting = False
        self._status_before = self.run.status()
        if not self.run.result() and not self._is_stopping:
            with contextlib.suppress(OSError):  # a full disk, which the process will report
                self.run.event("assigned")
            self._process = self._start()
        self._watchdog = Watchdog(self.run, self._hung_after)
        return True

    def outcome(self) -> Outcome:
        """How the trial ended; call it after the block."""
        if self._is_waiting:
            reason = f"held by the process of a dead worker, without progress for {self._silent:.0f} s"
            return self._lost(Status.HUNG, reason)
        if self._prune_reason and not self.run.result():
            self.run.finish(Status.PRUNED, self._prune_reason)
        if result := self.run.result():
            return Outcome.of(result)
        if self._silent is not None:
            return self._lost(Status.HUNG, f"no progress for {self._silent:.0f} s; its process was killed")
        status = self.run.status()
        if status["status"] == Status.INTERRUPTED and status != self._status_before:
            return Outcome.of(status)  # it was asked to stop, or the disk is full
        exit_code = None if self._process is None else self._process.exitcode
        if self._process is None or (self._is_stopping and exit_code == -signal.SIGTERM):
            return Outcome(Status.INTERRUPTED, "the worker was asked to stop before the run started")
        return self._lost(Status.KILLED, f"its process was killed (exit code {exit_code})")

    def _lost(self, status: Status, reason: str) -> Outcome:
        """The outcome of a run whose process is gone or hung."""
        if self.run.status()["status"] != Status.RUNNING:  # no other process is running it
            self.run.set_status(status, reason)
        return Outcome(status, reason)


class Evaluations:
    """Reports the evaluations of a tuning run to Optuna and asks whether to prune it.

    Evaluations are counted, not steps, and smoothed: trials are compared at equal tokens on the mean of three.

    Args:
        trial: the Optuna trial.
        run: the run's folder.
        tuning: the search as declared.
    """

    def __init__(self, trial: optuna.Trial, run: RunFolder, tuning: Tuning):
        self.trial, self.run, self.tuning = trial, run, tuning
        self._num_reported = 0

    def report(self) -> str | None:
        """Report new evaluations. Returns why the trial should be pruned, or None."""
        record = self.run.record()
        warmup_steps = record.config["training"]["warmup"] * record.steps
        rows = [row for row in self.run.metrics() if row.get("selection_value") is not None]
        for number in range(self._num_reported + 1, len(rows) + 1):
            self._num_reported = number
            step = rows[number - 1]["step"]
            latest = [row["selection_value"] for row in rows[max(0, number - SMOOTHING) : number]]
            self.trial.report(sum(latest) / len(latest), number)
            is_hopeless = self.trial.should_prune()  # asked for every trial: Hyperband counts those that pass
            is_shared = self.trial.user_attrs["slot"] < self.tuning.num_shared
            is_exempt = is_shared or number < SMOOTHING or step <= warmup_steps
            if is_hopeless and not is_exempt and step < record.steps:
                return (
                    f"the mean of its last {SMOOTHING} evaluations fell behind this arm's other trials "
                    f"({self.tuning.pruner})"
                )
        return None
