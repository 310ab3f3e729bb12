"""The rules of every parametrisation, with factors computed by hand."""

from __future__ import annotations

import math

import pytest

from workbench.config import ConfigError
from workbench.contract import Role
from workbench.parametrisations import Shape, learning_rate_factor, parametrisations

BASE = {"base": {"width": 64}}


def build(kind, **settings):
    return parametrisations[kind](parametrisations[kind].Config.parse({"kind": kind, **BASE, **settings}))


@pytest.mark.parametrize("kind", parametrisations)
def test_every_role_has_a_rule(kind):
    assert set(build(kind).rules) == set(Role)


@pytest.mark.parametrize("kind", parametrisations)
def test_at_the_base_every_learning_rate_is_the_tuned_one(kind):
    shape = Shape(64, 128)
    for role in Role:
        for family in ("sign", "orthogonal", "spectral", "rms"):
            assert learning_rate_factor(build(kind), role, family, shape, shape, 1.0) == 1


def factor(kind, family, shape, base, depth_ratio=1.0, role=Role.HIDDEN, **settings):
    return learning_rate_factor(build(kind, **settings), role, family, shape, base, depth_ratio)


@pytest.mark.parametrize("kind", ["full_align", "mup", "complete_p"])
def test_adam_divides_hidden_rates_by_the_ratio(kind):
    assert factor(kind, "sign", Shape(256, 256), Shape(64, 64)) == 0.25


def test_standard_keeps_every_rate():
    for family in ("sign", "orthogonal", "spectral", "rms", "gradient"):
        assert factor("standard", family, Shape(256, 256), Shape(64, 64)) == 1


def test_muon_keeps_the_rate_where_both_sides_grow():
    assert factor("mup", "orthogonal", Shape(256, 1024), Shape(64, 256)) == 1
    assert factor("mup", "orthogonal", Shape(1024, 256), Shape(256, 64)) == 1


def test_muon_like_adamw_divides_by_the_root_of_the_ratio():
    assert factor("mup", "rms", Shape(256, 256), Shape(64, 64)) == pytest.approx(0.5)


def test_muon_into_a_fixed_latent():
    # sqrt(in / out) a channel: four times the fan-in doubles it
    assert factor("mup", "orthogonal", Shape(256, 16), Shape(64, 16)) == pytest.approx(0.5)


def test_updates_of_the_spectral_condition_keep_the_rate_whatever_grows():
    assert factor("mup", "spectral", Shape(256, 16), Shape(64, 16)) == 1
    assert factor("mup", "spectral", Shape(64, 256), Shape(64, 64)) == 1


def test_sgd_in_mup():
    assert factor("mup", "gradient", Shape(256, 256), Shape(64, 64)) == 1
    assert factor("mup", "gradient", Shape(256, 256), Shape(64, 64), role=Role.EMBEDDING) == 4


def test_full_align_has_no_rule_for_sgd():
    with pytest.raises(ConfigError, match="full_align"):
        factor("full_align", "gradient", Shape(256, 256), Shape(64, 64))


def test_alpha_below_one_slows_branches_down():
    assert factor("complete_p", "sign", Shape(64, 64), Shape(64, 64), 4.0, alpha=0.5) == pytest.approx(1 / math.sqrt(4))
    assert factor("complete_p", "sign", Shape(64, 64), Shape(64, 64), 4.0) == 1


def test_a_parametrisation_needs_a_base():
    with pytest.raises(ConfigError, match=r"base.*width"):
        parametrisations.parse({"kind": "mup"})
