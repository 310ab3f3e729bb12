"""What is declared at launch is quoted; later changes of the analysis are deviations; what is run stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.execution.studies import slots
from workbench.ablation.folder import Choice
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.registration import describe
from workbench.ablation.verdict.disclosure import disclose
from workbench.config import ConfigError
from workbench.files import read_jsonl
from workbench.status import Stage
from workbench.training.trial import train

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]

Make = Callable[..., Ablation]
SMALL: dict[str, Any] = {"tuning": {"trials": 0}, "confirmation": {"seeds": [0, 1]}, "question": "Is it so?"}


def exploratory(run: AblationRun) -> str:
    return "; ".join(deviation["why"] for deviation in run.deviations())


def declared(run: AblationRun) -> str:
    return " ".join(describe(run.record.registration, run.record.all_deviations()))


@pytest.mark.parametrize(
    "words",
    [
        "Is it so?",
        "bits per byte on the report split",
        "parameters equal within 2 %",
        "smallest difference of interest: 0.02 bits per byte",
        "±0.01 bits per byte",
        "2 paired seeds (0, 1)",
        "stopping: every declared seed is run, then the verdict is read once",
    ],
)
def test_the_declaration_is_quoted(ablation: Make, words: str) -> None:
    protocol = {"metric": "bits per byte", "effect": 0.02, "stopping": "fixed", "exclusions": "none"}
    assert words in declared(ablation(**SMALL, protocol=protocol, margin=0.01).create())


def test_the_declaration_is_quoted_with_its_hash(ablation: Make) -> None:
    run = ablation(**SMALL).create()
    assert run.record.registration is not None
    assert len(run.record.registration.hash) == 12
    assert run.record.registration.hash in declared(run)
    assert not run.deviations()


def test_a_change_of_the_analysis_needs_a_reason(ablation: Make) -> None:
    ablation(**SMALL).create()
    with pytest.raises(ConfigError, match=r"deviation: got .*margin: None → 0.01"):
        ablation(**SMALL, margin=0.01).create()


def test_declared_seeds_stay(ablation: Make) -> None:
    ablation(**SMALL).create()
    with pytest.raises(ConfigError, match="declared seeds"):
        ablation(**{**SMALL, "confirmation": {"seeds": [0, 2]}}, deviation="x").create()


def test_an_anytime_design_may_add_seeds(ablation: Make) -> None:
    anytime: dict[str, Any] = {"tuning": {"trials": 0}, "protocol": {"stopping": {"anytime": True}}}
    ablation(**anytime, confirmation={"seeds": [0, 1, 2, 3]}).create()
    run = ablation(**anytime, confirmation={"seeds": [0, 1, 2, 3, 4]}).create()
    assert run.seeds == [0, 1, 2, 3, 4]
    assert [deviation["planned"] for deviation in run.deviations()] == [True]
    assert "an anytime-valid design may add seeds" in declared(run) and "Deviation" not in declared(run)
    assert disclose(run.files, run.record).exploratory is None


MORE: dict[str, Any] = {
    **SMALL,
    "margin": 0.01,
    "confirmation": {"seeds": [0, 1, 2]},
    "deviation": "a reviewer asked",
}


@pytest.fixture
def deviated(ablation: Make) -> AblationRun:
    ablation(**SMALL).create()
    return ablation(**MORE).create()


def test_a_deviation_is_recorded_with_its_reason(deviated: AblationRun) -> None:
    (deviation,) = deviated.deviations()
    assert deviation["why"] == "a reviewer asked"
    assert "margin: None → 0.01" in deviation["what"]


def test_a_deviation_leaves_the_registration(deviated: AblationRun) -> None:
    assert deviated.record.registration is not None
    assert deviated.record.registration.content["margin"] is None


def test_further_seeds_become_slots(deviated: AblationRun) -> None:
    assert deviated.seeds == [0, 1, 2]
    assert len(slots(Plan(deviated.files).study("full", Stage.CONFIRMATION))) == 3


def test_the_same_deviation_is_recorded_once(deviated: AblationRun, ablation: Make) -> None:
    assert ablation(**MORE).create().deviations() == deviated.deviations()


def test_what_is_run_cannot_be_changed(deviated: AblationRun, ablation: Make) -> None:
    with pytest.raises(ConfigError, match="another ablation"):
        ablation(**{**MORE, "arms": {"full": {}}}).create()


@pytest.mark.parametrize(
    "edit",
    [
        {"margin": 0.5},
        {"arms": {"full": {}, "sliding": {"model.pattern": "sliding", "model.mixers.sliding.window": 8}}},
        {"base": {}},
        {"tuning": {"trials": 0, "seed": 7}},
    ],
    ids=str,
)
def test_a_file_changed_by_hand_is_reported(ablation: Make, edit: dict[str, Any]) -> None:
    run = ablation(**SMALL).create()
    path = run.folder / "ablation.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {**content["config"], **edit}}))
    (deviation,) = AblationRun(run.folder).deviations()
    assert "by hand" in deviation["what"]


def test_how_the_work_is_carried_out_is_no_deviation(ablation: Make) -> None:
    ablation(**SMALL).create()
    assert ablation(**SMALL, launch={"workers": 9}).create().deviations() == []


def test_a_missing_registration_is_reported(ablation: Make) -> None:
    run = ablation(**SMALL).create()
    path = run.folder / "ablation.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "registration"}))
    again = AblationRun(run.folder)
    assert "not registered" in exploratory(again)
    assert declared(again).startswith("Not registered")


def test_the_report_split_is_opened_once(ablation: Make, work: Callable[..., Any]) -> None:
    rate = {"training.learning_rate": {"low": 1e-3, "high": 2e-3}}
    one_trial = {"trials": 1, "sampler": "random", "space": rate}
    run = ablation(arms={"full": {}}, tuning=one_trial, confirmation={"seeds": [0]}).create()
    Plan(run.files).create_run("full", Stage.CONFIRMATION, 0, {"training.learning_rate": 5e-3})
    with pytest.raises(ConfigError, match="one opening of the report split"):
        work(run.files)


def test_a_pilot_leaves_the_report_split_sealed(
    ablation: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.data import PreparedData

    run = ablation(**{**SMALL, "confirmation": {"seeds": [0], "split": "pilot"}}).create()
    folder = Plan(run.files).create_run("full", Stage.CONFIRMATION, 0, {})
    initialise = PreparedData.__init__

    def without_report(self: PreparedData, *arguments: Any) -> None:
        initialise(self, *arguments)
        self.report = None  # type: ignore[assignment]

    monkeypatch.setattr(PreparedData, "__init__", without_report)
    result = train(folder.path, tmp_path / "cache")
    assert result["status"] == "done"
    measured = [row for row in read_jsonl(folder.path / "evaluations.jsonl") if row["split"] == "pilot"]
    assert result["report_value"] in [row["value"] for row in measured]


def test_the_plan_records_a_choice_as_it_is_read(ablation: Make) -> None:
    run = ablation(**SMALL).create()
    run.files.choose("full", Choice(failed="why"))
    assert run.selection()["full"] == {"failed": "why"}
    assert run.failures() == {"full": "why"}
