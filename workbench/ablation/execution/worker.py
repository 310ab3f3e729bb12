"""A worker: takes trials from the studies and runs each in a process of its own.

A crash or an out-of-memory ends one trial, never the worker; a killed worker's trial is given to another worker after
three missed heartbeats. A trial that makes no progress (:mod:`workbench.ablation.execution.watchdog`) is killed and
retried like one whose process died. Trials are forked from a server that has imported torch once, so they start at
once.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import optuna

from workbench import compat
from workbench.ablation.execution.notifications import Notifications
from workbench.ablation.execution.placement import claim_gpu, gpu_groups
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.roster import Roster
from workbench.ablation.execution.timing import DEFAULT_TIMING, Timing
from workbench.ablation.execution.trial import Evaluations, Outcome, RunningTrial, run_trial
from workbench.ablation.folder import AblationFolder
from workbench.ablation.search.samplers import INFEASIBLE, suggest
from workbench.config import ConfigError
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

__all__ = ["Worker"]


class TrialEnded(Exception):
    """A trial ended without a value; its status and reason are user attributes of the trial."""


class Worker:
    """Works on one ablation until nothing is left to do.

    Args:
        folder: the launched ablation.
        timing: intervals and time limits.
        run_trial: what a trial's process runs; gets the run's folder, the data cache, the number of threads, and that
            of devices if there are several, or loggers; then their names.
        start_method: of trials' processes; default forkserver where the system has it, else spawn.
    """

    def __init__(
        self,
        folder: AblationFolder,
        timing: Timing = DEFAULT_TIMING,
        run_trial: Callable[..., None] = run_trial,
        start_method: str | None = None,
    ):
        self.folder, self.timing = folder, timing
        self.plan = Plan(folder, timing)
        self.stopping = False
        self._roster = Roster(folder)
        self._notifications = Notifications(folder, self._log)
        self._run_trial = run_trial
        if start_method is None:
            start_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._processes: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._processes.set_forkserver_preload(["workbench.training.trial", __name__])

    def work(self) -> None:
        """Run trials until every run has ended, or until a signal to stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):  # SIGUSR2 is submitit's
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        threading.excepthook = self._on_thread_error
        launch = self.plan.config.launch
        with claim_gpu(self.folder, () if launch.launcher.assigns_gpus else gpu_groups(launch.devices)):
            self.work_until_done()

    def work_until_done(self) -> None:
        """Run trials until every run has ended, the worker has to stop, or the database stays unreachable."""
        failing_since = None
        while not self.should_stop() and self.folder.exists:
            try:
                if not self.take_trial():
                    return
                failing_since = None
            except Exception as error:
                lost = compat.lost_storage(error)
                if lost is None:
                    raise
                reason = str(lost.__cause__ or lost).partition("\n")[0]
                if failing_since is None:  # a restarting server, a full disk
                    failing_since = time.monotonic()
                    self._log(f"waits for the studies' database ({reason})")
                if time.monotonic() - failing_since > self.timing.storage_timeout:
                    self._log(f"ends: the studies cannot be reached: {reason}")
                    self._notifications.stopped("the studies' database does not answer")
                    return
                time.sleep(self.timing.idle)

    def take_trial(self) -> bool:
        """Run one trial, or pause if others have taken all of them. Returns False when nothing is left to do."""
        with self.folder.plan_lock():
            was_finished = self.folder.is_finished
            self.plan.advance()
        if self.folder.is_finished:
            if not was_finished:
                self._notifications.finished()
            return False
        waiting = self.plan.next_study()
        if waiting is None:  # others are still at work
            time.sleep(self.timing.idle)
            return True
        arm, stage, study = waiting
        try:
            study.optimize(lambda trial: self._objective(trial, arm, stage), n_trials=1, catch=(TrialEnded,))
        except Exception as error:
            if not compat.is_taken_over(error):
                raise
            # the clock jumped, or this machine slept: the trial was given to another worker and resumes from its
            # checkpoint
            self._log(f"its trial was taken over ({error})")
        return True

    def should_stop(self) -> bool:
        """Whether the worker was asked to stop, by a signal or through the folder."""
        self.stopping = self.stopping or self._roster.is_stop_requested()
        return self.stopping

    def run(self, trial: optuna.Trial, folder: RunFolder, stage: Stage) -> Outcome:
        """Run a trial's process to its end, and report its evaluations."""

        def start() -> Any:
            arguments: tuple[Any, ...] = (str(folder.path), str(self.folder.cache_path), self.plan.record.threads)
            launch = self.plan.config.launch
            if launch.loggers:
                arguments += (launch.devices, launch.loggers)
            elif launch.devices > 1:
                arguments += (launch.devices,)
            process = self._processes.Process(target=self._run_trial, args=arguments)
            process.start()
            return process

        evaluations = Evaluations(trial, folder, self.plan.config.tuning)
        with RunningTrial(folder, start, self.plan.config.launch.hung_after, self.timing) as running:
            while running.poll(self.should_stop()):
                try:
                    reason = None if running.is_blocked else evaluations.report()
                except Exception as error:
                    if not compat.lost_storage(error):
                        raise
                    continue  # the run goes on without its database; the evaluation is reported later
                if reason:
                    running.prune(reason)
        if not running.is_blocked and (reason := self._patiently(evaluations.report)):
            running.prune(reason)
        return running.outcome()

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """The result of a call to the studies' database, repeated while that does not answer."""
        deadline = time.monotonic() + self.timing.storage_timeout
        while True:
            try:
                return call()
            except Exception as error:
                if not compat.lost_storage(error) or time.monotonic() > deadline:
                    raise
                time.sleep(self.timing.idle)

    def _objective(self, trial: optuna.Trial, arm: str, stage: Stage) -> float:
        """Run one trial; its value."""
        if "slot" not in trial.user_attrs:
            # two workers asked for the last waiting trial, and Optuna created a new one for the second
            trial.set_user_attr("status", Status.SURPLUS)
            raise TrialEnded(Status.SURPLUS)
        if stage == Stage.CONFIRMATION:
            seed, params = trial.user_attrs["seed"], self.plan.hyperparameters_of(arm)
        else:
            seed = trial.user_attrs.get("seed", self.plan.config.tuning.seed)
            params = {name: suggest(trial, name, choice) for name, choice in self.plan.arms[arm].space.items()}
        trial.set_user_attr("hyperparameters", json.dumps(params))
        try:
            folder = self.plan.create_run(arm, stage, seed, params, slot=trial.user_attrs["slot"])
        except (
            ConfigError
        ) as error:  # fixed settings are checked before launch; an adaptive sampler may draw an invalid one
            return self._value(trial, stage, Outcome(Status.INVALID, str(error)))
        trial.set_user_attr("run", folder.path.name)
        outcome = self.run(trial, folder, stage)
        if outcome.status == Status.INTERRUPTED and not self.stopping:
            # a full disk: retrying at once would only find it full again
            self._log(f"ends: {outcome.reason}")
            self._notifications.stopped("a run was interrupted, as by a full disk")
            self.stopping = True
        self._notifications.run_ended(folder.path.name, outcome.status, outcome.reason)
        return self._value(trial, stage, outcome)

    def _value(self, trial: optuna.Trial, stage: Stage, outcome: Outcome) -> float:
        """The value of a trial that ended.

        A tuning trial that diverged or cannot be trained is a result that the sampler learns from: infinitely bad, the
        latter infeasible as well.

        Raises:
            TrialPruned: if it was pruned.
            TrialEnded: if it ended without a value.
        """
        status = outcome.status
        self._patiently(lambda: trial.set_user_attr("status", status))
        if outcome.reason:
            trial.set_user_attr("reason", outcome.reason)
        if stage == Stage.CONFIRMATION:
            if status == Status.DONE:
                assert outcome.report_value is not None
                return outcome.report_value
        elif status == Status.PRUNED:
            _constrain(trial, feasible=True)
            raise optuna.TrialPruned(outcome.reason)
        elif status in (Status.DONE, Status.DIVERGED, Status.OUT_OF_MEMORY, Status.INVALID):
            _constrain(trial, feasible=status in (Status.DONE, Status.DIVERGED))
            if status != Status.DONE:
                return math.inf
            assert outcome.selection_value is not None
            return outcome.selection_value
        raise TrialEnded(f"{status}: {outcome.reason}")

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopping = True

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        """Report the error of a thread: of Optuna's heartbeat, when the database is gone."""
        if compat.lost_storage(arguments.exc_value):
            self._log("a heartbeat was not recorded: the studies' database does not answer")
        else:
            threading.__excepthook__(arguments)

    @staticmethod
    def _log(message: str) -> None:
        print(f"worker {os.getpid()}: {message}", flush=True)


def _constrain(trial: optuna.Trial, *, feasible: bool) -> None:
    if INFEASIBLE not in trial.constraints:  # a retried trial inherits it
        trial.set_constraint(INFEASIBLE, -1.0 if feasible else 1.0)
