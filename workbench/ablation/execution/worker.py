"""A worker: takes trials from the studies and starts each as a process of its own.

A crash or an out-of-memory ends one trial, never the worker; a killed worker's trial goes to another one after three missed
heartbeats. A trial that shows no progress (:mod:`workbench.ablation.execution.watchdog`) is killed and taken up again like one whose
process died. Trials are forked from a server that has imported torch once, so they start at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

from workbench.ablation.execution.artifacts import attach
from workbench.ablation.execution.plan import CONFIRMATION, Plan
from workbench.ablation.execution.studies import INFEASIBLE, suggest
from workbench.ablation.execution.watchdog import Watchdog
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.tuning import SMOOTHING
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.files import locked
from workbench.results.store import RunFolder
from workbench.status import Status
from workbench.training.config import RunConfig

POLL = 0.1
"""Seconds between looks at a running trial."""
GRACE = 600.0
"""Seconds that a trial asked to stop has for its running step (minutes in a large model) and its checkpoint; then it is killed."""
SAYING = 2.0
"""Seconds that a hung trial has to write down where it stands."""
PATIENCE = 60.0
"""Seconds for which the studies' database may be out of reach."""


class TrialEnded(Exception):
    """A trial ended without a value; its status and reason are user attributes of the trial."""


def _trial(path: str, cache: str, threads: int) -> None:
    """What a trial's process runs. The slow import stays out of the worker's own process."""
    from workbench.training.trial import run_in_process

    run_in_process(path, cache, threads)


def _end(process: Any, hung: bool) -> None:
    """End a trial's process, which writes a checkpoint first; one that does not listen is killed, and a hung one at once,
    after it has been asked to write into its log where it stands."""
    if process.is_alive() and hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        process.join(SAYING)
    elif process.is_alive():
        process.terminate()
        process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join(GRACE)


class Worker:
    """Works on one ablation until nothing is left to do.

    Args:
        run: the ablation.
    """

    def __init__(self, run: AblationRun):
        self.run, self.plan = run, Plan(run)
        self.stopping = False
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.processes: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.processes.set_forkserver_preload(["workbench.training.trial", __name__])

    def work(self) -> None:
        """Take trials until every run has ended, or until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        with self._gpu():
            self._work()

    @contextlib.contextmanager
    def _gpu(self) -> Iterator[None]:
        """Give this worker's trials the GPU that the fewest other workers have."""
        placed = self.plan.config.launch.launcher != "local"  # an engine has already given this job its GPUs
        gpus: list[str] = [] if placed else self.run.about.get("gpus", [])
        place = self.run.folder / "workers"
        place.mkdir(exist_ok=True)
        for turn in itertools.count() if gpus else ():
            for gpu in gpus:
                name = "".join(c if c.isalnum() else "_" for c in gpu)
                with locked(place / f"gpu-{name}-{turn}.lock", patience=0) as mine:
                    if mine:
                        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when a trial's process first asks for a device
                        yield
                        return
        yield

    def _work(self) -> None:
        failing_since = None
        while not self._asked_to_stop() and self.run.exists:
            try:
                if not self._turn():
                    return
                failing_since = None
            except StorageInternalError as error:  # a restarting server, a full disk
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > PATIENCE:
                    print(
                        f"worker {os.getpid()} ends: the studies cannot be reached: {error.__cause__ or error}",
                        flush=True,
                    )
                    return
                time.sleep(10 * POLL)

    def _turn(self) -> bool:
        """Take one trial, or wait a moment where others have all of them. Returns False when nothing is left to do."""
        with locked(self.run.folder / "plan.lock"):
            self.plan.advance()
        if self.run.finished:
            return False
        turn = self.plan.next_study()
        if turn is None:  # others are still at work
            time.sleep(10 * POLL)
            return True
        arm, stage, study = turn
        try:
            study.optimize(lambda trial: self._objective(trial, arm, stage), n_trials=1, catch=(TrialEnded,))
        except (UpdateFinishedTrialError, ValueError) as error:
            if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a"):
                raise
            # the clock jumped, or this machine slept: the trial was given up for dead, and goes on from its checkpoint
            print(f"worker {os.getpid()}: its trial was taken over ({error})", flush=True)
        return True

    def _asked_to_stop(self) -> bool:
        self.stopping = self.stopping or self.run.is_stopping()
        return self.stopping

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True

    def _objective(self, trial: optuna.Trial, arm: str, stage: str) -> float | list[float]:
        if "slot" not in trial.user_attrs:
            # two workers reached for the last waiting trial, and Optuna made a new one for the second
            trial.set_user_attr("status", "surplus")
            raise TrialEnded("surplus")
        if stage == CONFIRMATION:
            seed, params = trial.user_attrs["seed"], self.run.selection()[arm]["hyperparameters"]
        else:
            seed = self.plan.config.tuning.seed
            params = {name: suggest(trial, name, choice) for name, choice in self.plan.config.space(arm).items()}
        trial.set_user_attr("hyperparameters", json.dumps(params))
        try:
            folder = self.plan.folder_for(arm, stage, seed, params, slot=trial.user_attrs["slot"])
        except (
            ConfigError
        ) as error:  # fixed settings are checked before launch; a sampler that learns may draw such a one
            return self._value(trial, stage, {"status": "invalid", "reason": str(error)}, None)
        trial.set_user_attr("run", folder.path.name)
        result = self._follow(trial, folder, stage)
        if result["status"] != "interrupted":
            try:
                attach(trial, folder, self.run.folder, failed=result["status"] not in ("done", "pruned"))
            except OSError as error:  # a full disk: the trial itself has ended
                print(f"worker {os.getpid()}: no artifacts of {folder.path.name}: {error}", flush=True)
        elif not self.stopping:
            # a full disk: trying again at once would only find it full again
            print(f"worker {os.getpid()} ends: {result['reason']}", flush=True)
            self.stopping = True
        return self._value(trial, stage, result, folder)

    def _value(
        self, trial: optuna.Trial, stage: str, result: dict[str, Any], folder: RunFolder | None
    ) -> float | list[float]:
        """What Optuna is told of a trial that ended: its values, or how it failed.

        A tuning trial that diverged or cannot be trained is a result that the sampler learns from: infinitely bad, the latter
        infeasible as well.
        """
        status = result["status"]
        trial.set_user_attr("status", status)
        if result.get("reason"):
            trial.set_user_attr("reason", result["reason"])
        if stage == CONFIRMATION:
            if status == "done":
                return result["report_value"]
        elif status == "pruned":
            self._constrain(trial, -1.0)
            raise optuna.TrialPruned(result["reason"])
        elif status in ("done", "diverged", "out_of_memory", "invalid"):
            self._constrain(trial, 1.0 if status in ("out_of_memory", "invalid") else -1.0)
            value = result["selection_value"] if status == "done" else math.inf
            costs = self.plan.config.tuning.objectives[1:]
            return [value, *(self._cost(folder, name) for name in costs)] if costs else value
        raise TrialEnded(f"{status}: {result['reason']}")

    @staticmethod
    def _constrain(trial: optuna.Trial, value: float) -> None:
        if INFEASIBLE not in trial.constraints:  # a retried trial has it from the one before
            trial.set_constraint(INFEASIBLE, value)

    @staticmethod
    def _cost(folder: RunFolder | None, name: str) -> float:
        """A further objective: what the model of a run costs, from its configuration."""
        if folder is None:
            return math.inf
        config = RunConfig.parse(folder.about()["config"])
        cost = account(config.model, config.training.context)
        return float(
            {
                "parameters": cost.non_embedding,
                "active_parameters": cost.active,
                "flops": cost.forward_flops,
                "cache_bytes": cost.cache_bytes,
            }[name]
        )

    def _follow(self, trial: optuna.Trial, folder: RunFolder, stage: str) -> dict[str, Any]:
        """Run the trial's process to its end, reporting its evaluations. Returns the run's result or status."""
        watchdog = Watchdog(folder, self.plan.config.launch.hung_after)
        while folder.is_held() and not self._asked_to_stop():  # the process of a dead worker has not noticed yet
            if silent := watchdog.silent():
                return self._lost(
                    folder, Status.HUNG, f"a process of a dead worker holds it, without progress for {silent:.0f} s"
                )
            time.sleep(POLL)
        reported: set[int] = set()
        pruned = False
        silent = process = None
        before = folder.status()
        if not folder.result() and not self.stopping:
            cache = Path(self.run.folder.parent) / "cache"
            arguments = (str(folder.path), str(cache), self.run.about["threads"])
            process = self.processes.Process(target=_trial, args=arguments)
            process.start()
        watchdog = Watchdog(folder, self.plan.config.launch.hung_after)
        try:
            while (
                process is not None and process.is_alive() and not pruned and not silent and not self._asked_to_stop()
            ):
                pruned = self._report(trial, folder, reported)
                silent = watchdog.silent()
                process.join(POLL)
        finally:  # also where the trial was taken over, or the storage failed
            if process is not None:
                _end(process, hung=silent is not None)
        pruned = pruned or self._report(trial, folder, reported)
        if pruned and not folder.result():
            pruner = self.plan.config.tuning.pruner
            folder.finish(
                Status.PRUNED,
                f"the mean of its last {SMOOTHING} evaluations fell behind this arm's other trials ({pruner})",
            )
        result = folder.result()
        if result:
            return result
        if silent:
            return self._lost(folder, Status.HUNG, f"no progress for {silent:.0f} s; its process was killed")
        state = folder.status()
        if state["status"] == "interrupted" and state != before:
            return state  # this process was asked to stop, or found a full disk
        if process is None or (self.stopping and process.exitcode == -signal.SIGTERM):
            return {"status": "interrupted", "reason": "the worker was asked to stop before it began"}
        return self._lost(folder, Status.KILLED, f"its process was killed (exit code {process.exitcode})")

    @staticmethod
    def _lost(folder: RunFolder, status: Status, reason: str) -> dict[str, Any]:
        """The status of a run whose process is gone, or of no use."""
        if folder.status()["status"] != "running":  # another process is not running it
            folder.set_status(status, reason)
        return {"status": status, "reason": reason}

    def _report(self, trial: optuna.Trial, folder: RunFolder, reported: set[int]) -> bool:
        """Tell Optuna the evaluations that are new. Returns whether the trial should be pruned.

        Evaluations are counted, not steps, and smoothed: trials are compared at equal tokens on the mean of three.
        """
        tuning = self.plan.config.tuning
        if len(tuning.objectives) > 1:  # Optuna prunes by one value only
            return False
        about = folder.about()
        warmup = about["config"]["training"]["warmup"] * about["steps"]
        rows = [row for row in folder.metrics() if row.get("selection_value") is not None]
        for number, row in enumerate(rows, 1):
            if number in reported:
                continue
            reported.add(number)
            latest = [row["selection_value"] for row in rows[max(0, number - SMOOTHING) : number]]
            trial.report(sum(latest) / len(latest), number)
            hopeless = trial.should_prune()  # asked of every trial: Hyperband counts those that pass
            exempt = trial.user_attrs["slot"] < tuning.shared or number < SMOOTHING or row["step"] <= warmup
            if hopeless and not exempt and row["step"] < about["steps"]:
                return True
        return False
