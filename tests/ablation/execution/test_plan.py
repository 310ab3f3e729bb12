"""What is still to do, judged from the studies alone: no process is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from helpers import ablation_fields, small_model, small_tokenizer, write_corpus
from optuna.trial import TrialState

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan, run_name
from workbench.ablation.execution.studies import slots
from workbench.ablation.run import AblationRun
from workbench.config import ConfigError
from workbench.files import write_json
from workbench.pretrained import save
from workbench.results.store import RunFolder
from workbench.status import Stage, Status
from workbench.training.trial import train

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

Make = Callable[..., Ablation]
FEW: dict[str, Any] = {"arms": {"full": {}}, "confirmation": {"seeds": [0]}}


def end_one(plan: Plan, stage: Stage, status: Status, value: float = 1.0) -> RunFolder:
    """Take the next trial of a stage and end it, as a worker would."""
    study = plan.study("full", stage)
    trial = study.ask()
    seed = trial.user_attrs.get("seed", plan.config.tuning.seed)
    params = {}
    if stage == Stage.TUNING:
        params = {"training.learning_rate": trial.suggest_categorical("training.learning_rate", [2e-3, 8e-3])}
    folder = plan.create_run("full", stage, seed, params)
    trial.set_user_attr("run", folder.path.name)
    if status == Status.DONE:
        folder.finish(status, selection_value=value)
        study.tell(trial, value)
    else:
        folder.finish(status, "why") if status in (Status.CRASHED, Status.DIVERGED) else folder.set_status(
            status, "why"
        )
        trial.set_user_attr("status", status)
        study.tell(trial, state=TrialState.FAIL)
    plan.advance()
    return folder


def waiting_slots(plan: Plan, stage: Stage) -> list[int]:
    by_slot = slots(plan.study("full", stage))
    return [slot for slot, trials in by_slot.items() if trials[-1].state == TrialState.WAITING]


@pytest.fixture
def plan(ablation: Make) -> Plan:
    return Plan(ablation(**FEW).create().files)


def relaunch(ablation: Make) -> AblationRun:
    return ablation(**FEW).create()


def test_an_interrupted_trial_is_retried_by_any_worker(plan: Plan) -> None:
    end_one(plan, Stage.TUNING, Status.DONE)
    end_one(plan, Stage.TUNING, Status.INTERRUPTED)
    assert waiting_slots(plan, Stage.TUNING) == [1]
    assert not plan.folder.choices()


def test_the_best_setting_is_confirmed_when_tuning_has_ended(plan: Plan) -> None:
    end_one(plan, Stage.TUNING, Status.DONE)
    end_one(plan, Stage.TUNING, Status.DONE, 0.5)
    choice = plan.folder.choices()["full"]
    assert choice.selection_value == 0.5
    assert choice.done == 2
    assert waiting_slots(plan, Stage.CONFIRMATION) == [0]


def test_a_crash_is_not_retried_without_a_relaunch(plan: Plan) -> None:
    for _ in range(2):
        end_one(plan, Stage.TUNING, Status.CRASHED)
    plan.advance()
    assert plan.folder.is_finished
    assert "every tuning trial failed (crashed, crashed)" in plan.folder.failures()["full"]


def test_a_relaunch_retries_crashed_tuning_trials(plan: Plan, ablation: Make) -> None:
    first = end_one(plan, Stage.TUNING, Status.CRASHED)
    end_one(plan, Stage.TUNING, Status.CRASHED)
    run = relaunch(ablation)
    assert not run.finished
    assert not run.selection()
    assert waiting_slots(plan, Stage.TUNING) == [0, 1]
    assert not first.result()
    assert first.status()["status"] == Status.INTERRUPTED


def test_a_relaunch_retries_crashed_confirmations(plan: Plan, ablation: Make) -> None:
    for value in (1.0, 0.5):
        end_one(plan, Stage.TUNING, Status.DONE, value)
    for _ in range(2):  # once more by itself
        assert not plan.folder.is_finished
        confirmation = end_one(plan, Stage.CONFIRMATION, Status.CRASHED)
    assert plan.folder.is_finished
    assert not relaunch(ablation).finished
    assert not confirmation.result()
    end_one(plan, Stage.CONFIRMATION, Status.DONE)
    assert relaunch(ablation).finished


@pytest.mark.parametrize("declared", [False, True])
def test_a_diverged_confirmation_is_run_again_once_where_declared(ablation: Make, declared: bool) -> None:
    few = {**FEW, "tuning": {"trials": 0, "space": {}}, "protocol": {"rerun_diverged": declared}}
    plan = Plan(ablation(**few).create().files)
    for _ in range(1 + declared):
        assert waiting_slots(plan, Stage.CONFIRMATION) == [0]
        run = end_one(plan, Stage.CONFIRMATION, Status.DIVERGED)
    assert plan.folder.is_finished
    assert [event["was"] for event in run.events() if event["event"] == "reopened"] == ["diverged"] * declared


def test_a_relaunch_tries_a_crashed_trial_again_before_its_arm_is_confirmed(plan: Plan, ablation: Make) -> None:
    end_one(plan, Stage.TUNING, Status.CRASHED)
    end_one(plan, Stage.TUNING, Status.DONE)
    assert plan.folder.choices()
    relaunch(ablation)
    assert not plan.folder.choices()
    assert len(waiting_slots(plan, Stage.TUNING)) == 1


def test_a_relaunch_does_not_change_a_choice_that_is_confirmed(plan: Plan, ablation: Make) -> None:
    end_one(plan, Stage.TUNING, Status.CRASHED)
    end_one(plan, Stage.TUNING, Status.DONE)
    choices = plan.folder.choices()
    plan.create_run("full", Stage.CONFIRMATION, 0, choices["full"].hyperparameters)
    relaunch(ablation)
    assert plan.folder.choices() == choices
    assert not waiting_slots(plan, Stage.TUNING)


class TestDamaged:
    """A file of a run that is done is lost or damaged, and the ablation is launched again."""

    @pytest.fixture
    def done(self, plan: Plan) -> RunFolder:
        """The confirmation run, done."""
        end_one(plan, Stage.TUNING, Status.DONE)
        end_one(plan, Stage.TUNING, Status.DONE)
        study = plan.study("full", Stage.CONFIRMATION)
        trial = study.ask()
        setting = plan.hyperparameters_of("full")
        run = plan.create_run("full", Stage.CONFIRMATION, 0, setting, slot=trial.user_attrs["slot"])
        for name, value in {"run": run.path.name, "hyperparameters": json.dumps(setting), "status": "done"}.items():
            trial.set_user_attr(name, value)
        checksum = run.write_report(pl.DataFrame({"document": [0, 1], "nll_nats": [1.0, 2.0], "bytes": [3, 4]}))
        run.finish(Status.DONE, report_value=1.0, report_checksum=checksum)
        study.tell(trial, 1.0)
        plan.advance()
        assert plan.folder.is_finished
        return run

    def test_a_lost_record_is_restored(self, done: RunFolder, ablation: Make) -> None:
        record = done.record()
        (done.path / "run.json").write_bytes(b"\0" * 100)
        run = relaunch(ablation)
        assert run.finished
        assert done.record() == record

    def test_a_verdict_names_a_lost_record(self, done: RunFolder, plan: Plan) -> None:
        (done.path / "run.json").write_text("[]")
        with pytest.raises(ConfigError, match=r"run.json is missing or damaged.*restores it"):
            AblationRun(plan.folder.path).verdict()

    @pytest.mark.parametrize("file", ["result.json", "report.parquet"])
    def test_what_cannot_be_restored_is_measured_again(
        self, file: str, done: RunFolder, plan: Plan, ablation: Make
    ) -> None:
        content = (done.path / file).read_bytes()
        (done.path / file).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:-5])
        run = relaunch(ablation)
        assert not run.finished
        assert (done.result(), done.status()["status"]) == ({}, Status.INTERRUPTED)
        assert [event["file"] for event in done.events() if event["event"] == "damaged"] == [file]
        assert waiting_slots(plan, Stage.CONFIRMATION) == [0]

    def test_the_result_decides_where_the_status_is_lost(self, done: RunFolder, plan: Plan, ablation: Make) -> None:
        (done.path / "status.json").write_bytes(b"\0" * 50)
        assert plan.folder.runs().filter(pl.col("stage") == Stage.CONFIRMATION)["status"].to_list() == ["done"]
        assert relaunch(ablation).finished

    @pytest.mark.usefixtures("done")
    def test_a_lost_declaration_is_a_deviation(self, plan: Plan, ablation: Make) -> None:
        (plan.folder.path / "ablation.json").write_text("{}")
        deviations = relaunch(ablation).record.all_deviations()
        assert [deviation.why for deviation in deviations] == ["the first declaration is lost"]


def test_arms_of_similar_names_have_runs_of_their_own(ablation: Make) -> None:
    run = ablation(arms={"a b": {}, "a_b": {}, "a:b": {}}, tuning={"trials": 0}).create()
    plan = Plan(run.files)
    names = {plan.create_run(arm, Stage.CONFIRMATION, 0, {}).path.name for arm in run.arms}
    assert len(names) == 3


def test_the_longest_name_of_a_run_is_the_name_of_a_file() -> None:
    name = run_name(Stage.CONFIRMATION, "\N{CJK UNIFIED IDEOGRAPH-6F22} " * 20, "0123456789ab", 2**63 - 1)
    assert len(name.encode()) == len("confirmation--0123456789ab-seed9223372036854775807") + 80 + len(".12345678")


def test_a_relaunch_records_how_the_work_is_carried_out(
    plan: Plan, ablation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    record = ablation(**FEW, launch={"workers": 3}).create().record
    assert record.config.launch.workers == 3
    assert (record.workers, record.threads) == (3, 4)


def test_a_finished_ablation_has_a_verdict_though_a_run_never_started(ablation: Make) -> None:
    run = ablation(tuning={"trials": 0}).create()
    plan = Plan(run.files)
    for arm, seed in (("full", 0), ("full", 1), ("full", 2), ("sliding", 0), ("sliding", 1)):
        folder = plan.create_run(arm, Stage.CONFIRMATION, seed, {})
        measured = {run.metric.numerator: [1.0 + seed, 2.0], run.metric.denominator: [10, 20]}
        pl.DataFrame(measured).write_parquet(folder.path / "report.parquet")
        folder.finish(Status.DONE, report_value=0.1)
    assert run.verdict() is None
    run.files.mark_finished(True)
    assert "no result" in str(run.verdict())


def test_prepared_data_that_were_removed_are_prepared_again(ablation: Make, tmp_path: Path) -> None:
    run = ablation(**FEW).create()
    shutil.rmtree(tmp_path / "cache")
    relaunch(ablation)
    assert (tmp_path / "cache" / run.record.data["full"] / "card.json").exists()


def test_data_that_changed_since_the_launch_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    fields = ablation_fields(corpus, **FEW)
    Ablation.parse(fields, tmp_path / "results").create()
    shutil.rmtree(tmp_path / "results" / "cache")
    (corpus / "000.txt").write_text("something else")
    with pytest.raises(ConfigError, match=r"arms.full.data: got 'data that has changed since the launch"):
        Ablation.parse(fields, tmp_path / "results").create()


class TestStart:
    """Arms that start from trained weights."""

    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        return save(small_model(width=32), small_tokenizer(), tmp_path / "weights")

    @pytest.fixture
    def make(self, ablation: Make, weights: Path) -> Callable[[], Plan]:
        changes = {"base": {"start": {"folder": str(weights)}}, "tuning": {"trials": 0}}
        return lambda: Plan(ablation(**changes).create().files)

    @staticmethod
    def replace(weights: Path) -> None:
        shutil.rmtree(weights)
        save(small_model(width=32), small_tokenizer(), weights)

    def test_runs_are_those_of_the_launch(self, make: Callable[[], Plan], weights: Path) -> None:
        before = make().create_run("full", Stage.CONFIRMATION, 0, {})
        shutil.rmtree(weights)
        plan = make()
        assert plan.create_run("full", Stage.CONFIRMATION, 0, {}).path == before.path
        assert plan.create_run("full", Stage.CONFIRMATION, 1, {}).record().setting == before.record().setting

    @pytest.mark.parametrize(
        ("change", "reason"),
        [(shutil.rmtree, "expected a folder with config.json"), (replace, "contains other weights now")],
        ids=["missing", "changed"],
    )
    def test_a_trial_waits_for_them(
        self, make: Callable[[], Plan], weights: Path, change: Callable[[Path], None], reason: str
    ) -> None:
        kept = shutil.copytree(weights, weights.with_name("kept"))
        plan = make()
        run = plan.create_run("full", Stage.CONFIRMATION, 0, {})
        change(weights)
        outcome = train(run.path, plan.folder.cache_path)
        assert outcome["status"] == Status.INTERRUPTED
        assert reason in outcome["reason"]
        shutil.rmtree(weights, ignore_errors=True)
        kept.rename(weights)
        assert train(run.path, plan.folder.cache_path)["status"] == Status.DONE


def test_a_damaged_record_is_reported(ablation: Make) -> None:
    run = ablation(**FEW).create()
    write_json(run.folder / "ablation.json", {"name": "test"})
    with pytest.raises(ConfigError, match="expected the record of a launch"):
        AblationRun(run.folder)


def test_a_folder_without_an_ablation_names_the_nearest(ablation: Make) -> None:
    run = ablation(**FEW).create()
    with pytest.raises(ConfigError, match="Nearest valid name: 'test'"):
        AblationRun(run.folder.parent / "tset")


# -- looks -----------------------------------------------------------------------------------------------------------

LOOKS: dict[str, Any] = {
    "tuning": {"trials": 0},
    "confirmation": {"seeds": [0, 1, 2, 3, 4, 5]},
    "protocol": {"stopping": {"looks": [4, 6]}},
}


def confirm(plan: Plan, run: AblationRun, shift: float) -> None:
    """End every waiting confirmation run, in which ``sliding`` is worse by ``shift``."""
    noise = [0.0, 0.1, -0.1, 0.05, -0.05, 0.02]
    for arm in run.arms:
        study = plan.study(arm, Stage.CONFIRMATION)
        while any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            trial = study.ask()
            seed = trial.user_attrs["seed"]
            folder = plan.create_run(arm, Stage.CONFIRMATION, seed, {})
            value = 1.0 + noise[seed] + (shift + noise[-seed] if arm == "sliding" else 0)
            measured = {run.metric.numerator: [10 * value], run.metric.denominator: [10]}
            pl.DataFrame(measured).write_parquet(folder.path / "report.parquet")
            folder.finish(Status.DONE, report_value=value)
            trial.set_user_attr("run", folder.path.name)
            study.tell(trial, value)
    plan.advance()


def confirmations(run: AblationRun) -> dict[str, int]:
    return {
        arm: run.runs().filter((pl.col("arm") == arm) & (pl.col("stage") == "confirmation")).height for arm in run.arms
    }


def test_seeds_are_planned_up_to_the_next_look(ablation: Make) -> None:
    run = ablation(**LOOKS).create()
    plan = Plan(run.files)
    assert waiting_slots(plan, Stage.CONFIRMATION) == [0, 1, 2, 3]
    assert run.verdict() is None
    assert run.total == 12


def test_an_ablation_stops_at_the_look_that_decides_it(ablation: Make) -> None:
    run = ablation(**LOOKS).create()
    confirm(Plan(run.files), run, shift=5.0)
    assert run.finished
    assert [(look["seeds"], look["words"]) for look in run.files.looks()] == [(4, {"sliding": "worse"})]
    assert confirmations(run) == {"full": 4, "sliding": 4}
    assert run.total == 8
    assert "look 1 of 2" in str(run.verdict())


def test_an_undecided_look_is_recorded_and_seeds_go_on(ablation: Make) -> None:
    run = ablation(**LOOKS).create()
    plan = Plan(run.files)
    confirm(plan, run, shift=0.0)
    assert not run.finished
    assert run.files.looks()[0]["words"] == {"sliding": "undecided"}
    assert waiting_slots(plan, Stage.CONFIRMATION) == [4, 5]
    assert "look 1 of 2" in str(run.verdict())
    confirm(plan, run, shift=0.0)
    assert run.finished and len(run.files.looks()) == 2
    assert "look 2 of 2" in str(run.verdict())


def test_advancing_twice_takes_a_look_once(ablation: Make) -> None:
    run = ablation(**LOOKS).create()
    plan = Plan(run.files)
    confirm(plan, run, shift=0.0)
    looks = run.files.looks()
    plan.advance()
    ablation(**LOOKS).create()
    assert run.files.looks() == looks
    assert waiting_slots(plan, Stage.CONFIRMATION) == [4, 5]
