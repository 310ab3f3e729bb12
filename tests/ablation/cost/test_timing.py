"""A budget of seconds, converted to tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields

from workbench.ablation.ablation import Ablation
from workbench.ablation.arms import Arms, resolve
from workbench.ablation.cost.card import check_budget, cost_table
from workbench.ablation.cost.timing import match_seconds
from workbench.ablation.execution.plan import Plan
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.status import Stage
from workbench.training.probe import Measured

pytestmark = pytest.mark.process

SECONDS = {"axis": "seconds", "free": ["training.tokens"], "tolerance": 0.02}
MEASURED = {"full": Measured(0.010, {"forward": 1}), "sliding": Measured(0.008, {"forward": 1})}


def arms(fields: dict[str, Any], **budget: Any) -> Arms:
    return resolve(AblationConfig.parse({**fields, "budget": {**SECONDS, **budget}}))


def steps(arms: Arms) -> dict[str, int]:
    return {name: arm.run().training.steps for name, arm in arms.items()}


def test_a_faster_arm_gets_more_tokens(fields: dict[str, Any]) -> None:
    assert steps(match_seconds(arms(fields), MEASURED)) == {"full": 20, "sliding": 25}


def test_the_target_may_be_an_amount(fields: dict[str, Any]) -> None:
    assert steps(match_seconds(arms(fields, target=0.4), MEASURED)) == {"full": 40, "sliding": 50}


def test_the_card_is_matched_in_seconds(fields: dict[str, Any]) -> None:
    matched = match_seconds(arms(fields), MEASURED)
    table = cost_table(matched, MEASURED)
    check_budget(matched, table)
    assert table["residual"].to_list() == [0.0, pytest.approx(0.0)]
    assert table["off_flops"][1] > 0.1


def test_an_arm_that_cannot_be_measured_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"arms.sliding: got 'no time"):
        match_seconds(arms(fields), {"full": MEASURED["full"]})


def test_seconds_that_are_not_measured_match_nothing(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        check_budget(arms(fields), cost_table(arms(fields)))


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_seconds_are_measured_at_launch_and_fixed_from_then_on(corpus: Path, tmp_path: Path) -> None:
    fields = ablation_fields(corpus, tuning={"trials": 0}, confirmation={"seeds": [0]})
    fields["arms"] = {"full": {}, "deep": {"model.depth": 6}}
    fields["budget"] = {**SECONDS, "allow_mismatch": "steps of a few tokens"}
    create: Callable[[], Any] = lambda: Ablation.parse(fields, tmp_path).create()  # noqa: E731
    run = create()
    tokens = run.record.solved["deep"]["training.tokens"]
    assert tokens < fields["base"]["training"]["tokens"]
    record = Plan(run.files).create_run("deep", Stage.CONFIRMATION, 0, {}).record()
    assert record.tokens == tokens
    assert record.solved == {"training.tokens": tokens}
    assert create().record == run.record
