"""A parametrisation is one file."""

from __future__ import annotations

from typing import Literal

import pytest

from workbench.model import LanguageModel, ModelConfig
from workbench.model.parametrisation import parameter_factors
from workbench.parametrisations import ParametrisationConfig, Power, Rule, parametrisations, rules
from workbench.parametrisations.base import Parametrisation


@pytest.fixture
def halved():
    @parametrisations.register
    class Halved(Parametrisation):
        """Half the learning rate of the router's peers for every doubling."""

        class Config(ParametrisationConfig):
            """Throw-away."""

            kind: Literal["halved"] = "halved"

        rules = rules(Rule(variance=Power(-1)), hidden=Rule(variance=Power(-1), learning_rate=Power(-2)))

    yield
    parametrisations.unregister("halved")


def test_a_registered_class_is_enough(halved):
    config = ModelConfig(width=128, depth=2, vocabulary=64, parametrisation={"kind": "halved", "base": {"width": 64}})
    assert parameter_factors(LanguageModel(config))["blocks.0.mixer.qkv.weight"].learning_rate == 0.25
