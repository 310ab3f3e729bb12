"""Length distributions have the ranges and shares that they state."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.data.lengths import DISTRIBUTIONS, LengthDistribution, draw_lengths


def draw(distribution: LengthDistribution, scale: float = 1.0) -> np.ndarray:
    return draw_lengths(distribution, 20_000, np.random.default_rng(0), scale)


def test_uniform_lengths_are_between_1k_and_32k() -> None:
    lengths = draw("uniform")
    assert 1024 <= lengths.min() < 1100 and 32_700 < lengths.max() <= 32_768
    assert lengths.mean() == pytest.approx((1024 + 32_768) / 2, rel=0.01)


def test_bimodal_lengths_are_below_4k_or_above_16k() -> None:
    lengths = draw("bimodal")
    short = lengths <= 4096
    assert (short | (lengths >= 16_384)).all()
    assert short.mean() == pytest.approx(0.5, abs=0.015)


def test_two_thirds_of_the_long_tail_are_below_16k() -> None:
    lengths = draw("long_tail")
    assert lengths.min() >= 8192 and lengths.max() <= 73_728
    below = (1 - 2**-1.5) / (1 - 9**-1.5)  # of the truncated Pareto distribution
    assert (lengths < 16_384).mean() == pytest.approx(below, abs=0.015)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_scale_multiplies_lengths(distribution: LengthDistribution) -> None:
    np.testing.assert_allclose(draw(distribution, 1 / 8), draw(distribution) / 8, atol=1)
