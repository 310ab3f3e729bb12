"""Rotary positions: differences of positions alone, single positions, channels that pass, scalings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.layers import Rotary
from workbench.layers.rotary import LinearScaling, Llama3Scaling, YarnScaling
from workbench.model import ModelConfig

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


def test_linear_scaling_divides_positions(x_BTHK: Tensor) -> None:
    scaled = Rotary(8, scaling=LinearScaling(factor=4.0))
    assert torch.allclose(scaled(x_BTHK, offset=0)[:, 4], ROTARY(x_BTHK[:, 4:5], offset=1)[:, 0])


def test_llama3_keeps_fast_pairs_and_interpolates_slow_ones() -> None:
    """Turns within 64 tokens: 10.19, 3.22, 1.02, 0.32 at theta 100; between 1 and 4 the share kept is linear."""
    turns = [64 * 100 ** (-i / 4) / (2 * math.pi) for i in range(4)]
    kept = [1.0, (turns[1] - 1) / 3, (turns[2] - 1) / 3, 0.0]
    expected = [share + (1 - share) / 8 for share in kept]
    assert Llama3Scaling(factor=8.0, original_context=64).ratios(8, 100.0) == pytest.approx(expected)


def test_yarn_passes_linearly_between_two_pairs() -> None:
    """At theta 10,000 and 4,096 tokens pair i turns 651.9 · 10^(-i/2) times: 32 turns at i = 2.62, one at i = 5.63."""
    expected = [1.0, 1.0, 1.0, 1 - 0.75 / 4, 1 - 0.75 / 2, 1 - 0.75 * 3 / 4, 0.25, 0.25]
    assert YarnScaling(factor=4.0, original_context=4096).ratios(16, 10_000.0) == pytest.approx(expected)


def test_yarn_scales_products_by_the_square_of_its_magnitude(x_BTHK: Tensor) -> None:
    plain, doubled = (
        Rotary(8, scaling=YarnScaling(factor=4.0, original_context=64, attention_factor=factor))(x_BTHK)[..., :8]
        for factor in (1.0, 2.0)
    )
    torch.testing.assert_close(doubled.square().sum(-1), 4 * plain.square().sum(-1))


def test_the_default_magnitude_of_yarn() -> None:
    assert YarnScaling(factor=math.e, original_context=64).magnitude == pytest.approx(1.1)


def test_an_unknown_scaling_is_refused_by_kind() -> None:
    with pytest.raises(ConfigError, match=r"mixers\.full\.rotary_scaling\.kind: got 'ntk'"):
        ModelConfig(mixers={"full": {"rotary_scaling": {"kind": "ntk"}}})


def test_a_model_without_scaling_keeps_its_identity() -> None:
    assert "rotary_scaling" not in ModelConfig(pattern="full mla").layers[0].mixer.canonical()
    assert "rotary_scaling" not in ModelConfig(pattern="full mla").layers[1].mixer.canonical()
