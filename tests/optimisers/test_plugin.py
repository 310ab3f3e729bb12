"""An optimiser in another package: one file, and configuration, training, cost card and conformance suite know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import make_run, run_fields, write_corpus

from workbench.config import ConfigError
from workbench.optimisers import optimisers
from workbench.registry import PLUGIN_FILES, plug_in
from workbench.testing.optimisers import OptimiserConformance
from workbench.training.config import RunConfig
from workbench.training.optimiser import training_state_bytes
from workbench.training.trial import train

pytestmark = pytest.mark.process

SGD = '''"""Stochastic gradient descent with momentum: a throw-away optimiser."""

from typing import Literal

import torch
from workbench.contract import Range
from workbench.optimisers import Optimiser, OptimiserConfig, optimisers


class DecoupledSGD(torch.optim.Optimizer):
    def __init__(self, groups, momentum):
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(state["momentum"], alpha=group["lr"])


@optimisers.register
class SGD(Optimiser):
    """SGD with momentum and decoupled weight decay."""

    class Config(OptimiserConfig):
        """SGD."""

        kind: Literal["throwaway_sgd"] = "throwaway_sgd"
        momentum: float = 0.9
        """Decay rate of the running sum of gradients."""

    gradient_powers = {"momentum": 1}

    def build(self, groups):
        return DecoupledSGD([group.settings() for group in groups], self.config.momentum)

    def state_bytes(self, group):
        return sum(4 * parameter.numel() for parameter in group.parameters.values())

    @classmethod
    def search_space(cls, config):
        return {"momentum": Range(low=0.5, high=0.99)}
'''
CHECKS = [name for name in dir(OptimiserConformance) if name.startswith("test_")]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the optimiser in the file."""
    file = tmp_path_factory.mktemp("plugin") / "throwaway_sgd_plugin.py"
    file.write_text(SGD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGIN_FILES, "")
        plug_in(file)
        yield "throwaway_sgd"
        optimisers.unregister("throwaway_sgd")


@pytest.mark.parametrize("check", CHECKS)
def test_it_passes_the_conformance_suite(plugin: str, check: str) -> None:
    suite = type("TestSGD", (OptimiserConformance,), {"optimiser": optimisers[plugin]})
    getattr(suite(), check)()


def test_it_trains_a_run(plugin: str, tmp_path: Path) -> None:
    fields = run_fields(write_corpus(tmp_path / "corpus"), training=_training(plugin))
    folder = make_run(tmp_path / "run", tmp_path / "cache", fields)
    assert train(folder.path, tmp_path / "cache")["status"] == "done"


def test_its_state_is_in_the_cost_card(plugin: str) -> None:
    state_bytes = [training_state_bytes(RunConfig.parse({"training": _training(kind)})) for kind in (plugin, "adamw")]
    assert state_bytes[0] < 0.51 * state_bytes[1]


def test_skipping_of_spikes_is_refused_where_it_is_not_claimed(plugin: str) -> None:
    with pytest.raises(ConfigError, match=r"training.guards: got .*throwaway_sgd"):
        RunConfig.parse({"training": {**_training(plugin), "guards": [{"kind": "ratio", "factor": 10.0}]}})


def _training(kind: str) -> dict[str, Any]:
    return {"optimiser": {"kind": kind}}
