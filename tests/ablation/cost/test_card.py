"""The cost card, and the budget's check of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.arms import Arms, resolve
from workbench.ablation.cost.card import check_budget, cost_table
from workbench.ablation.cost.printed import unmatched
from workbench.ablation.spec.ablation import AblationConfig
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.training.config import RunConfig

HIDDEN = "model.feedforwards.swiglu.hidden"


def resolved(fields: dict[str, Any], **changes: Any) -> Arms:
    return resolve(AblationConfig.parse({**fields, **changes}))


def rows(arms: Arms) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in cost_table(arms).iter_rows(named=True)}


def test_every_axis_that_differs_is_named(fields: dict[str, Any]) -> None:
    table = rows(resolved(fields, arms={**fields["arms"], "wide": {HIDDEN: 128}}))
    assert table["sliding"]["residual"] == 0
    assert "cache bytes" in table["sliding"]["mismatch"]
    assert "non-embedding parameters" in table["wide"]["mismatch"]


def test_memory_holds_weights_gradients_moments_and_activations(fields: dict[str, Any]) -> None:
    row = rows(resolved(fields))["full"]
    assert row["memory_bytes"] > 16 * row["parameters"]


def test_solved_values_are_shown(fields: dict[str, Any]) -> None:
    arms = resolved(fields, arms={"full": {}, "gdn": {"model.pattern": "gdn"}}, budget={"free": [HIDDEN]})
    table = rows(arms)
    assert table["gdn"]["solved"] == f"swiglu.hidden={arms['gdn'].solved[HIDDEN]}"
    assert table["full"]["solved"] == ""
    assert table["gdn"]["residual"] == table["gdn"]["off_parameters"]


def wide(fields: dict[str, Any], width: int, **budget: Any) -> Arms:
    return resolved(fields, arms={**fields["arms"], "wide": {"model.width": width}}, budget=budget)


def test_arms_off_the_budget_are_refused(fields: dict[str, Any]) -> None:
    arms = wide(fields, 64)
    with pytest.raises(ConfigError, match=r"arms.wide: got 'parameters \+.*Let the solver change a width"):
        check_budget(arms, cost_table(arms))


def test_a_solver_that_comes_no_nearer_is_reported(fields: dict[str, Any]) -> None:
    arms = wide(fields, 128, free=[HIDDEN])
    with pytest.raises(ConfigError, match="comes no nearer"):
        check_budget(arms, cost_table(arms))


def test_a_mismatch_with_a_reason_is_accepted(fields: dict[str, Any]) -> None:
    arms = wide(fields, 64, allow_mismatch="on purpose")
    check_budget(arms, cost_table(arms))


def test_the_shipped_runs_of_one_scale_can_be_compared() -> None:
    sizes: dict[str, list[int]] = {}
    for path in Path("sweeps/runs").glob("*.yaml"):
        run = RunConfig.load(path)
        if "width" not in run.model.model_fields_set:
            sizes.setdefault(run.model.scale, []).append(account(run.model, run.training.context).non_embedding)
    assert len(sizes["340m"]) >= 2
    assert all(max(same) < 1.02 * min(same) for same in sizes.values())


def test_what_is_not_matched_has_true_minus_signs() -> None:
    assert (
        unmatched("cache bytes -12.5%, tokens +1.9%; as declared") == "cache bytes −12.5 %, tokens +1.9 %; as declared"
    )
    assert unmatched("cache bytes −12.5 %") == "cache bytes −12.5 %"
