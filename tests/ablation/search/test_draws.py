"""Sobol points and the values of ranges."""

from __future__ import annotations

import math

import pytest

from workbench.ablation.search.draws import fixed_points, value_at
from workbench.ablation.spec.tuning import Tuning
from workbench.ranges import Range

SPACE = {
    "training.learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "training.accumulate": Range(low=1, high=8),
    "training.schedule": Range(values=("wsd", "cosine")),
}


@pytest.fixture(scope="module")
def points() -> list[dict[str, float]]:
    return fixed_points(Tuning(trials=8, sampler="qmc", space=SPACE), SPACE, list(SPACE))


def test_sobol_points_put_one_value_in_each_eighth(points: list[dict[str, float]]) -> None:
    exponents = sorted(math.log10(point["training.learning_rate"]) for point in points)
    assert all(-4 + k / 4 <= exponent < -4 + (k + 1) / 4 for k, exponent in enumerate(exponents))


def test_sobol_points_take_every_whole_number(points: list[dict[str, float]]) -> None:
    assert sorted(point["training.accumulate"] for point in points) == list(range(1, 9))


def test_sobol_points_balance_listed_values(points: list[dict[str, float]]) -> None:
    assert sum(point["training.schedule"] == "wsd" for point in points) == 4


@pytest.mark.parametrize("name", SPACE)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999999])
def test_values_lie_in_their_range(name: str, share: float) -> None:
    assert value_at(SPACE[name], share) in SPACE[name]
