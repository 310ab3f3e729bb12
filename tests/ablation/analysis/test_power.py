"""The number of seeds, from the noise of a pilot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ablation_fields
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.power import Pilot, pilot_of, plan_seeds
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.verdict.statistics import equivalence_power, equivalent, pooled_sd, seeds_for_equivalence
from workbench.files import write_json


@pytest.mark.parametrize(("effect", "seeds"), [(0.001, (20, 10, 6, 29)), (0.002, (7, 5, 4, 10)), (0.003, (5, 4, 3, 7))])
def test_sample_sizes_are_those_of_exact_t_tests(effect: float, seeds: tuple[int, ...]) -> None:
    """sd 0.0015: unpaired columns do not apply here; paired rho 0.5, 0.8, 0.9, and rho 0.5 with Holm over four arms."""
    designs = ((0.5, 1), (0.8, 1), (0.9, 1), (0.5, 4))
    planned = [plan_seeds(Pilot.assumed(0.0015, rho), arms=arms, effect=effect).for_effect for rho, arms in designs]
    assert planned == list(seeds)


def test_seeds_for_equivalence() -> None:
    assert [seeds_for_equivalence(margin) for margin in (1, 1.5, 2, 3)] == [11, 6, 4, 3]


@pytest.mark.parametrize(("n", "margin"), [(6, 1.5), (4, 2.0)])
def test_power_of_equivalence_agrees_with_simulation(n: int, margin: float) -> None:
    rng = np.random.default_rng(n)
    shown = np.mean([equivalent(rng.normal(size=n), margin) for _ in range(4_000)])
    assert shown == pytest.approx(equivalence_power(n, margin), abs=0.025)


def test_one_seed_shows_no_equivalence() -> None:
    assert equivalence_power(1, 5.0) == 0.0


# -- the noise of a pilot ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values() -> dict[str, dict[int, float]]:
    """Two arms over 200 seeds, sd 0.01 and rho 0.8."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=200)

    def arm() -> dict[int, float]:
        noise = math.sqrt(0.8) * shared + math.sqrt(0.2) * rng.normal(size=200)
        return dict(enumerate(1 + 0.01 * noise))

    return {"a": arm(), "b": arm()}


def test_the_noise_of_two_arms(values: dict[str, dict[int, float]]) -> None:
    pilot = pilot_of(values, "a")
    assert pilot.sd == pytest.approx(0.01, rel=0.1)
    assert pilot.df == 398
    assert pilot.rho == pytest.approx(0.8, abs=0.06)


def test_the_noise_of_paired_differences_is_measured(values: dict[str, dict[int, float]]) -> None:
    assert pilot_of(values, "a").sd_difference == pytest.approx(0.01 * math.sqrt(0.4), rel=0.12)


def test_one_arm_shows_no_correlation(values: dict[str, dict[int, float]]) -> None:
    pilot = pilot_of({"a": values["a"]}, "a")
    assert pilot.rho is None
    assert pilot.sd_difference == pytest.approx(pilot.sd * math.sqrt(2))
    assert pilot.floor is not None


def test_one_seed_shows_no_noise() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        pilot_of({"a": {0: 1.0}, "b": {0: 2.0}}, "a")


def test_single_values_have_no_degree_of_freedom() -> None:
    assert pooled_sd([[1.0], [2.0]])[1] == 0


# -- the plan in words -------------------------------------------------------------------------------------------------


def test_without_a_declared_difference_no_number_is_proposed() -> None:
    plan = plan_seeds(Pilot.assumed(0.01), arms=2)
    assert plan.seeds is None
    assert "Declare protocol.effect" in plan.sentences()[-1]


def test_the_plan_is_enough_for_effect_and_margin() -> None:
    plan = plan_seeds(Pilot.assumed(0.01, 0.5), arms=1, effect=0.01, margin=0.01)
    assert plan.seeds == max(10, 11)
    assert plan.table().height == 10


def test_a_short_pilot_is_called_unreliable(values: dict[str, dict[int, float]]) -> None:
    short = {arm: dict(list(by_seed.items())[:3]) for arm, by_seed in values.items()}
    assert "unreliable" in plan_seeds(pilot_of(short, "a"), arms=1).sentences()[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_json(tmp_path / "a.yaml", {**ablation_fields(tmp_path), "protocol": {"effect": 0.01}})  # JSON is YAML
    return tmp_path / "a.yaml"


def test_the_command_line_plans_from_given_noise(file: Path) -> None:
    done = CliRunner().invoke(cli.app, ["plan", str(file), "--sd", "0.01", "--rho", "0.5"])
    assert done.exit_code == 0, done.output
    assert "10 paired seeds" in done.output


def test_the_command_line_asks_for_a_pilot(file: Path) -> None:
    missing = CliRunner().invoke(cli.app, ["plan", str(file), "--results", str(file.parent)])
    assert missing.exit_code
    assert "workbench pilot" in str(missing.exception)


# -- the pilot itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> AblationConfig:
    fields: dict[str, Any] = ablation_fields(tmp_path_factory.mktemp("pilot"))
    return Ablation.parse({**fields, "baseline": "sliding"}).pilot(8).config


def test_a_pilot_holds_the_baseline_and_the_first_arm(pilot: AblationConfig) -> None:
    assert pilot.name == "test-pilot"
    assert pilot.order == ["sliding", "full"]


def test_a_pilot_tunes_nothing(pilot: AblationConfig) -> None:
    assert pilot.tuning.trials == 0


def test_a_pilot_uses_separate_seeds(pilot: AblationConfig) -> None:
    assert len(pilot.confirmation.seeds) == 8
    assert not {0, 1, 2, 1000} & set(pilot.confirmation.seeds)


def test_a_pilot_is_measured_on_the_selection_split(pilot: AblationConfig) -> None:
    assert pilot.confirmation.split == "selection"
    assert pilot.exploratory
