"""Learning-rate schedules."""

from __future__ import annotations

import itertools

import pytest

from workbench.training.config import RunConfig, TrainingConfig
from workbench.training.schedule import rate_at

WSD = TrainingConfig(tokens=100 * 2048, warmup=0.1, decay=0.2, final=0.1)
COSINE = TrainingConfig(tokens=100 * 2048, schedule="cosine", warmup=0.05, final=0.2)


def rates(config: TrainingConfig) -> list[float]:
    return [rate_at(step, config) for step in range(100)]


def test_wsd_warms_up_linearly() -> None:
    assert rates(WSD)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_wsd_is_stable_between_warm_up_and_decay() -> None:
    assert set(rates(WSD)[9:81]) == {1.0}


def test_wsd_decays_from_the_trunk_on() -> None:
    assert all(a > b for a, b in itertools.pairwise(rates(WSD)[WSD.trunk_steps :]))


@pytest.mark.parametrize(
    "shape,remaining", [("linear", [1, 0.75, 0.5, 0.25]), ("sqrt", [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])]
)
def test_shapes_of_the_decay(shape: str, remaining: list[float]) -> None:
    config = WSD.changed(decay_shape=shape, final=0.0)
    assert rates(config)[80::5] == pytest.approx(remaining)


def test_a_cosine_decay_is_half_way_in_its_middle() -> None:
    assert rates(WSD.changed(decay_shape="cosine"))[80::10] == pytest.approx([1.0, 0.55])


def test_a_linear_decay_changes_no_identity() -> None:
    assert "decay_shape" not in RunConfig().canonical()["training"]
    assert RunConfig.parse({"training": {"decay_shape": "sqrt"}}).canonical()["training"]["decay_shape"] == "sqrt"


def test_wsd_ends_near_its_final_rate() -> None:
    assert 0.1 < rates(WSD)[-1] < 0.15


def test_cosine_reaches_the_peak_after_warm_up() -> None:
    assert rates(COSINE)[5] == 1.0


def test_cosine_ends_near_its_final_rate() -> None:
    assert rates(COSINE)[-1] == pytest.approx(0.2, abs=1e-3)
