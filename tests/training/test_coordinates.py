"""The coordinate check, over four widths and three depths."""

from __future__ import annotations

import math

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.training.config import RunConfig
from workbench.training.coordinates import CHANGE_BOUND, CoordinateCheck, coordinate_check

WIDTHS, DEPTHS = (32, 64, 128, 256), (4, 8, 16)
MARGIN = 2.5
"""The standard parametrisation is off by at least so many times the bound."""
MODELS = {
    "full": {"pattern": "full"},
    "gdn": {"pattern": "gdn"},
    "mla": {"pattern": "mla"},
    "moe": {"pattern": "full", "feedforward": "moe", "feedforwards": {"moe": {"experts": 4}}},
}


def run(name, kind, **settings):
    fields = MODELS[name]
    model = {"depth": 2, "vocabulary": 128, "tied": False, "mixers": {fields["pattern"]: {"head_dim": 16}}, **fields}
    if kind != "standard":
        model["parametrisation"] = {"kind": kind, "base": {"width": 32}}
    return RunConfig.parse({"model": model | settings, "training": {"learning_rate": 3e-3}})


def slope(check, quantity="hidden change"):
    return check.slopes().filter(pl.col("quantity") == quantity)["slope"].item()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("full", "mup"),
        ("full", "full_align"),
        ("full", "complete_p"),
        ("gdn", "mup"),
        ("mla", "full_align"),
        ("moe", "complete_p"),
    ],
)
def test_flat_over_the_width(name, kind):
    check = coordinate_check(run(name, kind), WIDTHS, steps=4, seeds=(0, 1), batch=(4, 24))
    assert check.is_flat, check.slopes()


@pytest.mark.parametrize("name", MODELS)
def test_the_standard_parametrisation_is_visibly_not_flat(name):
    check = coordinate_check(run(name, "standard"), WIDTHS, steps=4, seeds=(0,), batch=(4, 24))
    assert slope(check) > MARGIN * CHANGE_BOUND


def test_complete_p_is_flat_over_the_depth_and_mup_is_not():
    slopes = {}
    for kind in ("complete_p", "mup"):
        settings = {"kind": kind, "base": {"width": 32, "depth": 4}, "input_multiplier": 12.0}
        check = coordinate_check(
            run("full", "standard", width=32, parametrisation=settings), DEPTHS, "depth", steps=4, seeds=(0, 1)
        )
        slopes[kind] = slope(check)
    assert abs(slopes["complete_p"]) <= CHANGE_BOUND
    assert slopes["mup"] > 2 * CHANGE_BOUND


def test_slopes_are_those_of_a_power_law():
    rows = [(w, 2, s, 1, "hidden change", 3.0 * w**0.5 * (1 + 0 * s)) for w in (8, 16, 64) for s in (0, 1)]
    schema = ["width", "depth", "seed", "step", "quantity", "value"]
    check = CoordinateCheck("width", pl.DataFrame(rows, schema=schema, orient="row"))
    row = check.slopes().row(0, named=True)
    assert math.isclose(row["slope"], 0.5) and row["flat"] is False and not check.is_flat


def test_one_size_is_refused():
    with pytest.raises(ConfigError, match="two sizes"):
        coordinate_check(run("full", "mup"), [64, 64])
