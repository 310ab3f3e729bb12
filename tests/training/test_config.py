"""The configuration of a run: errors name the field, and the identity covers what changes a run."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.training.config import RunConfig


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tokens": 10}, "training.tokens"),
        ({"warmup": 0.9, "decay": 0.9}, "training.decay"),
        ({"learning_rate": -1}, "training.learning_rate"),
        ({"schedule": "linear"}, "training.schedule"),
        ({"lerning_rate": 1e-3}, "training.lerning_rate"),
        ({"optimiser": "adamv"}, "training.optimiser.kind"),
        ({"optimiser": {"epsilon": -1.0}}, "training.optimiser.epsilon"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "training.optimiser.betas[1]"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig.parse({"training": fields})
    assert raised.value.problems[0].path == path


def test_the_identity_of_the_defaults_is_stable() -> None:
    assert RunConfig().identity == "473e57e66f25"


@pytest.mark.parametrize("fields", [{"deterministic": True}, {"keep_trunk": True}, {"optimiser": {"epsilon": 1e-15}}])
def test_settings_that_change_a_run_change_its_identity(fields: dict[str, Any]) -> None:
    assert RunConfig.parse({"training": fields}).identity != RunConfig().identity


def test_an_optimiser_without_a_kind_is_adamw() -> None:
    fields = {"training": {"optimiser": {"epsilon": 1e-15}}}
    assert RunConfig.parse(fields).training.optimiser.kind == "adamw"
