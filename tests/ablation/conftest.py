"""What the tests of ablations share: a corpus, one finished ablation, workers whose trials end as a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.timing import Timing
from workbench.ablation.execution.trial import Outcome
from workbench.ablation.execution.worker import Worker
from workbench.ablation.folder import AblationFolder
from workbench.ablation.run import AblationRun
from workbench.results.store import RunFolder
from workbench.status import Stage, Status

WAIT = 500
"""Seconds to wait for real processes; a loaded machine with a slow disk is no failure."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    """Fields of an ablation whose corpus does not exist: enough for everything before data are prepared."""
    return ablation_fields(tmp_path)


@pytest.fixture
def ablation(corpus: Path, tmp_path: Path) -> Callable[..., Ablation]:
    """An ablation of two arms below ``tmp_path``; changes are merged into its fields."""

    def make(name: str = "test", **changes: Any) -> Ablation:
        return Ablation.parse(ablation_fields(corpus, name, **changes), tmp_path)

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[AblationRun]:
    """One ablation of two arms, run to its end by two workers. Read only: many tests share it."""
    results = tmp_path_factory.mktemp("finished")
    run = Ablation.parse(ablation_fields(corpus), results).launch()
    assert run.wait(WAIT), (run.folder / "workers" / "log.txt").read_text()
    yield run


class ScriptedWorker(Worker):
    """A worker whose trials start no process and end as ``script``, and their repeats as ``repeats``, says: slot ->
    outcome, by default done."""

    script: dict[int, Outcome] = {}
    repeats: dict[int, Outcome] = {}

    def run(self, trial: optuna.Trial, folder: RunFolder, stage: Stage) -> Outcome:
        outcome = Outcome(Status.DONE, report_value=1.0)
        if stage != Stage.CONFIRMATION:
            script = self.script if stage == Stage.TUNING else self.repeats
            outcome = script.get(trial.user_attrs["slot"], Outcome(Status.DONE, selection_value=1.0))
        values = {"selection_value": outcome.selection_value, "report_value": outcome.report_value}
        folder.finish(outcome.status, outcome.reason, **{k: v for k, v in values.items() if v is not None})
        return outcome


@pytest.fixture
def work() -> Callable[..., ScriptedWorker]:
    """Run an ablation to its end in this process, without training."""

    def until_done(
        folder: AblationFolder,
        script: dict[int, Outcome] | None = None,
        timing: Timing | None = None,
        repeats: dict[int, Outcome] | None = None,
    ) -> ScriptedWorker:
        worker = ScriptedWorker(folder, timing or Timing(idle=0.01))
        worker.script, worker.repeats = script or {}, repeats or {}
        worker.work_until_done()
        return worker

    return until_done
