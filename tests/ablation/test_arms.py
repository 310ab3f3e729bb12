"""Arms resolved from a description: runs, search spaces, settings fixed before launch, and mistakes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.ablation.arms import Arms, resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.tuning import ADAPTIVE
from workbench.config import ConfigError
from workbench.transforms import StartConfig

HIDDEN = "model.feedforwards.swiglu.hidden"
RATE = {"training.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
WINDOW = "model.mixers.sliding.window"


def resolved(fields: dict[str, Any], **changes: Any) -> Arms:
    return resolve(AblationConfig.parse({**fields, **changes}))


def tuned(fields: dict[str, Any], **tuning: Any) -> Arms:
    return resolved(fields, tuning={"trials": 6, "space": RATE, **tuning})


def problem(fields: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        resolved(fields, **changes)
    return str(raised.value)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"model.pattern": "slidng"}, "arms.b.model.pattern: got 'slidng'"),
        ({"model.pattern": "slidng"}, "'sliding'"),
        ({"model.mixers.full.heads": 5}, "arms.b.model.mixers.full.heads: got 5"),
        ({"model.pattern": "sliding", WINDOW: 0}, "arms.b.model.mixers.sliding.window: got 0"),
        ({"data": {"kind": "mqar"}}, "arms.b.data"),
    ],
)
def test_a_mistake_in_an_arm_is_named(fields: dict[str, Any], arm: dict[str, Any], message: str) -> None:
    assert message in problem(fields, arms={**fields["arms"], "b": arm})


def test_a_mistake_in_the_base_is_named_there_and_once(fields: dict[str, Any]) -> None:
    base = {**fields["base"], "training": {**fields["base"]["training"], "batchsize": 4}}
    assert problem(fields, base=base).count("base.training.batchsize: got the unknown field") == 1


def test_the_mistakes_of_all_arms_are_reported_together(fields: dict[str, Any]) -> None:
    text = problem(fields, arms={"a": {"model.pattern": "slidng"}, "b": {"model.mixers.full.heads": 5}})
    assert "arms.a.model.pattern" in text
    assert "arms.b.model.mixers.full.heads" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"metric": "accuracy"}}, "protocol.metric: got 'accuracy'"),
        ({"budget": {"free": ["model.widht"]}}, "budget.free: got 'model.widht'"),
        ({"tuning": {"trials": 3, "sampler": "grid", "space": {"training.clip": {"values": [1, 2]}}}}, "whole grid: 2"),
        ({"tuning": {"trials": 2, "space": RATE, "pruner": "hyperband"}}, "at least 4"),
    ],
)
def test_other_mistakes_are_named(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert message in problem(fields, **changes)


def test_the_baseline_comes_first(fields: dict[str, Any]) -> None:
    arms = resolved(fields, baseline="sliding")
    assert list(arms) == ["sliding", "full"]


def test_a_run_is_parsed_once(fields: dict[str, Any]) -> None:
    arm = resolved(fields)["full"]
    assert arm.run(seed=1) is arm.run(seed=1)


def test_hyperparameters_are_merged_into_the_run(fields: dict[str, Any]) -> None:
    run = resolved(fields)["full"].run(seed=5, hyperparameters={"training.learning_rate": 0.25})
    assert run.training.learning_rate == 0.25
    assert run.seed == 5


def test_the_default_seed_is_that_of_tuning(fields: dict[str, Any]) -> None:
    assert resolved(fields)["full"].run().seed == 1000


# -- settings fixed before launch --------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_random_points(fields: dict[str, Any]) -> None:
    space = {**RATE, "training.clip": {"low": 0.5, "high": 2.0}}
    arms = tuned(fields, trials=5, space=space)
    assert arms["full"].points == arms["sliding"].points
    assert len({point["training.learning_rate"] for point in arms["full"].points}) == 5


def test_a_hyperparameter_has_the_same_values_without_the_others(fields: dict[str, Any]) -> None:
    clip = {"training.clip": {"low": 0.5, "high": 2.0}}
    both, alone = tuned(fields, space={**RATE, **clip})["full"], tuned(fields, space=clip)["full"]
    assert [p["training.clip"] for p in alone.points] == [p["training.clip"] for p in both.points]


SAMPLERS = ["random", "qmc", *(sampler for sampler in ADAPTIVE if sampler != "cmaes")]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_adaptive_sampler_starts_after_the_shared_trials(sampler: str, fields: dict[str, Any]) -> None:
    points = tuned(fields, sampler=sampler)["full"].points
    num_fixed = 4 if sampler in ADAPTIVE else 6
    assert [bool(point) for point in points] == [True] * num_fixed + [False] * (6 - num_fixed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_arms_with_different_spaces_share_the_values_of_common_fields(sampler: str, fields: dict[str, Any]) -> None:
    arms = tuned(fields, sampler=sampler, variants=True)
    full, sliding = arms["full"], arms["sliding"]
    common = [name for name, choice in full.space.items() if sliding.space.get(name) == choice]
    assert "training.learning_rate" in common
    for name in common:
        assert [p.get(name) for p in full.points] == [p.get(name) for p in sliding.points]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_points_depend_on_the_samplers_seed_alone(sampler: str, fields: dict[str, Any]) -> None:
    points = tuned(fields, sampler=sampler)["full"].points
    assert tuned(fields, sampler=sampler)["full"].points == points
    assert tuned(fields, sampler=sampler, sampler_seed=1)["full"].points != points


def test_enqueued_settings_come_first_and_count(fields: dict[str, Any]) -> None:
    points = tuned(fields, sampler="qmc", enqueue=[{"training.learning_rate": 2e-3}, {}])["sliding"].points
    assert points[0]["training.learning_rate"] == 2e-3
    assert len(points) == 6


def test_missing_fields_of_an_enqueued_setting_are_drawn(fields: dict[str, Any]) -> None:
    arm = tuned(fields, sampler="qmc", variants=True, enqueue=[{"training.learning_rate": 2e-3}])["sliding"]
    assert set(arm.points[0]) == set(arm.space)


def test_an_enqueued_field_that_an_arm_does_not_tune_is_ignored(fields: dict[str, Any]) -> None:
    space = {**RATE, WINDOW: {"values": [2, 4]}}
    arms = tuned(fields, sampler="qmc", space=space, enqueue=[{WINDOW: 2}])
    assert WINDOW not in arms["full"].points[0]
    assert arms["sliding"].points[0][WINDOW] == 2


@pytest.mark.parametrize(
    ("enqueue", "message"),
    [
        ([{"training.learning_rate": 0.5}], "got 0.5; expected a value of 0.001 to 0.01"),
        ([{"training.lerning_rate": 2e-3}], "Nearest valid name"),
        ([{}] * 7, "at most the 6 trials"),
    ],
)
def test_invalid_enqueued_settings_are_named(fields: dict[str, Any], enqueue: list[Any], message: str) -> None:
    assert message in problem(fields, tuning={"trials": 6, "space": RATE, "enqueue": enqueue})


# -- search spaces -----------------------------------------------------------------------------------------------------


def test_variants_add_their_search_space(fields: dict[str, Any]) -> None:
    arm = tuned(fields, trials=2, variants=True)["sliding"]
    assert {WINDOW, "model.mixers.sliding.kv_heads"} <= set(arm.space)
    assert all(arm.run(hyperparameters=point).model.layers for point in arm.points)


def test_the_optimiser_adds_its_search_space(fields: dict[str, Any]) -> None:
    assert "training.optimiser.epsilon" in tuned(fields, trials=2, variants=True)["full"].space


def test_a_range_in_the_file_overrides_the_variants(fields: dict[str, Any]) -> None:
    arms = tuned(fields, variants=True, space={**RATE, WINDOW: {"values": [2, 4]}})
    assert arms["sliding"].space[WINDOW].values == (2, 4)
    assert WINDOW not in arms["full"].space


# -- the budget --------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"name": "x", "base": {"model": {"scale": "tiny"}}}
TWO = {**SMALL, "arms": {"full": {}, "gdn": {"model.pattern": "gdn"}}}
WIDTHS = {"trials": 3, "sampler": "grid", "space": {HIDDEN: {"values": [272, 352, 1088]}}}


def test_a_search_space_of_variants_may_not_break_the_match() -> None:
    budget, tuning = {"free": [HIDDEN], "tolerance": 0.02}, {"trials": 8, "variants": True}
    text = problem(TWO, budget=budget, tuning=tuning)
    assert "tuning.space.model.mixers.full.kv_heads: got" in text
    assert "of arm 'full' within 2.0%" in text


def test_a_mismatch_may_be_allowed() -> None:
    budget = {"free": [HIDDEN], "tolerance": 0.02, "allow_mismatch": "heads are tuned"}
    assert resolved(TWO, budget=budget, tuning={"trials": 8, "variants": True})


def test_a_fixed_setting_off_the_budget_is_refused() -> None:
    assert f"tuning.space.{HIDDEN}: got 272; " in problem({**SMALL, "arms": {"full": {}}}, tuning=WIDTHS)


def test_a_setting_that_does_not_move_the_axis_is_free() -> None:
    assert resolved({**SMALL, "arms": {"full": {}}}, tuning=WIDTHS, budget={"axis": "cache"})


def test_training_flops_stand_in_for_seconds_that_are_not_measured() -> None:
    seconds = {"axis": "seconds", "free": ["training.tokens"]}
    assert f"tuning.space.{HIDDEN}: got 272; " in problem(
        {**SMALL, "arms": {"full": {}}}, tuning=WIDTHS, budget=seconds
    )


def test_solved_values_are_not_solved_again(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse({**TWO, "budget": {"free": [HIDDEN]}, "tuning": {"trials": 0}})
    width = resolve(config)["gdn"].solved[HIDDEN]
    again = resolve(config, {"gdn": {HIDDEN: width + 8}})
    assert again["gdn"].run().model.layers[0].feedforward.hidden == width + 8  # type: ignore[attr-defined]


def test_the_shipped_sweeps_resolve_and_match() -> None:
    from workbench.ablation.cost.card import check_budget, residual_table

    for path in sorted(Path("sweeps").glob("*.yaml")):
        config = AblationConfig.load(path)
        weights = {}
        if "start" in config.base:  # of an ablation that was not run here
            weights = {StartConfig.parse(config.base["start"]).source: 16 * "0"}
        arms = resolve(config, weights=weights)
        check_budget(arms, residual_table(arms))
