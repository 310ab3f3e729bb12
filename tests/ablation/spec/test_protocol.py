"""Which seeds a run gets when seeds of single components are crossed, and when a verdict is read."""

from __future__ import annotations

import pytest

from workbench.ablation.arms import resolve
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.spec.protocol import Confirmation, Protocol
from workbench.config import ConfigError
from workbench.status import Stage

CROSSED = Confirmation.parse({"components": {"init": 3, "order": 3, "other": 2}, "seeds": range(100, 118)})


def test_runs_of_a_crossed_design_are_numbered() -> None:
    assert Confirmation.parse({"components": {"init": 2, "order": 2}}).seeds == (0, 1, 2, 3)


def test_every_combination_is_one_run() -> None:
    seeds = [CROSSED.component_seeds(seed) for seed in CROSSED.seeds]
    assert {tuple(each.values()) for each in seeds} == {
        (init, order, other) for init in (100, 101, 102) for order in (100, 101, 102) for other in (100, 101)
    }


def test_the_last_component_varies_fastest() -> None:
    assert [list(CROSSED.component_seeds(seed).values()) for seed in (100, 101, 102)] == [
        [100, 100, 100],
        [100, 100, 101],
        [100, 101, 100],
    ]


def test_without_components_one_seed_drives_all_of_them() -> None:
    assert Confirmation().component_seeds(3) == {}


def test_independent_runs_share_no_seed() -> None:
    assert CROSSED.independent_seeds == (100, 109)
    assert [set(CROSSED.component_seeds(seed).values()) for seed in (100, 109)] == [{100}, {101}]


def test_a_component_with_one_seed_does_not_make_runs_dependent() -> None:
    assert Confirmation.parse({"components": {"init": 2, "order": 2}}).independent_seeds == (0, 3)


def test_an_arm_takes_the_seeds_of_its_components(fields: dict[str, object]) -> None:
    config = AblationConfig.parse({**fields, "confirmation": {"components": {"init": 2, "order": 2}}})
    run = resolve(config)["sliding"].run(2)
    assert [run.seed_of(component) for component in ("init", "order", "other")] == [1, 0, 0]


def test_a_component_may_be_fixed_for_every_seed(fields: dict[str, object]) -> None:
    config = AblationConfig.parse({**fields, "base": {**fields["base"], "seeds": {"init": 5}}})  # type: ignore[dict-item]
    run = resolve(config)["full"].run(2)
    assert [run.seed_of(component) for component in ("init", "order", "other")] == [5, 2, 2]


def test_fixing_every_component_is_refused(fields: dict[str, object]) -> None:
    seeds = {"init": 5, "order": 5, "other": 5}
    config = AblationConfig.parse({**fields, "base": {**fields["base"], "seeds": seeds}})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"base\.seeds"):
        resolve(config)


# -- stopping --------------------------------------------------------------------------------------------------------


def test_the_verdict_is_read_once_by_default() -> None:
    assert Protocol().stopping.looks_at(5) == (5,)


def test_looks_are_paired_seeds() -> None:
    assert Protocol.parse({"stopping": {"looks": [4, 6, 8]}}).stopping.looks_at(9) == (4, 6, 8)


def test_an_anytime_design_looks_after_every_step() -> None:
    stopping = Protocol.parse({"stopping": {"anytime": True, "first": 5, "step": 3}}).stopping
    assert stopping.looks_at(12) == (5, 8, 11, 12)


@pytest.mark.parametrize("text", ["add seeds until better", "two seeds", ["looks", 4]])
def test_text_is_no_design(text: object) -> None:
    with pytest.raises(ConfigError, match=r"stopping: got .*looks: \[4, 6, 8\].*anytime: true"):
        Protocol.parse({"stopping": text})


@pytest.mark.parametrize(
    "stopping",
    [
        {"looks": [3, 6]},
        {"looks": [6, 4]},
        {"looks": [4, 6], "anytime": True},
        {"anytime": True, "first": 3},
        {"first": 5},
    ],
)
def test_designs_that_cannot_be_are_refused(stopping: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="stopping"):
        Protocol.parse({"stopping": stopping})


def test_looks_need_their_seeds(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="at most 3, the number of confirmation seeds"):
        AblationConfig.parse({**fields, "protocol": {"stopping": {"looks": [4]}}})


def test_no_run_is_planned_after_the_last_look(fields: dict[str, object]) -> None:
    confirmation = {"seeds": [0, 1, 2, 3, 4, 5]}
    config = AblationConfig.parse({**fields, "confirmation": confirmation, "protocol": {"stopping": {"looks": [4, 5]}}})
    assert config.planned_seeds == (0, 1, 2, 3, 4)
    assert config.planned(0)[Stage.CONFIRMATION] == 5
