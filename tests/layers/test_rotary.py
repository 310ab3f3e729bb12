"""Rotary positions: differences of positions alone, single positions, channels that pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.layers import Rotary

ROTARY = Rotary(8)


@pytest.fixture
def x_BTHK() -> Tensor:
    return torch.randn(2, 7, 3, 12, dtype=torch.float64)


def test_products_depend_on_differences_of_positions(x_BTHK: Tensor) -> None:
    scores = [torch.einsum("bthk,bshk->bhts", y, y) for y in (ROTARY(x_BTHK), ROTARY(x_BTHK, offset=100))]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)


def test_later_channels_pass_unchanged(x_BTHK: Tensor) -> None:
    assert torch.equal(ROTARY(x_BTHK)[..., 8:], x_BTHK[..., 8:])


def test_positions_can_be_given_one_by_one(x_BTHK: Tensor) -> None:
    positions_BT = torch.arange(3, 10).expand(2, 7)
    assert torch.equal(ROTARY(x_BTHK, positions_BT=positions_BT, length=10), ROTARY(x_BTHK, offset=3))


def test_bf16_is_rotated_in_fp32(x_BTHK: Tensor) -> None:
    x_BTHK = x_BTHK.bfloat16()
    assert torch.equal(ROTARY(x_BTHK, offset=5000), ROTARY(x_BTHK.float(), offset=5000).bfloat16())
