"""Levels of the looks of sequential designs, and which arms stop when."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sequential_calibration as calibration
from scipy import integrate, stats

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.sequential import (
    Look,
    Reading,
    arm_readings,
    crossing_probability,
    decided,
    log_e_value,
    readings,
    seeds_needed_now,
)
from workbench.ablation.verdict.statistics import paired_interval
from workbench.ablation.verdict.verdict import Verdict

LOOKS = (4, 6, 8)


def config(stopping, seeds: int = 8, arms: int = 3) -> AblationConfig:
    return AblationConfig.parse(
        {
            "name": "test",
            "arms": {name: {} for name in "abcdefg"[:arms]},
            "confirmation": {"seeds": list(range(seeds))},
            "protocol": {"stopping": stopping},
        }
    )


def statistics(x_RS: np.ndarray, n: int) -> np.ndarray:
    """t of the first n values of every row."""
    x_RS = x_RS[:, :n]
    return x_RS.mean(1) / (x_RS.std(1, ddof=1) / math.sqrt(n))


# -- group-sequential ------------------------------------------------------------------------------------------------


def test_crossing_of_one_look_is_its_level() -> None:
    assert crossing_probability([0.03], [5]) == pytest.approx(0.03)


@pytest.mark.parametrize("looks", [LOOKS, (4, 5, 6), (4, 20)])
def test_crossing_agrees_with_simulation(looks: tuple[int, ...]) -> None:
    levels = [0.02 * (number + 1) for number in range(len(looks))]
    x_RS = np.random.default_rng(0).normal(size=(200_000, looks[-1]))
    crossed = np.zeros(len(x_RS), bool)
    for n, level in zip(looks, levels):
        crossed |= statistics(x_RS, n) > stats.t.isf(level, n - 1)
    assert crossing_probability(levels, looks) == pytest.approx(crossed.mean(), abs=4 * 0.2 / math.sqrt(200_000))


def test_crossing_of_nearly_equal_looks_is_that_of_one() -> None:
    assert crossing_probability([0.05, 1e-12], [4, 8]) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6, 0.1])
def test_levels_of_all_looks_keep_alpha(alpha: float) -> None:
    x_RS = np.random.default_rng(1).normal(size=(50_000, LOOKS[-1]))
    rejected = np.zeros(len(x_RS), bool)
    for number, n in enumerate(LOOKS, start=1):
        level = Reading(number, LOOKS).nominal(alpha)
        rejected |= np.abs(statistics(x_RS, n)) > stats.t.isf(level / 2, n - 1)
    assert rejected.mean() == pytest.approx(alpha, abs=4 * math.sqrt(alpha / 50_000))


def test_levels_rise_from_look_to_look() -> None:
    levels = [Reading(number, LOOKS).nominal(0.05) for number in (1, 2, 3)]
    assert levels == pytest.approx([0.0108, 0.0212, 0.0320], abs=5e-4)


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.02])
def test_adjusted_inverts_nominal(alpha: float, scale: float | None) -> None:
    for number in (1, 2, 3):
        reading = Reading(number, LOOKS, scale)
        assert reading.adjusted(reading.nominal(alpha)) == pytest.approx(alpha, rel=1e-3)


def test_one_look_changes_nothing() -> None:
    once = Reading(1, (5,))
    assert (once.nominal(0.05), once.adjusted(0.3), once.is_sequential) == (0.05, 0.3, False)


# -- anytime-valid ---------------------------------------------------------------------------------------------------


def test_the_e_value_is_a_mixture_of_likelihood_ratios() -> None:
    """Against noncentral t: the ratio of densities of t, averaged over mean / sd ~ N(0, scale²)."""
    t, n, scale = 3.0, 6, 2.0

    def integrand(effect: float) -> float:
        ratio = stats.nct.pdf(t, n - 1, effect * math.sqrt(n)) / stats.t.pdf(t, n - 1)
        return float(ratio * stats.norm.pdf(effect, 0, scale))

    assert math.exp(log_e_value(t, n, scale)) == pytest.approx(integrate.quad(integrand, -8, 8, limit=200)[0], rel=1e-4)


@pytest.mark.parametrize("seeds", [20, 50])
def test_the_confidence_sequence_holds_under_continuous_looking(seeds: int) -> None:
    x_RS = np.random.default_rng(2).normal(size=(20_000, seeds))
    missed = np.zeros(len(x_RS), bool)
    for number in range(1, seeds - 2):
        reading = Reading(number, tuple(range(4, seeds + 1)), 2.0)
        level = reading.nominal(0.05)
        missed |= np.abs(statistics(x_RS, reading.seeds)) > stats.t.isf(level / 2, reading.seeds - 1)
    assert 0.01 < missed.mean() < 0.05


def test_too_few_seeds_reject_nothing_at_a_small_alpha() -> None:
    reading = Reading(1, (4,), 2.0)
    assert reading.nominal(0.05 / 6) == 0
    assert paired_interval([1.0, 1.1, 0.9, 1.0], reading.nominal(0.05 / 6)).low == -math.inf
    assert reading.adjusted(1e-15) > 0.05 / 6
    assert reading.adjusted(0.0) == pytest.approx(1 / 17**1.5)  # (1 + n · scale²)^(−(n − 1) / 2)


# -- verdicts --------------------------------------------------------------------------------------------------------


def measured(arm: str, values_S) -> ArmMeasurements:
    return ArmMeasurements(arm, {seed: np.array([value]) for seed, value in enumerate(values_S)}, np.ones(1))


NOISE = np.array([0.0, 1.0, -1.0, 0.5, -0.5, 0.2, -0.4, 0.3])


def at(number: int, shift: float) -> Verdict:
    reading = Reading(number, LOOKS)
    arm = measured("b", 100 + shift + 0.5 * NOISE[::-1])
    return judge(measured("a", 100 + NOISE), [arm], seeds=range(8), replicates=10, readings={"b": reading})


def test_a_look_reads_its_seeds_only() -> None:
    first, last = at(1, 5.0).rows[1], at(3, 5.0).rows[1]
    assert (first.seeds, last.seeds) == (4, 8)


def test_p_is_adjusted_over_looks_before_arms() -> None:
    row = at(2, 1.0).rows[1]
    assert row.p is not None
    assert row.p_holm == pytest.approx(Reading(2, LOOKS).adjusted(row.p))


def test_the_repeated_interval_is_the_t_interval_at_the_level_of_the_look() -> None:
    row = at(2, 1.0).rows[1]
    differences = (100 + 1.0 + 0.5 * NOISE[::-1] - 100 - NOISE)[:6]
    expected = paired_interval(differences, Reading(2, LOOKS).nominal(0.05))
    assert (row.repeated_low, row.repeated_high) == pytest.approx((expected.low, expected.high))
    assert row.level == pytest.approx(Reading(2, LOOKS).nominal(0.05))


def test_the_sentence_names_the_look() -> None:
    assert "look 2 of 3, declared" in at(2, 5.0).rows[1].sentence


def test_a_fixed_design_has_no_repeated_interval() -> None:
    row = judge(measured("a", 100 + NOISE), [measured("b", 101 - NOISE)], seeds=range(8), replicates=10).rows[1]
    assert (row.repeated_low, row.level) == (None, None)
    assert "look" not in row.sentence


@pytest.mark.parametrize("scenario", [9, 12, 30])
def test_the_entry_points_follow_the_rule_that_is_calibrated(scenario: int) -> None:
    """Looks at 4, 6 and 8 seeds: no effect, one arm and three; one arm that differs by the margin."""
    row = calibration.calibrate(calibration.SCENARIOS[scenario], ablations=4_000, checked=25)
    assert row["differing"] == 0
    assert row["rates"]["false"]["low"] < 0.05 and row["rates"]["false"]["rate"] < 0.06


def test_the_published_designs_hold_alpha() -> None:
    published = json.loads(calibration.OUTPUT.read_text(encoding="utf-8"))
    assert all(row["rates"]["false"]["rate"] <= 0.055 and not row["differing"] for row in published["designs"])
    assert all(row["ever_rejects"]["rate"] < 0.05 for row in published["continuous"])


# -- which arms stop -------------------------------------------------------------------------------------------------

FIRST = Look(4, {"b": "worse", "c": "undecided"})
SECOND = Look(6, {"b": "worse", "c": "equivalent"})


def test_a_fixed_design_runs_every_seed() -> None:
    assert seeds_needed_now(config("fixed"), []) == {"a": 8, "b": 8, "c": 8}


def test_seeds_run_to_the_next_look() -> None:
    assert seeds_needed_now(config({"looks": LOOKS}), []) == {"a": 4, "b": 4, "c": 4}


def test_a_decided_arm_stops_and_the_baseline_goes_on() -> None:
    assert seeds_needed_now(config({"looks": LOOKS}), [FIRST]) == {"a": 6, "b": 4, "c": 6}


def test_all_stop_when_all_are_decided() -> None:
    assert seeds_needed_now(config({"looks": LOOKS}), [FIRST, SECOND]) == {"a": 6, "b": 4, "c": 6}
    assert decided([FIRST, SECOND]) == {"b": 1, "c": 2}


def test_at_most_the_seeds_of_the_last_look() -> None:
    assert seeds_needed_now(config({"looks": LOOKS}), [FIRST], at_most=True) == {"a": 8, "b": 4, "c": 8}


def test_an_arm_is_read_where_it_was_decided() -> None:
    read = arm_readings(config({"looks": LOOKS}), [FIRST, SECOND])
    assert {arm: reading.number for arm, reading in read.items()} == {"b": 1, "c": 2}


def test_an_anytime_design_continues_with_more_seeds() -> None:
    taken = [Look(4, {}), Look(6, {}), Look(7, {})]
    looks = readings(config({"anytime": True, "step": 2}, seeds=11), taken)[0].looks
    assert looks == (4, 6, 7, 8, 10, 11)
