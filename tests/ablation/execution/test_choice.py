"""The choice of a setting: repeats on further seeds, interpolation, and what a relaunch may change of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.execution.timing import Timing
from workbench.ablation.execution.trial import Outcome
from workbench.ablation.execution.worker import Worker
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError
from workbench.status import Stage, Status

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore::optuna.exceptions.ExperimentalWarning"),
]

RATE = "training.learning_rate"
GRID = [1e-3, 3e-3, 9e-3]
TWICE: dict[str, Any] = {"repeats": {"settings": 2, "seeds": [11, 12]}}
Work = Callable[..., Worker]
Search = Callable[..., AblationRun]


def done(value: float) -> Outcome:
    return Outcome(Status.DONE, selection_value=value)


def script(*values: float) -> dict[int, Outcome]:
    return {slot: done(value) for slot, value in enumerate(values)}


@pytest.fixture
def search(ablation: Callable[..., Ablation]) -> Search:
    """A created ablation of one arm and three learning rates, with changes to its tuning."""

    def make(**tuning: Any) -> AblationRun:
        tuning = {"trials": 3, "sampler": "grid", "space": {RATE: {"values": GRID}}, **tuning}
        return ablation(arms={"full": {}}, confirmation={"seeds": [0]}, tuning=tuning).create()

    return make


# -- repeats -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[AblationRun, list[Stage]]:
    """An ablation whose second best trial has the best mean, run to its end, and the stages of its runs in order."""
    tuning = {"trials": 3, "sampler": "grid", "space": {RATE: {"values": GRID}}, **TWICE}
    fields = ablation_fields(corpus, arms={"full": {}}, confirmation={"seeds": [0]}, tuning=tuning)
    run = Ablation.parse(fields, tmp_path_factory.mktemp("repeated")).create()
    worker, order = Worker(run.files, Timing(idle=0.01)), []
    values = {Stage.TUNING: (1.2, 1.0, 1.1), Stage.REPEAT: (1.3, 1.3, 1.1, 1.1), Stage.CONFIRMATION: (1.0,)}

    def end(trial: Any, folder: Any, stage: Stage) -> Outcome:
        order.append(stage)
        value = values[stage][trial.user_attrs["slot"]]
        if stage == Stage.CONFIRMATION:
            folder.write_report(pl.DataFrame({"document": [0]}))
        folder.finish(Status.DONE, selection_value=value, report_value=value)
        return Outcome(Status.DONE, selection_value=value, report_value=value)

    worker.run = end  # type: ignore[method-assign]
    worker.work_until_done()
    return run, order


Repeated = tuple[AblationRun, list[Stage]]


def test_the_best_settings_are_repeated_on_every_further_seed(repeated: Repeated) -> None:
    records = [folder.record() for folder in repeated[0].files.run_folders(Stage.REPEAT)]
    found = sorted((record.hyperparameters[RATE], record.seed) for record in records)
    assert found == [(3e-3, 11), (3e-3, 12), (9e-3, 11), (9e-3, 12)]


def test_repeats_wait_for_every_trial_and_confirmation_for_every_repeat(repeated: Repeated) -> None:
    assert repeated[1] == [Stage.TUNING] * 3 + [Stage.REPEAT] * 4 + [Stage.CONFIRMATION]


def test_repeats_are_planned_runs(repeated: Repeated) -> None:
    run, order = repeated
    assert run.finished
    assert run.runs().height == run.total == len(order)


def test_the_best_mean_is_chosen(repeated: Repeated) -> None:
    run, _ = repeated
    choice = run.files.choices()["full"]
    assert choice.hyperparameters == {RATE: 9e-3}
    assert choice.selection_value == pytest.approx(1.1)
    assert choice.seeds == 3
    assert run.runs().filter(selected=True)["run"].to_list() == [choice.run]


def test_advancing_twice_changes_nothing(repeated: Repeated) -> None:
    run, _ = repeated
    plan, choices = Plan(run.files), run.files.choices()
    before = {stage: len(plan.study("full", stage).trials) for stage in Stage}
    plan.advance()
    plan.advance(relaunch=True)
    assert {stage: len(plan.study("full", stage).trials) for stage in Stage} == before
    assert run.files.choices() == choices


def test_a_setting_that_diverges_on_a_further_seed_is_not_chosen(search: Search, work: Work) -> None:
    run = search(**TWICE)
    work(run.files, script(1.2, 1.0, 1.1), repeats={1: Outcome(Status.DIVERGED, "NaN")})
    assert run.files.choices()["full"].hyperparameters == {RATE: 9e-3}


def test_an_arm_none_of_whose_settings_survives_is_not_confirmed(search: Search, work: Work) -> None:
    run = search(**TWICE)
    work(run.files, script(1.2, 1.0, 1.1), repeats={slot: Outcome(Status.DIVERGED, "NaN") for slot in (1, 2)})
    assert "none of its best settings finished on all of the tuning seeds [1000, 11, 12]" in run.failures()["full"]
    assert run.finished


def test_fewer_settings_are_repeated_where_fewer_finished(search: Search, work: Work) -> None:
    run = search(**TWICE)
    diverged = Outcome(Status.DIVERGED, "NaN")
    work(run.files, {0: diverged, 1: diverged, 2: done(1.0)})
    assert len(run.files.run_folders(Stage.REPEAT)) == 2
    assert run.files.choices()["full"].hyperparameters == {RATE: 9e-3}


def test_a_relaunch_retries_repeats_but_no_trial_once_repeats_are_planned(search: Search) -> None:
    run = search(**TWICE)
    worker = Worker(run.files)
    crashed = Outcome(Status.CRASHED, "why")
    script = {(Stage.TUNING, 0): crashed, (Stage.REPEAT, 0): crashed}

    def end(trial: Any, folder: Any, stage: Stage) -> Outcome:
        outcome = script.get((stage, trial.user_attrs["slot"]), done(1.0))
        folder.finish(outcome.status, outcome.reason, selection_value=outcome.selection_value)
        if stage == Stage.REPEAT:
            worker.stopping = True
        return outcome

    worker.run = end  # type: ignore[method-assign]
    worker.work_until_done()  # three trials, one of which crashes, and the first repeat, which crashes too
    plan = Plan(run.files)
    plan.advance(relaunch=True)
    states = {stage: [trials[-1].state for trials in slots(plan.study("full", stage)).values()] for stage in Stage}
    assert states[Stage.TUNING][0] == TrialState.FAIL
    assert states[Stage.REPEAT] == [TrialState.WAITING] * 4


def test_a_lost_study_is_restored_with_its_repeats(search: Search, work: Work) -> None:
    run = search(**TWICE)
    work(run.files, script(1.2, 1.0, 1.1), repeats=script(1.3, 1.3, 1.1, 1.1))
    choices, folders = run.files.choices(), sorted(path.name for path in run.files.runs_path.iterdir())
    (run.folder / "study.db").unlink()
    (run.folder / "selection.json").unlink()
    work(run.files, script(1.2, 1.0, 1.1), repeats=script(1.3, 1.3, 1.1, 1.1))
    assert run.files.choices() == choices
    assert sorted(path.name for path in run.files.runs_path.iterdir()) == folders


# -- interpolation -----------------------------------------------------------------------------------------------------


def test_an_arm_is_confirmed_at_the_fitted_optimum(search: Search, work: Work) -> None:
    run = search(interpolate=True)
    work(run.files, script(1.2, 1.0, 1.1))  # in steps of a factor of 3: smallest at 1/6 of a step above the middle
    choice = run.files.choices()["full"]
    assert choice.hyperparameters == {RATE: pytest.approx(3e-3 * 3 ** (1 / 6), rel=5e-3)}
    assert choice.selection_value == pytest.approx(1.0 - 0.15 * (1 / 6) ** 2)
    assert choice.interpolated and choice.run is None
    (folder,) = run.files.run_folders(Stage.CONFIRMATION)
    assert folder.record().hyperparameters == choice.hyperparameters


def test_an_optimum_at_the_edge_is_not_interpolated(search: Search, work: Work) -> None:
    run = search(interpolate=True)
    work(run.files, script(1.2, 1.1, 1.0))
    choice = run.files.choices()["full"]
    assert choice.hyperparameters == {RATE: 9e-3}
    assert not choice.interpolated


@pytest.mark.parametrize(
    "space",
    [
        {RATE: {"values": GRID}, "training.weight_decay": {"values": [0.1]}},
        {"training.schedule": {"values": ["wsd", "cosine", "wsd"]}},
        {"training.accumulate": {"values": [1, 2, 4]}},
    ],
)
def test_interpolation_needs_one_numeric_field(search: Search, space: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tuning.interpolate: .* expected one numeric field in every arm"):
        search(space=space, interpolate=True)


# -- trials in proportion to fields ------------------------------------------------------------------------------------


def test_an_arm_with_two_fields_has_twice_the_trials(ablation: Callable[..., Ablation]) -> None:
    window = "model.mixers.sliding.window"
    made = ablation(
        arms={"full": {"model.pattern": "full"}, "sliding": {"model.pattern": "sliding"}},
        tuning={
            "trials": 2,
            "sampler": "random",
            "policy": "per_dimension",
            "space": {RATE: {"low": 1e-3, "high": 1e-2, "log": True}, window: {"low": 8, "high": 32}},
        },
        budget={"allow_mismatch": "a test"},
    )
    full, sliding = made.arms["full"], made.arms["sliding"]
    assert (len(full.points), len(sliding.points)) == (2, 4)
    assert [point[RATE] for point in sliding.points[:2]] == [point[RATE] for point in full.points]
    card = made.cost(measure=False)
    assert card.select("tuned", "searched").rows() == [(1, 2), (2, 4)]
    assert card["trials"].to_list() == [
        2 + len(made.config.confirmation.seeds),
        4 + len(made.config.confirmation.seeds),
    ]
