"""What a verdict states beside its numbers: searches that were cut short, machines that differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.folder import AblationFolder
from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.disclosure import Disclosure, disclose
from workbench.files import write_json
from workbench.status import Stage, Status

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:Heartbeat of storage")]


@pytest.fixture
def run(ablation: Callable[..., Ablation]) -> AblationRun:
    return ablation(confirmation={"seeds": [0]}).create()


def add_run(run: AblationRun, stage: Stage, arm: str, seed: int, status: Status, **where: Any) -> None:
    """A run that ended; ``where`` is its environment."""
    from workbench.ablation.execution.plan import Plan

    params = {"training.learning_rate": 2e-3 if seed == 0 else 8e-3} if stage == Stage.TUNING else {}
    folder = Plan(run.files).create_run(arm, stage, seed if stage == Stage.CONFIRMATION else 1000, params)
    write_json(folder.path / "environment.json", {"code": "1", **where})
    if status in (Status.KILLED, Status.HUNG):
        folder.set_status(status, "why")
    else:
        folder.finish(status, "why", selection_value=1.0)


def disclosed(run: AblationRun) -> Disclosure:
    return disclose(AblationFolder(run.folder), run.record)


@pytest.mark.parametrize("status", [Status.KILLED, Status.HUNG, Status.CRASHED])
def test_a_tuning_trial_lost_to_the_machine_makes_a_verdict_exploratory(run: AblationRun, status: Status) -> None:
    add_run(run, Stage.TUNING, "full", 0, status)
    add_run(run, Stage.TUNING, "full", 1, Status.DONE)
    add_run(run, Stage.CONFIRMATION, "full", 0, Status.DONE)
    found = disclosed(run)
    assert f"unequal tuning: 1 of 2 of full ({status}) did not finish" in found.reasons
    assert any("searched less than declared" in sentence for sentence in found.sentences)


@pytest.mark.parametrize("status", [Status.DIVERGED, Status.OUT_OF_MEMORY, Status.PRUNED])
def test_a_tuning_trial_that_failed_by_itself_is_a_result(run: AblationRun, status: Status) -> None:
    add_run(run, Stage.TUNING, "full", 0, status)
    add_run(run, Stage.CONFIRMATION, "full", 0, Status.DONE)
    assert not any("tuning" in reason for reason in disclosed(run).reasons)


@pytest.mark.parametrize(("torch", "stated"), [("2.12", True), ("2.13", False)])
def test_runs_on_different_machines_are_named(run: AblationRun, torch: str, stated: bool) -> None:
    add_run(run, Stage.CONFIRMATION, "full", 0, Status.DONE, device="cpu", libraries={"torch": "2.13"})
    add_run(run, Stage.CONFIRMATION, "sliding", 0, Status.DONE, device="cpu", libraries={"torch": torch})
    assert any("different machines" in sentence for sentence in disclosed(run).sentences) == stated


def test_different_code_of_any_arm_is_a_deviation(run: AblationRun) -> None:
    add_run(run, Stage.CONFIRMATION, "full", 0, Status.DONE, code="1")
    add_run(run, Stage.CONFIRMATION, "sliding", 0, Status.DONE, code="2")
    assert "deviation: confirmation runs of different code" in disclosed(run).reasons
