"""A worker: takes trials from the studies and starts each as a process of its own.

A crash, an out-of-memory or a hung kernel ends one trial, never the worker; a killed worker's trial goes to another one
after three missed heartbeats. Trials are forked from a server that has imported torch once, so they start at once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from workbench.ablation.plan import CONFIRMATION, Plan
from workbench.ablation.run import AblationRun
from workbench.ablation.study import suggest
from workbench.files import locked
from workbench.results.store import RunFolder

POLL = 0.1
"""Seconds between looks at a running trial."""


class TrialEnded(Exception):
    """A trial ended without a value; its status and reason are user attributes of the trial."""


def _trial(path: str, cache: str, threads: int) -> None:
    """What a trial's process runs. The slow import stays out of the worker's own process."""
    from workbench.training.trial import run_in_process

    run_in_process(path, cache, threads)


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
        """Give this worker's trials a GPU that no other worker has; where all are taken, they share the last."""
        gpus: list[str] = self.run.about.get("gpus", [])
        place = self.run.folder / "workers"
        place.mkdir(exist_ok=True)
        for gpu in gpus:
            name = "".join(c if c.isalnum() else "_" for c in gpu)
            with locked(place / f"gpu-{name}.lock", patience=0) as mine:
                if mine or gpu == gpus[-1]:
                    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when a trial's process first asks for a device
                    yield
                    return
        yield

    def _work(self) -> None:
        while not self.stopping and self.run.exists:
            with locked(self.run.folder / "plan.lock"):
                self.plan.advance()
            if self.run.finished:
                return
            turn = self.plan.next_study()
            if turn is None:  # others are still at work
                time.sleep(10 * POLL)
                continue
            arm, stage, study = turn
            study.optimize(lambda trial: self._objective(trial, arm, stage), n_trials=1, catch=(TrialEnded,))  # noqa: B023

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True

    def _objective(self, trial: optuna.Trial, arm: str, stage: str) -> float:
        if "slot" not in trial.user_attrs:
            # two workers reached for the last waiting trial, and Optuna made a new one for the second
            trial.set_user_attr("status", "surplus")
            raise TrialEnded("surplus")
        if stage == CONFIRMATION:
            seed, params = trial.user_attrs["seed"], self.run.selection()[arm]["hyperparameters"]
        else:
            seed = self.plan.config.tuning.seed
            params = {name: suggest(trial, name, choice) for name, choice in self.plan.config.space(arm).items()}
        folder = self.plan.folder_for(arm, stage, seed, params)
        trial.set_user_attr("run", folder.path.name)
        trial.set_user_attr("hyperparameters", json.dumps(params))
        result = self._follow(trial, folder, stage)
        if result["status"] == "pruned":
            raise optuna.TrialPruned(result["reason"])
        if result["status"] == "interrupted" and not self.stopping:
            # a full disk: trying again at once would only find it full again
            print(f"worker {os.getpid()} ends: {result['reason']}", flush=True)
            self.stopping = True
        if result["status"] != "done":
            trial.set_user_attr("status", result["status"])
            trial.set_user_attr("reason", result["reason"])
            raise TrialEnded(f"{result['status']}: {result['reason']}")
        return result["report_value" if stage == CONFIRMATION else "selection_value"]

    def _follow(self, trial: optuna.Trial, folder: RunFolder, stage: str) -> dict[str, Any]:
        """Run the trial's process to its end, reporting its evaluations. Returns the run's result or status."""
        while folder.is_held() and not self.stopping:  # the process of a dead worker has not noticed yet
            time.sleep(POLL)
        reported: set[int] = set()
        pruned = False
        process = None
        if not folder.result() and not self.stopping:
            cache = Path(self.run.folder.parent) / "cache"
            arguments = (str(folder.path), str(cache), self.run.about["threads"])
            process = self.processes.Process(target=_trial, args=arguments)
            process.start()
        while True:
            alive = process is not None and process.is_alive()
            pruned = self._report(trial, folder, reported) or pruned
            if process is None or not alive:
                break
            if self.stopping or pruned:
                process.terminate()  # it writes a checkpoint first
            process.join(POLL)
        if pruned and not folder.result():
            folder.finish("pruned", "its evaluations fell behind the median of this arm's trials")
        result = folder.result()
        if result:
            return result
        state = folder.status()
        if state["status"] == "killed":
            code = process.exitcode if process is not None else None
            state["reason"] = f"its process was killed (exit code {code})"
            folder.set_status("killed", state["reason"])
        elif state["status"] in ("waiting", "running"):
            state = {"status": "interrupted", "reason": "the worker was asked to stop before it began"}
        return state

    def _report(self, trial: optuna.Trial, folder: RunFolder, reported: set[int]) -> bool:
        """Tell Optuna the evaluations that are new. Returns whether the trial should be pruned."""
        for row in folder.metrics():
            if row.get("selection_value") is not None and row["step"] not in reported:
                reported.add(row["step"])
                trial.report(row["selection_value"], row["step"])
                if trial.should_prune() and row["step"] < folder.about()["steps"]:
                    return True
        return False
