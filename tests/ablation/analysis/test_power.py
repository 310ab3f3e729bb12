"""The number of seeds, from the noise of a pilot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ablation_fields
from scipy import integrate, stats
from typer.testing import CliRunner

from workbench import cli
from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.power import MIN_SEEDS, Pilot, SeedPlan, expected_power, pilot_of, plan_seeds
from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.verdict.statistics import (
    equivalence_power,
    equivalent,
    pooled_sd,
    power_of,
    seeds_for_equivalence,
    seeds_needed,
)
from workbench.files import write_json


@pytest.mark.parametrize(("effect", "seeds"), [(0.001, (20, 10, 6, 29)), (0.002, (7, 5, 5, 10)), (0.003, (5, 5, 5, 7))])
def test_sample_sizes_are_those_of_exact_t_tests(effect: float, seeds: tuple[int, ...]) -> None:
    """sd 0.0015: unpaired columns do not apply here; paired rho 0.5, 0.8, 0.9, and rho 0.5 with Holm over four arms."""
    designs = ((0.5, 1), (0.8, 1), (0.9, 1), (0.5, 4))
    plans = [plan_seeds(Pilot.assumed(0.0015, rho), arms=arms, effect=effect).for_effect for rho, arms in designs]
    assert [plan and plan.seeds for plan in plans] == list(seeds)


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
    assert pilot.rho == pytest.approx(0.8, abs=0.06)


def test_the_noise_of_paired_differences_is_measured(values: dict[str, dict[int, float]]) -> None:
    assert pilot_of(values, "a").sd_difference == pytest.approx(0.01 * math.sqrt(0.4), rel=0.12)


def test_two_arms_give_as_many_differences_as_seeds(values: dict[str, dict[int, float]]) -> None:
    assert pilot_of(values, "a").df == 199


def test_differences_to_one_baseline_share_degrees_of_freedom() -> None:
    """Without pairing two differences correlate at 1/2: 2 · 999 · 2 / (2 + 2 · 1/4)."""
    rng = np.random.default_rng(0)
    values = {arm: dict(enumerate(rng.normal(size=1000))) for arm in "abc"}
    assert pilot_of(values, "a").df == pytest.approx(2 * 999 / 1.25, rel=0.03)


def test_the_same_differences_twice_are_no_second_measurement() -> None:
    rng = np.random.default_rng(0)
    arm = dict(enumerate(rng.normal(size=9)))
    base = dict(enumerate(rng.normal(size=9)))
    assert pilot_of({"a": base, "b": arm, "c": arm}, "a").df == pytest.approx(8)


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


# -- power over the uncertainty of the sd ------------------------------------------------------------------------------


def measured(df: float) -> Pilot:
    """A pilot that estimates the sd of differences as 1."""
    return Pilot(1.0, df, 0.5, 1.0)


@pytest.mark.parametrize("df", [4, 7, 30])
def test_expected_power_is_the_integral_over_chi_square(df: float) -> None:
    """True variance = df / χ²(df), integrated by quadrature."""

    def integrand(chi2: float) -> float:
        return power_of(10, math.sqrt(chi2 / df), 0.05) * float(stats.chi2.pdf(chi2, df))

    exact, _ = integrate.quad(integrand, 0, 10 * df + 40)
    assert expected_power(10, 1.0, measured(df)) == pytest.approx(exact, abs=1e-3)


def test_a_given_sd_has_no_uncertainty() -> None:
    assert expected_power(10, 1.0, measured(0)) == pytest.approx(power_of(10, 1.0, 0.05))


def test_assured_seeds_suffice_for_the_upper_bound_of_the_sd() -> None:
    plan = plan_seeds(measured(7), arms=3, effect=1.0).for_effect
    assert plan is not None
    upper = math.sqrt(7 / float(stats.chi2.ppf(0.1, 7)))
    assert plan.assured == seeds_needed(1 / upper, 0.05 / 3)


def _pilots(seeds: int, arms: int, effect: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of ``count`` simulated pilots: expected power of the plan as printed, its true power, true power of the assured
    seeds."""
    rng = np.random.default_rng([seeds, arms])
    rows = []
    for sd in np.sqrt(rng.chisquare(seeds - 1, count) / (seeds - 1)):
        plan = plan_seeds(Pilot(sd, seeds - 1, 0.5, sd), arms=arms, effect=effect).for_effect
        assert plan is not None
        rows.append([plan.expected, *(power_of(n, effect, 0.05 / arms) for n in (plan.seeds, plan.assured))])
    printed, true, assured = np.transpose(rows)
    return printed, true, assured


@pytest.mark.parametrize(("seeds", "arms", "effect"), [(5, 1, 1.0), (8, 3, 1.2)])
def test_plans_have_the_power_that_they_print(seeds: int, arms: int, effect: float) -> None:
    printed, true, _ = _pilots(seeds, arms, effect, 150)
    assert printed.mean() == pytest.approx(true.mean(), abs=0.05)


def test_assured_seeds_give_the_power_in_nine_of_ten_pilots() -> None:
    *_, assured = _pilots(8, 1, 0.8, 200)
    assert np.mean(assured >= 0.8) == pytest.approx(0.9, abs=0.06)


# -- the plan in words -------------------------------------------------------------------------------------------------


def test_without_a_declared_difference_no_number_is_proposed() -> None:
    plan = plan_seeds(Pilot.assumed(0.01), arms=2)
    assert plan.seeds is None
    assert "Declare protocol.effect" in plan.sentences()[-1]


def test_the_plan_is_enough_for_effect_and_margin() -> None:
    plan = plan_seeds(Pilot.assumed(0.01, 0.5), arms=1, effect=0.01, margin=0.01)
    assert plan.seeds == max(10, 11)


def test_a_plan_tells_what_the_pilot_leaves_open() -> None:
    words = (
        "14 paired seeds, 82 % power if the sd is as estimated, 73 % expected; 29 seeds give 80 % in 9 of 10 pilots."
    )
    assert words in plan_seeds(measured(7), arms=3, effect=1.0).sentences()[-1]


def test_no_plan_proposes_fewer_seeds_than_a_verdict_needs() -> None:
    assert plan_seeds(measured(7), arms=1, effect=10.0).seeds == MIN_SEEDS


def short(values: dict[str, dict[int, float]], seeds: int) -> SeedPlan:
    first = {arm: dict(list(by_seed.items())[:seeds]) for arm, by_seed in values.items()}
    return plan_seeds(pilot_of(first, "a"), arms=1)


@pytest.mark.parametrize("seeds", [3, 5, 6, 7])
def test_a_short_pilot_is_called_unreliable(values: dict[str, dict[int, float]], seeds: int) -> None:
    assert "fewer than 8 paired pilot seeds" in short(values, seeds).sentences()[1]


def test_eight_seeds_are_enough(values: dict[str, dict[int, float]]) -> None:
    assert "unreliable" not in " ".join(short(values, 8).sentences())


def test_no_detectable_difference_exceeds_the_range_of_the_metric() -> None:
    table = plan_seeds(measured(7), arms=1, upper=1.0).table()
    assert table["detectable"].null_count() > 0
    assert table["detectable"].drop_nulls().max() <= 1.0  # type: ignore[operator]


def test_a_difference_beyond_the_range_of_the_metric_cannot_be_shown() -> None:
    plan = plan_seeds(measured(7), arms=1, effect=1.5, upper=1.0, unit="errors per answer")
    assert plan.for_effect is None
    assert "impossible, a difference of errors per answer is at most 1" in plan.sentences()[-1]


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


def test_a_pilot_of_the_longest_name_can_be_named(tmp_path: Path) -> None:
    ablation = Ablation.parse(ablation_fields(tmp_path, "x" * 80))
    assert ablation.pilot().config.name == "x" * 80 + "-pilot"
    assert ablation.components().config.name == "x" * 80 + "-components"


def test_a_pilot_tunes_nothing(pilot: AblationConfig) -> None:
    assert pilot.tuning.trials == 0


def test_a_pilot_uses_separate_seeds(pilot: AblationConfig) -> None:
    assert len(pilot.confirmation.seeds) == 8
    assert not {0, 1, 2, 1000} & set(pilot.confirmation.seeds)


def test_a_pilot_is_measured_on_the_pilot_split(pilot: AblationConfig) -> None:
    assert pilot.confirmation.split == "pilot"
    assert pilot.exploratory
