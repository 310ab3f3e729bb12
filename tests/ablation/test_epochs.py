"""How often a text is read: on the cost card before launch, and in the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from workbench.ablation.ablation import Ablation
from workbench.ablation.folder import AblationFolder
from workbench.ablation.verdict.disclosure import disclose
from workbench.data import tasks

pytestmark = pytest.mark.process
TIMES_READ = 12
FIELDS: dict[str, Any] = {"tuning": {"trials": 0}}


@pytest.fixture
def repeating(ablation: Callable[..., Ablation]) -> Ablation:
    """An ablation whose arm ``full`` reads its text about twelve times, and its other arm twice as often."""
    small = {"base": {"training": {"context": 32, "batch_size": 2, "tokens": 64 * 2_000}}}
    plan = ablation(**FIELDS, **small)
    rows = 64 * 2_000 // 32
    epochs = plan.arms["full"].run().epochs(plan._prepare(["full"], lambda line: None)["full"])
    assert epochs is not None
    tokens = 64 * round(rows / epochs * TIMES_READ / 2)
    arms = {"full": {}, "longer": {"training.tokens": 2 * tokens}}
    budget = {"axis": "parameters"}
    return ablation(
        **FIELDS, base={"training": {**small["base"]["training"], "tokens": tokens}}, arms=arms, budget=budget
    )


def test_the_cost_card_has_epochs_before_launch(repeating: Ablation) -> None:
    assert repeating.cost(measure=False)["epochs"].to_list() == pytest.approx([TIMES_READ, 2 * TIMES_READ], rel=0.01)


def test_the_verdict_names_the_epochs_of_every_arm(repeating: Ablation) -> None:
    run = repeating.create()
    sentences = disclose(AblationFolder(run.folder), AblationFolder(run.folder).record()).sentences
    assert "Training reads its text 12 times (full), 24 times (longer)." in sentences


def test_epochs_are_unknown_before_the_data_are_prepared(ablation: Callable[..., Ablation]) -> None:
    assert ablation(**FIELDS).cost(measure=False)["epochs"].to_list() == [None, None]


def test_rows_of_a_task_are_new(ablation: Callable[..., Ablation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "OVERLAP_ROWS", 10)
    task = {"kind": "mqar", "mixes": [{"length": 32, "pairs": 4}], "examples": 6}
    fields = ablation(**FIELDS).config.plain()
    fields["base"]["data"] = task
    run = Ablation.parse(fields, ablation().results).create()
    assert run.cost()["epochs"].to_list() == [None, None]
