"""The budget: arms made equal by the solver on every axis, at every size, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import ablation_fields, write_corpus

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import CONFIRMATION, Plan
from workbench.ablation.matching.cost_card import check_budget, cost_table, timed
from workbench.ablation.matching.solver import Budget, knob, quantity
from workbench.ablation.spec.ablation import AblationConfig
from workbench.config import ConfigError
from workbench.contract import mixers
from workbench.training.config import RunConfig
from workbench.training.probe import Measured

HIDDEN = "model.feedforwards.swiglu.hidden"


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return ablation_fields(tmp_path)


def ablation(arms: dict[str, Any], base: dict[str, Any], **budget: Any) -> AblationConfig:
    return AblationConfig.parse(
        {"name": "x", "base": base, "arms": arms, "budget": {"free": [HIDDEN], **budget}, "tuning": {"trials": 0}}
    )


def residuals(config: AblationConfig) -> dict[str, float]:
    return {arm: quantity(config.budget, config.run(arm, seed=0)) / config.target - 1 for arm in config.order}


@pytest.mark.parametrize(("scale", "target"), [("tiny", 60e6), ("340m", 308e6), ("1.3b", 1.2e9)])
def test_every_registered_mixer_comes_within_one_per_cent(scale: str, target: float) -> None:
    """At the named sizes, and at 60M in between; feed-forwards pay for what a mixer spends."""
    base: dict[str, Any] = {"model": {"scale": scale}, "training": {"tokens": 10_000, "batch_size": 1}}
    if target == 60e6:
        base["model"] |= {"width": 512, "depth": 16, "vocabulary": 32_000}
    arms = {name: {"model.pattern": name} for name in mixers}
    config = ablation(arms, base, target=target, tolerance=0.01)
    found = residuals(config)
    assert max(map(abs, found.values())) < 0.0025, found
    widths = [knob(config.run(arm, seed=0), HIDDEN) for arm in config.order]
    assert all(width is not None and width % 8 == 0 for width in widths), "large models get round sizes"


def test_axes_and_knobs(fields: dict[str, Any]) -> None:
    base = {"model": {"scale": "tiny"}}
    moe = {"model.feedforward": "moe"}
    arms = {"dense": {}, "moe": moe}
    freed = ["model.feedforwards.moe.experts", "model.feedforwards.moe.hidden"]
    for axis in ("parameters", "active_parameters", "flops"):
        config = ablation(arms, base, axis=axis, free=freed, tolerance=0.02)
        assert abs(residuals(config)["moe"]) < 0.02 and config.solved["moe"], axis
    window = {"model.pattern": "sliding"}
    config = ablation(
        {"gdn": {"model.pattern": "gdn"}, "sliding": window},
        {"model": {"scale": "340m"}},
        axis="cache",
        length=4096,
        free=["model.mixers.sliding.window"],
    )
    assert abs(residuals(config)["sliding"]) < 0.02 and config.run("sliding", seed=0).model.layers[0].mixer.window < 512  # type: ignore[attr-defined]
    deep = ablation({"one": {}, "narrow": {"model.width": 96}}, base, free=["model.depth", HIDDEN])
    assert abs(residuals(deep)["narrow"]) < 0.005 and deep.solved["narrow"]["model.depth"] > 4
    heads = ablation(
        {"mha": {"model.mixers.full.kv_heads": 1}, "free": {}}, base, axis="cache", free=["model.mixers.full.kv_heads"]
    )
    assert heads.solved == {"free": {"model.mixers.full.kv_heads": 1}}, "values that do not divide are passed over"
    long = ablation({"a": {}, "b": {HIDDEN: 176}}, base, axis="flops", free=["training.tokens"], tolerance=0.01)
    assert abs(residuals(long)["b"]) < 0.01
    run = long.run("b", seed=0)
    assert run.training.tokens % run.training.tokens_per_step == 0 and run.training.tokens > 400_000


def test_target_may_be_an_arm_or_an_amount_and_what_is_given_stays() -> None:
    base = {"model": {"scale": "tiny"}}
    arms = {"nsa": {"model.pattern": "nsa"}, "full": {}}
    assert set(ablation(arms, base, target="full").solved) == {"nsa"}
    assert set(ablation(arms, base, target=1e6).solved) == {"nsa", "full"}
    assert "nsa" not in ablation({**arms, "nsa": {"model.pattern": "nsa", HIDDEN: 272}}, base, target="full").solved
    assert ablation({"a": {}, "b": {"model.pattern": "sliding"}}, base).solved == {}, "equal arms are left alone"


def test_the_solvers_values_are_seen_and_kept(fields: dict[str, Any]) -> None:
    fields["arms"]["gdn"] = {"model.pattern": "gdn"}
    config = AblationConfig.parse({**fields, "budget": {"free": [HIDDEN], "tolerance": 0.02}})
    width = config.solved["gdn"][HIDDEN]
    table = cost_table(config)
    check_budget(config, table)
    rows = {row["arm"]: row for row in table.iter_rows(named=True)}
    assert rows["gdn"]["solved"] == f"swiglu.hidden={width}" and rows["full"]["solved"] == ""
    assert abs(rows["gdn"]["residual"]) < 0.02 and rows["gdn"]["residual"] == rows["gdn"]["off_parameters"]
    assert rows["gdn"]["off_cache"] < 0 and rows["gdn"]["off_seconds"] is None
    # written down, they are read back and not worked out again, and it is the same ablation
    held = AblationConfig.parse(config.fixed().plain())
    assert held.solved == config.solved and held.identity == config.identity
    other = {"gdn": {HIDDEN: width + 8}}
    assert (
        AblationConfig.parse(config.fixed(other).plain()).run("gdn", seed=0).model.layers[0].feedforward.hidden
        == width + 8
    )  # type: ignore[attr-defined]


def test_seconds_become_tokens(fields: dict[str, Any]) -> None:
    config = AblationConfig.parse(
        {**fields, "budget": {"axis": "seconds", "free": ["training.tokens"], "tolerance": 0.02}}
    )
    measured = {"full": Measured(0.010, {"forward": 1}), "sliding": Measured(0.008, {"forward": 1})}
    longer = timed(config, measured)
    assert longer.run("sliding", seed=0).training.steps == 25 and longer.run("full", seed=0).training.steps == 20
    assert AblationConfig.parse(longer.plain()).solved == longer.solved, "fixed at launch"
    assert longer.identity == config.identity, "another measurement is the same ablation"
    table = cost_table(longer, measured)
    check_budget(longer, table)
    assert table["residual"].to_list() == [0.0, pytest.approx(0.0)] and table["off_flops"][1] > 0.1
    with pytest.raises(ConfigError, match=r"arms.sliding: got 'no time"):
        timed(config, {"full": measured["full"]})
    with pytest.raises(ConfigError, match="not known"):
        check_budget(config, cost_table(config))
    amount = AblationConfig.parse({**fields, "budget": {"axis": "seconds", "free": ["training.tokens"], "target": 0.4}})
    assert {arm: timed(amount, measured).run(arm, seed=0).training.steps for arm in measured} == {
        "full": 40,
        "sliding": 50,
    }


def test_seconds_are_measured_at_launch_and_fixed_from_then_on(tmp_path: Path) -> None:
    fields = ablation_fields(write_corpus(tmp_path / "corpus"), tuning={"trials": 0}, confirmation={"seeds": [0]})
    fields["arms"] = {"full": {}, "deep": {"model.depth": 6}}
    budget = {
        "axis": "seconds",
        "free": ["training.tokens"],
        "tolerance": 0.02,
        "allow_mismatch": "steps of a few tokens",
    }
    run = Ablation.parse({**fields, "budget": budget}, tmp_path / "results").create()
    tokens = run.about["config"]["budget"]["solved"]["deep"]["training.tokens"]
    assert tokens < fields["base"]["training"]["tokens"] and tokens % 64 == 0
    about = Plan(run).folder_for("deep", CONFIRMATION, 0, {}).about()
    assert about["tokens"] == tokens and about["solved"] == {"training.tokens": tokens}
    again = Ablation.parse({**fields, "budget": budget}, tmp_path / "results").create()
    assert again.about == run.about


def test_mistakes(fields: dict[str, Any]) -> None:
    def problem(**budget: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            config = AblationConfig.parse({**fields, "budget": budget})
            check_budget(config, cost_table(config))
        return str(raised.value)

    assert "budget.tolerance: got 0.05; expected at most 0.02" in problem(tolerance=0.05)
    assert Budget(tolerance=0.05, allow_mismatch="a pilot").tolerance == 0.05
    assert "budget.free: got 'model.widht'" in problem(free=["model.widht"])
    assert "budget.target: got 'ful'" in problem(target="ful") and "'full'" in problem(target="ful")
    assert "[training.tokens] where axis is seconds" in problem(axis="seconds")
    fields["arms"]["wide"] = {"model.width": 64}
    assert "Let the solver turn a width" in problem()
    fields["arms"]["wide"] = {"model.width": 128}
    assert "comes no nearer" in problem(free=[HIDDEN])
    fields["tuning"]["space"] = {HIDDEN: {"values": [64, 72]}}
    assert "a field that is not tuned" in problem(free=[HIDDEN])


def test_every_fixed_setting_is_held_to_the_budget() -> None:
    arms: dict[str, Any] = {"full": {}, "gdn": {"model.pattern": "gdn"}}
    fields = {"name": "x", "base": {"model": {"scale": "tiny"}}, "arms": arms}
    free = {"free": [HIDDEN], "tolerance": 0.02}
    variants = {"trials": 8, "variants": True}
    with pytest.raises(ConfigError, match=r"tuning.space.model.mixers.full.kv_heads: got .* of arm 'full' within 2.0%"):
        AblationConfig.parse({**fields, "budget": free, "tuning": variants})
    AblationConfig.parse({**fields, "budget": {**free, "allow_mismatch": "heads are tuned"}, "tuning": variants})
    widths = {"values": [272, 352, 1088]}
    grid: dict[str, Any] = {"trials": 3, "sampler": "grid", "space": {HIDDEN: widths}}
    same = {**fields, "arms": {"full": {}}, "tuning": grid}
    with pytest.raises(ConfigError, match=rf"tuning.space.{HIDDEN}: got 272; "):
        AblationConfig.parse(same)
    AblationConfig.parse({**same, "budget": {"axis": "cache"}})  # which no width moves
    timed = {"axis": "seconds", "free": ["training.tokens"]}
    with pytest.raises(ConfigError, match=rf"tuning.space.{HIDDEN}: got 272; "):
        AblationConfig.parse({**same, "budget": timed})
    rate = {"training.learning_rate": {"values": [1e-3, 2e-3, 3e-3]}}
    AblationConfig.parse({**same, "budget": timed, "tuning": {**grid, "space": rate}})


def test_knobs_that_are_not_there() -> None:
    run = RunConfig.parse({"model": {"pattern": "full"}})
    assert knob(run, HIDDEN) == 352 and knob(run, "model.depth") == 4 and knob(run, "training.batch_size") == 8
    for path in ("model.feedforwards.moe.hidden", "model.tied", "training.learning_rate", "model.nothing.at.all", "x"):
        assert knob(run, path) is None
