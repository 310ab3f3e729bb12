"""What a search allows a verdict to claim."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import tuning_claims

from workbench.ablation.folder import Choice
from workbench.ablation.search.optimum import Gap
from workbench.ablation.spec.tuning import Tuning
from workbench.ablation.verdict.effort import Effort, efforts, reservations
from workbench.ranges import Range
from workbench.results.tables import RUN_SCHEMA

RATE = "training.learning_rate"
RATES = (1e-3, 3e-3, 9e-3)
GRID = Range(values=RATES)


def found(
    values: Mapping[str, Sequence[float | None]], chosen: Mapping[str, float], seeds: int = 1, effect: float = 0.1
) -> tuple[Any, Any]:
    """A folder and a record whose arms have one learning rate per value (None: diverged), repeated on every seed."""
    rows = [
        {
            "arm": arm,
            "stage": "tuning" if seed == 0 else "repeat",
            "run": f"{arm}-{rate}-{seed}",
            "seed": 1000 + seed,
            "status": "diverged" if value is None else "done",
            "selection_value": None if value is None else value + 0.001 * seed * (rate < 3e-3),
            "hyperparameters": json.dumps({RATE: rate}),
        }
        for arm, of_arm in values.items()
        for rate, value in zip(RATES, of_arm)
        for seed in range(seeds)
    ]
    choices = {arm: Choice(hyperparameters={RATE: rate} if rate else {}, seeds=seeds) for arm, rate in chosen.items()}
    frame = pl.DataFrame([{name: row.get(name) for name in RUN_SCHEMA} for row in rows], schema=RUN_SCHEMA)
    repeats = {"settings": 1, "seeds": [1000 + seed for seed in range(1, seeds)]} if seeds > 1 else None
    tuning = Tuning.parse({"space": {RATE: GRID.plain()}, "repeats": repeats})
    folder = SimpleNamespace(choices=lambda: choices, runs=lambda: frame)
    record = SimpleNamespace(
        order=list(values),
        config=SimpleNamespace(tuning=tuning, protocol=SimpleNamespace(effect=effect)),
        metric=SimpleNamespace(unit="bits per byte"),
        space=lambda arm: {RATE: GRID},
    )
    return folder, record


INTERIOR, RISING = [1.2, 1.0, 1.1], [1.2, 1.1, 1.0]


def test_an_edge_is_a_reservation_of_its_row() -> None:
    folder, record = found({"full": INTERIOR, "gdn": RISING}, {"full": 3e-3, "gdn": 9e-3}, seeds=3)
    assert reservations(folder, record)["gdn"][0] == (
        "No claim about the architectures: gdn at learning rate 0.009, the highest tried."
    )


def test_an_edge_of_the_baseline_is_one_of_every_row() -> None:
    folder, record = found({"full": RISING, "gdn": INTERIOR}, {"full": 9e-3, "gdn": 3e-3}, seeds=3)
    assert "full at learning rate 0.009, the highest tried" in reservations(folder, record)["gdn"][0]


def test_one_tuning_seed_allows_no_claim_about_architectures() -> None:
    folder, record = found({"full": INTERIOR, "gdn": INTERIOR}, {"full": 3e-3, "gdn": 3e-3})
    assert reservations(folder, record)["gdn"][0] == (
        "No claim about the architectures: settings chosen on 1 tuning seed."
    )


def test_interior_optima_on_three_seeds_allow_one() -> None:
    folder, record = found({"full": INTERIOR, "gdn": INTERIOR}, {"full": 3e-3, "gdn": 3e-3}, seeds=3)
    (gap,) = reservations(folder, record)["gdn"]
    assert gap.startswith("Tuning gap, fitted on the selection split: about 0.0")


def test_a_gap_above_the_smallest_difference_of_interest_allows_none() -> None:
    folder, record = found({"full": INTERIOR, "gdn": INTERIOR}, {"full": 3e-3, "gdn": 3e-3}, seeds=3, effect=1e-3)
    limits = reservations(folder, record)["gdn"][0]
    assert "full with a tuning gap of up to 0.0" in limits
    assert "gdn with a tuning gap of up to 0.0" in limits


def test_without_a_difference_of_interest_the_setting_has_to_be_interpolated() -> None:
    values = {"lr": 4}
    tried, fitted = (Effort("full", {"lr": 1}, values, 4, 3, how, (), Gap(0.01)) for how in (False, True))
    assert tried.limits(None) == ["full with a tuning gap of up to 0.010"]
    assert fitted.limits(None) == []


def test_a_diverged_trial_is_tried_but_not_finished() -> None:
    folder, record = found({"full": [1.1, 1.0, None]}, {"full": 3e-3})
    effort = efforts(folder, record)["full"]
    assert (effort.edges, effort.trials, effort.gap) == ((), 2, None)
    few, unknown = effort.limits(0.1)
    assert few == "full with fewer than 3 values of learning rate tried"
    assert unknown == "full with an unknown tuning gap"


def test_an_arm_that_was_not_tuned_allows_none() -> None:
    assert Effort("full", {}, {}, 0, 1, False, (), None).limits(0.1) == ["full was not tuned"]


def test_trials_are_counted_per_field() -> None:
    effort = Effort("full", {"a": 1, "b": 1}, {"a": 4, "b": 4}, 4, 3, False, (), Gap(0.0))
    assert effort.limits(0.1) == ["full with 4 trials for 2 fields"]


def test_the_gap_is_that_of_the_parabola_through_three_rates() -> None:
    low, middle, high = 3.0712, 3.0598, 3.2330
    folder, record = found({"full": [low, middle, high]}, {"full": 3e-3})
    gap = efforts(folder, record)["full"].gap
    assert gap is not None
    assert gap.value == pytest.approx((high - low) ** 2 / (8 * (low - 2 * middle + high)))


def test_repeats_and_interpolation_make_fewer_false_claims() -> None:
    landscape = tuning_claims.Landscape(64.0)
    coarse, fitted = (
        tuning_claims.claims((search, search), (landscape, landscape), 100)
        for search in (tuning_claims.Search(3), tuning_claims.Search(3, 3, 2, True))
    )
    assert coarse["claims"] > 0.3  # 0.483 of 1,000
    assert fitted["claims"] < 0.15  # 0.047 of 1,000
    assert fitted["allowed_claims"] <= fitted["claims"]
