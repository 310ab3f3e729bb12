"""The moving average of the weights: its values, what is measured with it, growth and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, small_model
from safetensors.torch import load_file

from workbench.config import ConfigError
from workbench.optimisers import AVERAGE, optimisers, parameter_groups
from workbench.pretrained import load
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.average import AverageConfig, averaged, averaging
from workbench.training.checkpoint import latest, load_checkpoint
from workbench.training.export import export
from workbench.training.optimiser import training_state_bytes
from workbench.training.trial import train

MakeRun = Callable[..., RunFolder]


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_the_average_weighs_steps_by_powers_of_the_decay(kind: str) -> None:
    model, config, decay = small_model(), AverageConfig(decay=0.7), 0.7
    settings = {"kind": kind, **({"momentum": 0.0} if kind == "sgd" else {})}
    claims = optimisers[kind](optimisers.parse(settings))
    optimiser = claims.build(parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, lr_factors={}))
    tokens_BT, weights = random_tokens(2, 17), []
    for step in range(1, 5):
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        with averaging(optimiser, config.share(step, 32)):
            optimiser.step()
            optimiser.zero_grad()
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    powers = torch.tensor([decay**age for age in (3, 2, 1, 0)])
    for name, parameter in model.named_parameters():
        expected = torch.einsum("s,s...->...", powers / powers.sum(), torch.stack([step[name] for step in weights]))
        torch.testing.assert_close(optimiser.state[parameter][AVERAGE], expected)


def test_parameters_and_averages_are_exchanged_bit_for_bit() -> None:
    model = torch.nn.Linear(5, 1, bias=False)
    parameter = model.weight
    optimiser = torch.optim.SGD([parameter])
    before, average = parameter.detach().clone(), torch.randn(1, 5)
    optimiser.state[parameter] = {AVERAGE: average.clone()}
    with averaged(model, optimiser):
        assert torch.equal(parameter, average)
    assert torch.equal(parameter, before)
    assert torch.equal(optimiser.state[parameter][AVERAGE], average)


def test_half_a_life_of_tokens() -> None:
    config = AverageConfig(half_life=1000)
    assert config.decay_of_step(1000) == 0.5
    assert config.decay_of_step(100) ** 10 == pytest.approx(0.5)


@pytest.mark.parametrize("fields", [{}, {"decay": 0.9, "half_life": 10}])
def test_decay_and_half_life_exclude_each_other(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either a decay per step or a half-life"):
        AverageConfig.parse(fields)


def test_the_identity_has_no_average_by_default() -> None:
    assert "ema" not in RunConfig().canonical()["training"]
    assert RunConfig.parse({"training": {"ema": {"decay": 0.9}}}).identity != RunConfig().identity


def test_memory_is_four_bytes_per_parameter() -> None:
    plain, averages = RunConfig(), RunConfig.parse({"training": {"ema": {"decay": 0.9}}})
    parameters = sum(p.numel() for p in small_model(width=128, depth=4, vocabulary=2048).parameters())
    assert training_state_bytes(averages) - training_state_bytes(plain) == 4 * parameters


@pytest.fixture
def evaluated(new: MakeRun, cache: Path) -> dict[str, RunFolder]:
    """Finished runs of one seed."""
    settings = {"none": None, "instead": {"decay": 0.8}, "beside": {"decay": 0.8, "evaluate": "beside"}}
    runs = {name: new(name, training={"ema": ema}) for name, ema in settings.items()}
    assert {train(folder.path, cache)["status"] for folder in runs.values()} == {"done"}
    return runs


@pytest.mark.process
def test_the_average_is_measured_instead_of_the_weights_or_beside_them(
    evaluated: dict[str, RunFolder], tmp_path: Path, cache: Path
) -> None:
    none, instead, beside = (evaluated[name].result() for name in ("none", "instead", "beside"))
    assert beside["selection_value"] == none["selection_value"]
    assert beside["report_value"] == none["report_value"]
    assert beside["selection_value_ema"] == instead["selection_value"] != none["selection_value"]
    assert instead["report_value"] != none["report_value"]
    assert [row.get("selection_value_ema") for row in evaluated["beside"].metrics() if "selection_value" in row] == [
        row["selection_value"] for row in evaluated["instead"].metrics() if "selection_value" in row
    ]
    path, _ = latest(evaluated["instead"].path / "checkpoint")
    assert path is not None
    trained = load_file(path / "model.safetensors")
    averages = [entry[AVERAGE] for entry in load_checkpoint(path)["optimiser"]["state"].values()]
    exported = {
        (run, weights): load(export(evaluated[run].path, tmp_path / run / weights, cache=cache, weights=weights))[0]
        for run, weights in (("instead", "measured"), ("instead", "trained"), ("beside", "measured"))
    }
    for key, model in exported.items():
        is_average = key == ("instead", "measured")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, trained[name]) != is_average, (key, name)
            assert any(torch.equal(parameter, average) for average in averages) == is_average
    with pytest.raises(ConfigError, match=r"a run with training\.ema"):
        export(evaluated["none"].path, tmp_path / "none", cache=cache, weights="average")


@pytest.mark.process
def test_averages_grow_with_the_model(new: MakeRun, cache: Path) -> None:
    growth = {"model": {"depth": 1}, "at": 0.5, "transforms": [{"kind": "stack"}]}
    folder = new(growth=growth, training={"ema": {"decay": 0.999}})
    assert train(folder.path, cache)["status"] == "done"
    first, _ = latest(folder.path / "checkpoint")
    assert first is not None
    model = load_checkpoint(first)
    state = model["optimiser"]["state"]
    assert len(state) == len(model["model"])
    assert all(AVERAGE in entry for entry in state.values())
