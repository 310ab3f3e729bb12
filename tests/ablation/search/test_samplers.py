"""Samplers and pruners on a made-up objective."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from workbench.ablation.execution.studies import add_earlier_trials, enqueue, num_started
from workbench.ablation.search.draws import fixed_points
from workbench.ablation.search.samplers import INFEASIBLE, make_pruner, make_sampler, suggest
from workbench.ablation.spec.tuning import ADAPTIVE, Tuning
from workbench.ranges import Range

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "training.learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "training.accumulate": Range(low=1, high=8),
    "training.schedule": Range(values=("wsd", "cosine")),
}
EARLIER = [
    {
        "params": {
            "training.learning_rate": 1e-3 * 1.01**k,
            "training.accumulate": 1 + k % 5,
            "training.schedule": "wsd",
        },
        "value": 0.01 * k,
        "run": f"old/{k}",
    }
    for k in range(12)
]


def search(tuning: Tuning, trials: int, earlier: list[dict[str, Any]] | None = None) -> optuna.Study:
    """A search in which a large ``accumulate`` runs out of memory and a high learning rate diverges."""
    study = optuna.create_study(direction="minimize")
    add_earlier_trials(study, earlier or [], SPACE)
    for slot, point in enumerate(fixed_points(tuning, SPACE, list(SPACE))[:trials]):
        enqueue(study, slot, point)
    for _ in range(trials):
        study.sampler = make_sampler(tuning, num_started(study))
        trial = study.ask()
        params = {name: suggest(trial, name, choice) for name, choice in SPACE.items()}
        rate, does_not_fit = params["training.learning_rate"], params["training.accumulate"] >= 6
        trial.set_constraint(INFEASIBLE, 1.0 if does_not_fit else -1.0)
        study.tell(trial, math.inf if does_not_fit or rate > 5e-3 else (math.log(rate) - math.log(1e-3)) ** 2)
    return study


@pytest.fixture(scope="module", params=ADAPTIVE)
def study(request: pytest.FixtureRequest) -> tuple[Tuning, optuna.Study]:
    if request.param == "cmaes":
        pytest.importorskip("cmaes")
    tuning = Tuning(trials=8, sampler=request.param, space=SPACE)
    return tuning, search(tuning, 8)


def test_an_adaptive_sampler_tolerates_failures(study: tuple[Tuning, optuna.Study]) -> None:
    assert all(trial.state == TrialState.COMPLETE for trial in study[1].trials)


def test_an_adaptive_sampler_starts_from_the_shared_points(study: tuple[Tuning, optuna.Study]) -> None:
    tuning, searched = study
    assert [trial.params for trial in searched.trials[:4]] == fixed_points(tuning, SPACE, list(SPACE))[:4]


def test_an_adaptive_sampler_draws_different_points(study: tuple[Tuning, optuna.Study]) -> None:
    assert len({trial.params["training.learning_rate"] for trial in study[1].trials}) > 5


def test_an_adaptive_sampler_is_reproducible(study: tuple[Tuning, optuna.Study]) -> None:
    tuning, searched = study
    assert [trial.params for trial in search(tuning, 8).trials] == [trial.params for trial in searched.trials]


def test_tpe_learns_to_avoid_what_does_not_fit() -> None:
    # 16 trials: 4 shared ones, then 12 of TPE's, of which uniform drawing would put 4.5 out of memory (3 of 8 values)
    trials = search(Tuning(trials=16, sampler="tpe", space=SPACE), 16).trials[8:]
    assert sum(trial.params["training.accumulate"] >= 6 for trial in trials) <= 1


def test_earlier_trials_have_no_slot() -> None:
    study = search(Tuning(trials=8, sampler="tpe", space=SPACE), 8, EARLIER)
    assert len(study.trials) == 20
    assert sum("slot" in trial.user_attrs for trial in study.trials) == 8


def test_earlier_trials_are_added_once() -> None:
    study = optuna.create_study()
    for _ in range(2):
        add_earlier_trials(study, EARLIER, SPACE)
    assert len(study.trials) == 12


@pytest.mark.parametrize("kind", ["median", "hyperband"])
def test_nothing_is_pruned_before_three_evaluations(kind: Any) -> None:
    tuning = Tuning(trials=12, sampler="random", space=SPACE, pruner=kind)
    study = optuna.create_study(pruner=make_pruner(tuning, 8))
    pruned = {}
    for number in range(12):
        trial = study.ask()
        for evaluation in range(1, 9):
            trial.report(number / evaluation + (0.1 if number else 0), evaluation)
            if trial.should_prune() and number >= tuning.num_shared:
                pruned[number] = evaluation
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(number))
    assert pruned
    assert min(pruned.values()) >= 3
