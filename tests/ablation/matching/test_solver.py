"""The solver: arms made equal on every axis, at every size."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.ablation.arms import Arms, resolve
from workbench.ablation.matching.solver import quantity, tunable_value
from workbench.ablation.spec.ablation import AblationConfig
from workbench.contract import mixers
from workbench.training.config import RunConfig

HIDDEN = "model.feedforwards.swiglu.hidden"
TINY: dict[str, Any] = {"model": {"scale": "tiny"}}


def solved(arms: dict[str, Any], base: dict[str, Any] | None = None, **budget: Any) -> Arms:
    fields = {"name": "x", "base": base or TINY, "arms": arms, "budget": {"free": [HIDDEN], **budget}}
    return resolve(AblationConfig.parse({**fields, "tuning": {"trials": 0}}))


def mismatch(arms: Arms, name: str) -> float:
    assert arms.target is not None
    return quantity(arms.config.budget, arms[name].run()) / arms.target - 1


@pytest.mark.parametrize(("scale", "target"), [("tiny", 60e6), ("340m", 308e6), ("1.3b", 1.2e9)])
def test_every_registered_mixer_is_matched_closely(scale: str, target: float) -> None:
    """At the named sizes, and at 60M in between; feed-forwards pay for what a mixer spends."""
    base: dict[str, Any] = {"model": {"scale": scale}, "training": {"tokens": 10_000, "batch_size": 1}}
    if target == 60e6:
        base["model"] |= {"width": 512, "depth": 16, "vocabulary": 32_000}
    arms = solved({name: {"model.pattern": name} for name in mixers}, base, target=target, tolerance=0.01)
    mismatches = {name: mismatch(arms, name) for name in arms}
    assert max(map(abs, mismatches.values())) < 0.0025, mismatches
    widths = [tunable_value(arm.run(), HIDDEN) for arm in arms.values()]
    assert all(width is not None and width % 8 == 0 for width in widths), "large models get multiples of 8"


@pytest.mark.parametrize("axis", ["parameters", "active_parameters", "flops"])
def test_experts_are_matched_on_every_axis(axis: str) -> None:
    free = ["model.feedforwards.moe.experts", "model.feedforwards.moe.hidden"]
    arms = solved({"dense": {}, "moe": {"model.feedforward": "moe"}}, axis=axis, free=free, tolerance=0.02)
    assert arms["moe"].solved
    assert abs(mismatch(arms, "moe")) < 0.02


def test_a_window_is_matched_to_a_recurrent_state() -> None:
    arms = solved(
        {"gdn": {"model.pattern": "gdn"}, "sliding": {"model.pattern": "sliding"}},
        {"model": {"scale": "340m"}},
        axis="cache",
        length=4096,
        free=["model.mixers.sliding.window"],
    )
    assert abs(mismatch(arms, "sliding")) < 0.02
    assert arms["sliding"].run().model.layers[0].mixer.window < 512  # type: ignore[attr-defined]


def test_coarse_fields_are_solved_before_fine_ones() -> None:
    arms = solved({"one": {}, "narrow": {"model.width": 96}}, free=["model.depth", HIDDEN])
    assert abs(mismatch(arms, "narrow")) < 0.005
    assert arms["narrow"].solved["model.depth"] > 4


def test_values_that_cannot_be_built_are_skipped() -> None:
    kv_heads = "model.mixers.full.kv_heads"
    arms = solved({"mha": {kv_heads: 1}, "free": {}}, axis="cache", free=[kv_heads])
    assert arms.solved == {"free": {kv_heads: 1}}


def test_tokens_are_solved_in_whole_steps() -> None:
    arms = solved({"a": {}, "b": {HIDDEN: 176}}, axis="flops", free=["training.tokens"], tolerance=0.01)
    training = arms["b"].run().training
    assert abs(mismatch(arms, "b")) < 0.01
    assert training.tokens % training.tokens_per_step == 0
    assert training.tokens > 400_000


NSA: dict[str, Any] = {"nsa": {"model.pattern": "nsa"}, "full": {}}


def test_the_target_may_be_an_arm() -> None:
    assert set(solved(NSA, target="full").solved) == {"nsa"}


def test_the_target_may_be_an_amount() -> None:
    assert set(solved(NSA, target=1e6).solved) == {"nsa", "full"}


def test_a_field_that_an_arm_sets_is_left_alone() -> None:
    arms = {**NSA, "nsa": {"model.pattern": "nsa", HIDDEN: 272}}
    assert "nsa" not in solved(arms, target="full").solved


def test_equal_arms_are_left_alone() -> None:
    assert solved({"a": {}, "b": {"model.pattern": "sliding"}}).solved == {}


@pytest.mark.parametrize(("path", "value"), [(HIDDEN, 352), ("model.depth", 4), ("training.batch_size", 8)])
def test_whole_numbers_are_tunable(path: str, value: int) -> None:
    assert tunable_value(RunConfig.parse({"model": {"pattern": "full"}}), path) == value


@pytest.mark.parametrize(
    "path", ["model.feedforwards.moe.hidden", "model.tied", "training.learning_rate", "model.nothing.at.all", "x"]
)
def test_other_fields_are_not_tunable(path: str) -> None:
    assert tunable_value(RunConfig.parse({"model": {"pattern": "full"}}), path) is None
