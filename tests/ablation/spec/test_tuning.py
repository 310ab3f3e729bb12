"""The search: equal effort for every arm, samplers that learn from failures, pruning inside one arm, warm starts."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import ablation_fields, write_corpus
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import CONFIRMATION, TUNING, Plan
from workbench.ablation.execution.studies import (
    INFEASIBLE,
    add_earlier,
    begun,
    enqueue,
    fail_stale_trials,
    pruner,
    sampler,
    suggest,
)
from workbench.ablation.execution.worker import Worker
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.tuning import ADAPTIVE, Tuning, contains, place
from workbench.config import ConfigError
from workbench.contract import Range
from workbench.results.store import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "training.learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "training.accumulate": Range(low=1, high=8),
    "training.schedule": Range(values=("wsd", "cosine")),
}
LR = {"training.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return ablation_fields(tmp_path)


def tuned(fields: dict[str, Any], **tuning: Any) -> AblationConfig:
    return AblationConfig.parse({**fields, "tuning": {"trials": 6, "space": LR, **tuning}})


def problem(fields: dict[str, Any], **tuning: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        tuned(fields, **tuning)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["random", "qmc", *(kind for kind in ADAPTIVE if kind != "cmaes")])
def test_every_arm_gets_the_same_first_settings_even_where_its_own_space_is_larger(
    kind: str, fields: dict[str, Any]
) -> None:
    config = tuned(fields, sampler=kind, variants=True)
    full, sliding = (config.points(arm) for arm in ("full", "sliding"))
    fixed = 4 if kind in ADAPTIVE else 6
    assert len(full) == len(sliding) == 6 and [bool(point) for point in full] == [True] * fixed + [False] * (6 - fixed)
    shared = set(config.space("full")) & set(config.space("sliding"))
    assert "training.learning_rate" in shared and set(config.space("sliding")) > shared
    for name in shared:
        if config.space("full")[name] == config.space("sliding")[name]:
            assert [p.get(name) for p in full] == [p.get(name) for p in sliding]
    assert len({point["training.learning_rate"] for point in full[:fixed]}) == fixed
    assert tuned(fields, sampler=kind, variants=True).points("full") == full
    assert tuned(fields, sampler=kind, variants=True, sampler_seed=1).points("full") != full


def test_sobol_points_fill_every_range_evenly() -> None:
    points = Tuning(trials=8, sampler="qmc", space=SPACE).points(SPACE, list(SPACE))
    rates = sorted(math.log10(point["training.learning_rate"]) for point in points)
    assert all(-4 + k / 4 <= rate < -4 + (k + 1) / 4 for k, rate in enumerate(rates))  # one in each eighth
    assert sorted(point["training.accumulate"] for point in points) == list(range(1, 9))
    assert sum(point["training.schedule"] == "wsd" for point in points) == 4
    for choice in SPACE.values():
        assert all(contains(choice, place(choice, at)) for at in (0.0, 0.3, 0.999999))


def test_enqueued_settings_come_first_and_count(fields: dict[str, Any]) -> None:
    config = tuned(
        fields,
        sampler="qmc",
        variants=True,
        enqueue=[{"training.learning_rate": 2e-3, "model.mixers.sliding.window": config_window(fields)}, {}],
    )
    points = config.points("sliding")
    assert len(points) == 6 and points[0]["training.learning_rate"] == 2e-3
    assert set(points[0]) == set(config.space("sliding"))  # what is left out is drawn
    assert "model.mixers.sliding.window" not in config.points("full")[0]
    assert "got 0.5; expected a value of 0.001 to 0.01" in problem(fields, enqueue=[{"training.learning_rate": 0.5}])
    assert "Nearest valid name" in problem(fields, enqueue=[{"training.lerning_rate": 2e-3}])
    assert "at most the 6 trials" in problem(fields, enqueue=[{}] * 7)


def config_window(fields: dict[str, Any]) -> Any:
    choice = tuned(fields, variants=True).space("sliding")["model.mixers.sliding.window"]
    return choice.values[0] if choice.values else choice.low


def test_a_variants_range_is_overridden_in_the_file_and_only_where_the_arm_has_it(fields: dict[str, Any]) -> None:
    config = tuned(fields, variants=True, space={**LR, "model.mixers.sliding.window": {"values": [2, 4]}})
    assert config.space("sliding")["model.mixers.sliding.window"].values == (2, 4)
    assert "model.mixers.sliding.window" not in config.space("full")


def test_what_cannot_be_searched_is_refused(fields: dict[str, Any]) -> None:
    for name in ("seed", "data.seed"):
        assert "never a knob" in problem(fields, space={name: {"values": [1, 2]}})
    assert "equal tokens" in problem(fields, space={"training.tokens": {"values": [10_000, 20_000]}})
    assert "selection first" in problem(fields, objectives=["flops"])
    assert "pruner: got 'median'" in problem(fields, objectives=["selection", "flops"], pruner="median", sampler="tpe")
    assert "warm_start: got ['x']; expected nothing: random" in problem(fields, warm_start=["x"])
    assert "at least 4" in problem(fields, pruner="hyperband")  # the test's runs have two evaluations


# -- samplers and pruners on a made-up objective ---------------------------------------------------------------------


def search(tuning: Tuning, trials: int, earlier: list[dict[str, Any]] | None = None) -> optuna.Study:
    """A search in which a large ``accumulate`` runs out of memory and a high learning rate diverges."""
    study = optuna.create_study(directions=["minimize"] * len(tuning.objectives))
    add_earlier(study, earlier or [], SPACE)
    for slot, point in enumerate(tuning.points(SPACE, list(SPACE))[:trials]):
        enqueue(study, slot, point)
    for _ in range(trials):
        study.sampler = sampler(tuning, begun(study))
        trial = study.ask()
        params = {name: suggest(trial, name, choice) for name, choice in SPACE.items()}
        rate, memory = params["training.learning_rate"], params["training.accumulate"]
        trial.set_constraint(INFEASIBLE, 1.0 if memory >= 6 else -1.0)
        value = (math.log(rate) - math.log(1e-3)) ** 2
        study.tell(trial, [math.inf if memory >= 6 or rate > 5e-3 else value, memory][: len(tuning.objectives)])
    return study


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("objectives", [("selection",), ("selection", "flops")])
def test_learning_samplers_start_from_shared_trials_and_live_with_failures(kind: str, objectives: Any) -> None:
    if kind == "cmaes":
        pytest.importorskip("cmaes")
        if len(objectives) > 1:
            pytest.skip("CMA-ES has one objective")
    tuning = Tuning(trials=8, sampler=kind, space=SPACE, objectives=objectives)
    study = search(tuning, 8)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    fixed = [trial.params for trial in study.trials[:4]]
    assert fixed == tuning.points(SPACE, list(SPACE))[:4]
    assert len({trial.params["training.learning_rate"] for trial in study.trials}) > 5  # drawn anew each time
    assert [trial.params for trial in search(tuning, 8).trials] == [trial.params for trial in study.trials]


def test_tpe_learns_to_avoid_what_does_not_fit() -> None:
    # 16 trials: 4 shared ones, then 12 of TPE's, of which uniform drawing would put 4.5 out of memory (3 of 8 values)
    tuning = Tuning(trials=16, sampler="tpe", space=SPACE)
    bad = [trial.params["training.accumulate"] >= 6 for trial in search(tuning, 16).trials[8:]]
    assert sum(bad) <= 1


def test_earlier_trials_are_learnt_from_and_have_no_slot() -> None:
    earlier = [
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
    study = search(Tuning(trials=8, sampler="tpe", space=SPACE), 8, earlier)
    assert len(study.trials) == 20 and sum("slot" in trial.user_attrs for trial in study.trials) == 8
    add_earlier(study, earlier, SPACE)
    assert len(study.trials) == 20  # once only


def test_pruners_compare_smoothed_values_inside_one_arm_after_three_evaluations() -> None:
    for kind in ("median", "hyperband"):
        tuning = Tuning(trials=12, sampler="random", space=SPACE, pruner=kind)
        study = optuna.create_study(pruner=pruner(tuning, 8))
        pruned = {}
        for number in range(12):
            trial = study.ask()
            for evaluation in range(1, 9):
                trial.report(number / evaluation + (0.1 if number else 0), evaluation)
                if trial.should_prune() and number >= tuning.shared:
                    pruned[number] = evaluation
                    study.tell(trial, state=TrialState.PRUNED)
                    break
            else:
                study.tell(trial, float(number))
        assert pruned and min(pruned.values()) >= 3, kind


# -- through the plan and a worker, without a trial's process -----------------------------------------------------------


class Scripted(Worker):
    """A worker whose trials end as a script says."""

    script: dict[int, dict[str, Any]]
    evaluations: tuple[float, ...] = ()

    def _follow(self, trial: optuna.Trial, folder: RunFolder, stage: str) -> dict[str, Any]:
        if stage == TUNING:
            result = self.script.get(trial.user_attrs["slot"], {"status": "done", "selection_value": 1.0})
        else:
            result = {"status": "done", "report_value": 1.0}
        folder.finish(result["status"], result.get("reason"), **{k: v for k, v in result.items() if "value" in k})
        return {"reason": None, **result}


def work(run: Any, script: dict[int, dict[str, Any]]) -> Plan:
    worker = Scripted(run)
    worker.script = script
    worker._work()
    return worker.plan


def ablation(corpus: Path, results: Path, name: str = "test", **tuning: Any) -> Ablation:
    fields = ablation_fields(corpus, name, arms={"full": {}}, confirmation={"seeds": [0]})
    return Ablation.parse({**fields, "tuning": {"trials": 6, "space": LR, **tuning}}, results)


def test_out_of_memory_is_infeasible_learnt_from_labelled_and_tried_again(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, sampler="tpe", first=2, objectives=["selection", "cache_bytes"]).create()
    plan = work(
        run,
        {
            0: {"status": "out_of_memory", "reason": "CUDA"},
            1: {"status": "diverged", "reason": "NaN"},
            2: {"status": "done", "selection_value": 0.5},
        },
    )
    trials = plan.study("full", TUNING).trials
    assert [trial.user_attrs["status"] for trial in trials[:3]] == ["out_of_memory", "diverged", "done"]
    assert [trial.constraints[INFEASIBLE] for trial in trials[:3]] == [1.0, -1.0, -1.0]
    assert [trial.values[0] for trial in trials[:3]] == [math.inf, math.inf, 0.5] and trials[0].values[1] > 0
    assert run.finished and run.selection()["full"]["selection_value"] == 0.5 and run.selection()["full"]["done"] == 4
    assert set(run.runs()["status"]) == {"out_of_memory", "diverged", "done"}


def test_a_setting_that_is_no_valid_run_is_infeasible_not_the_end_of_the_worker(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ablation(corpus, tmp_path, sampler="tpe", trials=3, first=1).create()
    make = Plan.folder_for

    def folder_for(self: Plan, arm: str, stage: str, seed: int, params: dict[str, Any], **about: Any) -> RunFolder:
        if about.get("slot") == 1 and stage == TUNING:
            raise ConfigError.at("model.width", got=33, expected="a multiple of the heads")
        return make(self, arm, stage, seed, params, **about)

    monkeypatch.setattr(Plan, "folder_for", folder_for)
    plan = work(run, {})
    trial = plan.study("full", TUNING).trials[1]
    assert trial.user_attrs["status"] == "invalid" and "a multiple of the heads" in trial.user_attrs["reason"]
    assert trial.constraints[INFEASIBLE] == 1.0 and run.finished


def test_a_drawn_setting_off_the_budget_is_invalid_and_never_chosen(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "model.feedforwards.swiglu.hidden"
    base = ablation(corpus, tmp_path).config.run("full", seed=0).model.layers[0].feedforward.hidden  # type: ignore[attr-defined]
    space = {hidden: {"values": [base, 2 * base]}}
    run = ablation(corpus, tmp_path, sampler="tpe", trials=2, first=1, space=space, enqueue=[{hidden: base}]).create()
    monkeypatch.setattr(
        "workbench.ablation.execution.worker.suggest", lambda trial, name, choice: choice.values[trial.number]
    )
    plan = work(run, {0: {"status": "done", "selection_value": 2.0}})
    trial = plan.study("full", TUNING).trials[1]
    assert trial.user_attrs["status"] == "invalid" and f"tuning.space.{hidden}" in trial.user_attrs["reason"]
    assert trial.constraints[INFEASIBLE] == 1.0 and run.selection()["full"]["selection_value"] == 2.0
    with pytest.raises(ConfigError, match=r"within 2.0% of the budget"):
        plan.folder_for("full", CONFIRMATION, 0, {hidden: 2 * base})


def test_a_lost_database_loses_no_setting_that_a_sampler_drew(corpus: Path, tmp_path: Path) -> None:
    run = ablation(corpus, tmp_path, sampler="tpe", first=2).create()
    plan = work(run, {3: {"status": "done", "selection_value": 0.25}})
    before = [trial.params for trial in plan.study("full", TUNING).trials]
    (run.folder / "study.db").write_bytes((run.folder / "study.db").read_bytes()[:5000])
    for path in run.folder.glob("study.db-*"):
        path.unlink()
    (run.folder / "finished.json").unlink()
    again = ablation(corpus, tmp_path, sampler="tpe", first=2).create()
    assert list(run.folder.glob("damaged-*-study.db"))
    plan = Worker(again).plan
    waiting = [trial.system_attrs["fixed_params"] for trial in plan.study("full", TUNING).trials]
    assert waiting == before
    work(again, {3: {"status": "done", "selection_value": 0.25}})
    assert again.selection()["full"]["hyperparameters"] == before[3]


def test_warm_start_takes_as_many_earlier_trials_for_every_arm(corpus: Path, tmp_path: Path) -> None:
    old = ablation(corpus, tmp_path, "old").create()
    work(old, {0: {"status": "crashed", "reason": "x"}})
    new = ablation(corpus, tmp_path, "new", sampler="tpe", warm_start=[str(old.folder)], trials=2).create()
    assert len(new.about["warm_start"]["full"]) == 5
    plan = work(new, {})
    trials = plan.study("full", TUNING).trials
    assert len(trials) == 7 and new.selection()["full"]["trials"] == 2
    with pytest.raises(ConfigError, match=r"tuning.warm_start: got .*'full': 0"):
        ablation(
            corpus,
            tmp_path,
            "none",
            sampler="tpe",
            warm_start=[str(old.folder)],
            space={"training.learning_rate": {"low": 0.5, "high": 0.6}},
        ).create()


def test_a_trial_taken_over_after_the_clock_jumped_ends_once_and_no_worker_with_it(
    corpus: Path, tmp_path: Path
) -> None:
    run = ablation(corpus, tmp_path, trials=1).create()

    class Jumped(Scripted):
        script = {}
        jumps = 0

        def _follow(self, trial: optuna.Trial, folder: RunFolder, stage: str) -> dict[str, Any]:
            if not self.jumps:
                self.jumps += 1
                with sqlite3.connect(self.run.folder / "study.db", timeout=60) as database:
                    database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
                fail_stale_trials(self.plan.study("full", stage))  # another worker looks
                if folder.path.exists():
                    trial.report(1.0, 1)
            return super()._follow(trial, folder, stage)

    worker = Jumped(run)
    worker._work()
    trials = worker.plan.study("full", TUNING).trials
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE] and run.finished
    assert run.runs().height == 2 and set(run.runs()["status"]) == {"done"}


def test_a_database_out_of_reach_is_waited_for_and_then_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablation(corpus, tmp_path, trials=1).create()
    worker = Scripted(run)
    worker.script = {}
    advance, failures = worker.plan.advance, [StorageInternalError("down"), StorageInternalError("down")]

    def restarting(relaunch: bool = False) -> None:
        if failures:
            raise failures.pop()
        advance(relaunch)

    monkeypatch.setattr(worker.plan, "advance", restarting)
    monkeypatch.setattr("workbench.ablation.execution.worker.POLL", 0.001)
    worker._work()
    assert run.finished and not failures
    (run.folder / "finished.json").unlink()
    failures.extend(StorageInternalError("down") for _ in range(1000))
    monkeypatch.setattr("workbench.ablation.execution.worker.PATIENCE", 0.05)
    worker._work()
    assert "the studies cannot be reached: down" in capsys.readouterr().out and not run.finished


def test_a_trial_whose_worker_was_killed_before_its_first_sign_of_life_is_taken_up_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ablation(corpus, tmp_path, trials=1).create()
    plan = Plan(run)
    plan.study("full", TUNING).ask().set_user_attr("hyperparameters", "{}")  # taken and named, and nothing more
    plan.advance()
    assert plan.next_study() is None  # a slow worker is given time
    monkeypatch.setattr("workbench.ablation.execution.studies.NEVER_BEGUN", 0.0)
    plan = work(run, {})
    assert [trial.state for trial in plan.study("full", TUNING).trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert run.finished and run.selection()["full"]["trials"] == 1
