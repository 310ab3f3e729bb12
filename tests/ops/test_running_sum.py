"""Running sums against those of fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workbench.ops.running_sum import running_sum


@pytest.mark.parametrize("T", [1, 2, 3, 64, 65, 1000])
def test_sums_are_those_of_cumsum(T: int) -> None:
    for shape in ((2, T), (2, T, 3), (1, T, 2, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(running_sum(x), x.cumsum(1))
        torch.testing.assert_close(
            running_sum(x, modulo=2.0).sub(x.cumsum(1)).add(1).remainder(2.0), torch.ones(shape).double()
        )


def test_angles_keep_their_digits_over_long_rows() -> None:
    """Rotations see differences of angles: here over 100 tokens."""

    def errors(angle_BTA: Tensor) -> Tensor:
        found, exact = (x[:, 100:] - x[:, :-100] for x in (angle_BTA.double(), turn_BTA.double().cumsum(1)))
        return ((found - exact + math.pi).remainder(2 * math.pi) - math.pi).abs()

    turn_BTA = torch.rand(2, 5000, 3) * math.pi
    assert errors(running_sum(turn_BTA, modulo=2 * math.pi)).max() < 1e-4 < 2e-4 < errors(turn_BTA.cumsum(1)).max()
