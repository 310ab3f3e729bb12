"""An ablation's configuration: arms, budget, search space, and the mistakes a new user makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields

from workbench.ablation.matching.cost_card import activation_bytes, check_budget, cost_table
from workbench.ablation.spec.ablation import AblationConfig
from workbench.accounting import account
from workbench.config import ConfigError
from workbench.training.config import RunConfig


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return ablation_fields(tmp_path)


def problem(fields: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        AblationConfig.parse({**fields, **changes})
    return str(raised.value)


def test_mistakes_name_their_path_and_what_to_do(fields: dict[str, Any]) -> None:
    arms = fields["arms"]
    assert "arms.b.model.pattern: got 'slidng'" in (
        text := problem(fields, arms={**arms, "b": {"model.pattern": "slidng"}})
    )
    assert "'sliding'" in text
    assert "arms.b.model.mixers.full.heads: got 5" in problem(fields, arms={"b": {"model.mixers.full.heads": 5}})
    base = {**fields["base"], "training": {**fields["base"]["training"], "batchsize": 4}}
    assert "base.training.batchsize: got the unknown field" in problem(fields, base=base), "where it was written"
    window = {"model.pattern": "sliding", "model.mixers.sliding.window": 0}
    assert "arms.b.model.mixers.sliding.window: got 0" in problem(fields, arms={"b": window})
    assert "Nearest valid name: 'tuning'" in problem(fields, tunning={})
    assert "baseline: got 'ful'" in problem(fields, baseline="ful")
    assert "all different" in problem(fields, confirmation={"seeds": [1, 1]})
    assert "none of the confirmation seeds" in problem(fields, tuning={**fields["tuning"], "seed": 1})
    assert "never a knob" in problem(fields, tuning={"trials": 2, "space": {"seed": {"values": [1, 2]}}})
    assert "the whole grid: 2" in problem(fields, tuning={**fields["tuning"], "trials": 3})
    assert "no arm" in problem(fields, arms={})
    assert "name: got '../x'" in problem(fields, name="../x")


def test_every_arm_gets_the_same_drawn_points(fields: dict[str, Any]) -> None:
    space = {
        "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "training.clip": {"low": 0.5, "high": 2.0},
    }
    config = AblationConfig.parse({**fields, "tuning": {"trials": 5, "space": space}})
    points = config.points("full")
    assert points == config.points("sliding") and len({p["training.learning_rate"] for p in points}) == 5
    one = AblationConfig.parse({**fields, "tuning": {"trials": 5, "space": {k: space[k] for k in ["training.clip"]}}})
    # an arm with one hyper-parameter less still gets the same values of the others
    assert [p["training.clip"] for p in one.points("full")] == [p["training.clip"] for p in points]


def test_variants_add_their_own_search_space(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse({**fields, "tuning": {"trials": 2, "variants": True, "sampler": "random"}})
    assert {"model.mixers.sliding.window", "model.mixers.sliding.kv_heads"} <= set(config.space("sliding"))
    assert all(
        run.model.layers for run in (config.run("sliding", seed=0, hyperparameters=p) for p in config.points("sliding"))
    )


def test_identity_ignores_how_the_work_is_carried_out(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse(fields)
    assert config.identity == AblationConfig.parse({**fields, "launch": {"workers": 7}}).identity
    assert config.identity != AblationConfig.parse({**fields, "alpha": 0.01}).identity


def test_cost_tells_what_does_not_match_and_the_budget_refuses_it(fields: dict[str, Any]) -> None:
    fields["arms"]["wide"] = {"model.feedforwards.swiglu.hidden": 128}
    config = AblationConfig.parse(fields)
    table = cost_table(config)
    rows = {row["arm"]: row for row in table.iter_rows(named=True)}
    assert rows["sliding"]["residual"] == 0 and "cache bytes" in rows["sliding"]["mismatch"]
    assert "non-embedding parameters" in rows["wide"]["mismatch"]
    assert rows["full"]["memory_bytes"] > 16 * rows["full"]["parameters"]
    with pytest.raises(ConfigError, match=r"arms.wide: got 'parameters \+"):
        check_budget(config, table)
    check_budget(AblationConfig.parse({**fields, "budget": {"allow_mismatch": "on purpose"}}), table)


def test_the_shipped_sweeps_are_valid_and_matched() -> None:
    for path in Path("sweeps").glob("*.yaml"):
        config = AblationConfig.load(path)
        check_budget(config, cost_table(config))
    sizes: dict[str, list[int]] = {}
    for path in Path("sweeps/runs").glob("*.yaml"):
        run = RunConfig.load(path)
        sizes.setdefault(run.model.scale, []).append(account(run.model, run.training.context).non_embedding)
    assert len(sizes["340m"]) >= 2
    assert all(max(same) < 1.02 * min(same) for same in sizes.values()), "the runs of one scale can be compared"


def test_recomputing_activations_shows_in_the_memory() -> None:
    sizes = [
        activation_bytes(RunConfig.parse({"model": {"depth": 8}, "training": {"recompute": recompute}}))
        for recompute in (False, True)
    ]
    assert sizes[0] / 8 < sizes[1] < sizes[0] / 3


def test_activations_grow_with_the_context_not_with_its_square() -> None:
    """Fused attention keeps no scores, on no device; the meta device must not count them."""
    short, long = (
        activation_bytes(RunConfig.parse({"training": {"context": context, "batch_size": 1, "tokens": 10_000}}))
        for context in (1024, 4096)
    )
    assert 3.9 < long / short < 4.1
