"""What an arm's settings show of its optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.ablation.search.optimum import Setting, best, edges, fit_surface, gather, interpolate, leading
from workbench.ranges import Range

RATE = "training.learning_rate"
LOG = Range(low=1e-4, high=1e-2, log=True)
GRID = Range(values=(1e-3, 3e-3, 9e-3))


def parabola(rate: float) -> float:
    """Smallest at 2e-3: 1; one decade away: 2."""
    return 1 + math.log10(rate / 2e-3) ** 2


def tried(rates: list[float], seeds: tuple[int, ...] = (0,), noise: float = 0.0) -> list[Setting]:
    random = np.random.default_rng(0)
    return [
        Setting({RATE: rate}, {seed: parabola(rate) + 0.1 * seed + noise * random.normal() for seed in seeds})
        for rate in rates
    ]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_runs_of_one_setting_are_gathered() -> None:
    first, second = gather([({"a": 1}, 0, 2.0, "x"), ({"a": 2}, 0, 3.0, "y"), ({"a": 1}, 1, 4.0, "z")])
    assert (first.values, first.run, second.values) == ({0: 2.0, 1: 4.0}, "x", {0: 3.0})


def test_a_number_and_its_text_are_two_settings() -> None:
    assert len(gather([({"a": 1}, 0, 2.0, None), ({"a": "1"}, 0, 3.0, None), ({"a": True}, 0, 3.0, None)])) == 3


def test_the_best_mean_over_all_seeds_is_chosen() -> None:
    lucky, steady = Setting({"a": 1}, {0: 1.0, 1: 3.0}), Setting({"a": 2}, {0: 1.5, 1: 1.5})
    assert leading([steady, lucky], 1, seed=0) == [lucky]
    assert best([lucky, steady], [0, 1]) is steady


def test_a_setting_that_lacks_a_seed_or_diverged_on_one_is_not_chosen() -> None:
    settings = [
        Setting({"a": 1}, {0: 1.0}),
        Setting({"a": 2}, {0: 1.0, 1: math.inf}),
        Setting({"a": 3}, {0: 2.0, 1: 2.0}),
    ]
    assert best(settings, [0, 1]) is settings[2]
    assert best(settings[:2], [0, 1]) is None


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "where"),
    [
        (9e-3, ["learning rate 0.009, the highest tried"]),
        (1e-3, ["learning rate 0.001, the lowest tried"]),
        (3e-3, []),
    ],
)
def test_the_ends_of_a_grid_are_edges(chosen: float, where: list[str]) -> None:
    found = edges(tried([1e-3, 3e-3, 9e-3]), {RATE: GRID}, {RATE: chosen})
    assert [str(edge) for edge in found] == where


def test_a_drawn_value_that_none_exceeds_is_at_an_edge() -> None:
    assert edges(tried([1e-3, 2e-3]), {RATE: LOG}, {RATE: 2e-3})[0].where == "the highest tried"


def test_a_diverged_trial_brackets_the_optimum() -> None:
    settings = [*tried([1e-3, 2e-3]), Setting({RATE: 8e-3}, {0: math.inf})]
    assert not edges(settings, {RATE: LOG}, {RATE: 2e-3})


def test_the_outer_twentieth_of_an_interval_is_an_edge() -> None:
    (edge,) = edges(tried([1e-3, 9.2e-3, 9.8e-3]), {RATE: LOG}, {RATE: 9.2e-3})
    assert edge.where == "at the high end of its range"
    assert not edges(tried([1e-3, 7e-3, 9.8e-3]), {RATE: LOG}, {RATE: 7e-3})


def test_zero_is_no_edge_and_words_have_none() -> None:
    space = {"decay": Range(values=(0.0, 0.1)), "schedule": Range(values=("wsd", "cosine"))}
    settings = [Setting({"decay": value, "schedule": "wsd"}, {0: 1.0}) for value in (0.0, 0.1)]
    assert not edges(settings, space, {"decay": 0.0, "schedule": "wsd"})


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_an_exact_parabola_is_interpolated() -> None:
    settings = tried([1e-3, 3e-3, 9e-3])
    found = interpolate(settings, {RATE: GRID}, settings[1])
    assert found is not None
    assert found[0] == {RATE: 2e-3}
    assert found[1] == pytest.approx(1.0)


def test_the_gap_of_an_exact_parabola_is_its_height() -> None:
    settings = tried([1e-3, 3e-3, 9e-3])
    surface = fit_surface(settings, {RATE: GRID}, settings[1])
    assert surface is not None
    gap = surface.gap({RATE: 3e-3})
    assert gap.value == pytest.approx(parabola(3e-3) - 1)
    assert gap.low is None
    assert surface.gap({RATE: 2e-3}).value == pytest.approx(0, abs=1e-12)


def test_repeats_give_the_gap_an_interval_that_holds_the_truth() -> None:
    settings = tried([1e-3, 2e-3, 3e-3, 9e-3], seeds=(0, 1, 2), noise=0.01)
    surface = fit_surface(settings, {RATE: LOG}, settings[1])
    assert surface is not None and surface.noise is not None and surface.noise_df == 6
    gap = surface.gap({RATE: 3e-3})
    assert gap.low is not None and gap.high is not None
    assert gap.low < parabola(3e-3) - 1 < gap.high


def test_seeds_have_effects_of_their_own() -> None:
    alone, repeated = tried([1e-3, 9e-3]), tried([3e-3], seeds=(0, 1, 2))  # seed 2 is 0.2 worse in every setting
    found = interpolate([*alone, *repeated], {RATE: GRID}, repeated[0])
    assert found is not None and found[0] == {RATE: 2e-3}


def test_several_fields_have_a_separable_fit() -> None:
    space = {"a": Range(low=0.0, high=1.0), "b": Range(low=0.0, high=1.0)}
    settings = [
        Setting({"a": a, "b": b}, {0: (a - 0.5) ** 2 + 2 * (b - 0.25) ** 2}) for a in (0, 0.4, 1) for b in (0, 0.5, 1)
    ]
    chosen = min(settings, key=lambda setting: setting.values[0])
    surface = fit_surface(settings, space, chosen)
    assert surface is not None
    assert surface.gap({"a": 0.4, "b": 0.5}).value == pytest.approx(0.01 + 0.125)


def test_the_gap_at_an_edge_goes_to_the_best_value_tried() -> None:
    settings = tried([4e-3, 6e-3, 9e-3])
    surface = fit_surface(settings, {RATE: LOG}, settings[0])
    assert surface is not None
    assert surface.gap({RATE: 6e-3}).value == pytest.approx(parabola(6e-3) - parabola(4e-3))


@pytest.mark.parametrize("rates", [[1e-3, 3e-3], [4e-3, 6e-3, 9e-3]])
def test_no_optimum_outside_the_trials_is_interpolated(rates: list[float]) -> None:
    settings = tried(rates)
    assert interpolate(settings, {RATE: LOG}, min(settings, key=lambda setting: setting.values[0])) is None


def test_interpolation_does_not_cross_a_setting_that_diverged() -> None:
    settings = [*tried([1e-3, 3e-3, 9e-3]), Setting({RATE: 2.5e-3}, {0: math.inf})]
    assert interpolate(settings, {RATE: LOG}, settings[1]) is None


def test_whole_numbers_stay_whole() -> None:
    settings = [Setting({"steps": n}, {0: (n - 4.4) ** 2}) for n in (1, 3, 9)]
    found = interpolate(settings, {"steps": Range(low=1, high=9)}, settings[1])
    assert found is not None and found[0] == {"steps": 4}
