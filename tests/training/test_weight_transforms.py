"""Weight transforms during training: when they are applied, what they change, exact resume."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from ranks import on_ranks

from workbench.config import ConfigError
from workbench.model import ModelConfig
from workbench.registry import plug_in
from workbench.results import RunFolder
from workbench.training import RunConfig
from workbench.training.checkpoint import latest, load_checkpoint
from workbench.training.trial import train
from workbench.transforms import transforms

pytestmark = pytest.mark.process

PLUGIN = '''"""Halves the final gain and its moments: a throw-away transform."""

from typing import Literal

from workbench.config import ConfigError
from workbench.transforms import Transform, TransformConfig, transforms


@transforms.register
class Halve(Transform):
    """Halve the final gain."""

    class Config(TransformConfig):
        """Halve the final gain."""

        kind: Literal["halve"] = "halve"

    calls = 0

    def check(self, source, target):
        if source.hidden_z:
            raise ConfigError.at("model.hidden_z", got=source.hidden_z, expected="0")

    def __call__(self, weights, optimiser_state, source, target):
        type(self).calls += 1
        halved = {"norm.weight": weights["norm.weight"] / 2}
        state = {name: dict(entry) for name, entry in optimiser_state.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            if "norm.weight" in state:
                state["norm.weight"][key] = state["norm.weight"][key] * 2
        return {**weights, **halved}, state
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "halve.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def halve(plugin: Path) -> Iterator[Any]:
    """The class of the throw-away transform, registered."""
    spec = importlib.util.spec_from_file_location("halve", plugin)
    assert spec is not None and spec.loader is not None
    sys.modules["halve"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield transforms["halve"]
    transforms.unregister("halve")
    del sys.modules["halve"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(folder: Path, corpus: Path, transforms: list[Any], stop: Any = lambda: False, **training: Any) -> RunFolder:
    """A run of 20 steps that saves every 5."""
    cache = corpus.parent / "cache"
    fields = run_fields(corpus, training={"transforms": transforms, **training})
    made = make_run(folder, cache, fields)
    train(made.path, cache, stop)
    return made


def state(folder: RunFolder) -> dict[str, Any]:
    path, _ = latest(folder.path / "checkpoint")
    assert path is not None
    return load_checkpoint(path)


def losses(folder: RunFolder) -> list[float]:
    return [row["loss"] for row in folder.metrics()]


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({}, 1), ({"every": 3}, 6), ({"every": 5}, 3), ({"every": 20}, 0)],
    ids=["once", "every_3", "every_5_without_the_last_step", "never_after_the_last_step"],
)
def test_a_transform_is_applied_when_due(
    settings: dict[str, Any], calls: int, halve: Any, corpus: Path, tmp_path: Path
) -> None:
    halve.calls = 0
    run(tmp_path / "run", corpus, [{"kind": "halve", **settings}])
    assert halve.calls == calls


def test_a_transform_at_the_start_changes_the_first_step(halve: Any, corpus: Path, tmp_path: Path) -> None:
    plain, changed = run(tmp_path / "plain", corpus, []), run(tmp_path / "changed", corpus, ["halve"])
    assert losses(plain)[0] != losses(changed)[0]


def test_a_periodic_transform_changes_nothing_before_it_is_due(halve: Any, corpus: Path, tmp_path: Path) -> None:
    plain = losses(run(tmp_path / "plain", corpus, []))
    changed = losses(run(tmp_path / "changed", corpus, [{"kind": "halve", "every": 7}]))
    assert [a == b for a, b in zip(plain, changed)].index(False) == 7


def test_weights_and_moments_of_a_checkpoint_are_transformed(halve: Any, corpus: Path, tmp_path: Path) -> None:
    """Stopped at the step at which the transform is due, nothing has been trained since."""
    stops = [stop_after(4), stop_after(4)]
    plain = state(run(tmp_path / "plain", corpus, [], stops[0]))
    changed = state(run(tmp_path / "changed", corpus, [{"kind": "halve", "every": 4}], stops[1]))
    assert torch.equal(changed["model"]["norm.weight"], plain["model"]["norm.weight"] / 2)
    differing = [
        index
        for index, entry in plain["optimiser"]["state"].items()
        if not torch.equal(entry["exp_avg"], changed["optimiser"]["state"][index]["exp_avg"])
    ]
    assert len(differing) == 1
    moments = [checkpoint["optimiser"]["state"][differing[0]]["exp_avg"] for checkpoint in (plain, changed)]
    assert torch.equal(moments[1], moments[0] * 2)


def stop_after(step: int) -> Any:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) == step


@pytest.mark.parametrize("step", [6, 7])
def test_a_resumed_run_has_the_same_bits(step: int, halve: Any, corpus: Path, tmp_path: Path) -> None:
    """Stopped at the step of a transform, and after it."""
    settings = [{"kind": "halve"}, {"kind": "halve", "every": 6}]
    whole = run(tmp_path / "whole", corpus, settings)
    resumed = run(tmp_path / "resumed", corpus, settings, stop_after(step))
    train(resumed.path, corpus.parent / "cache")
    assert losses(resumed) == losses(whole)
    first, second = state(whole), state(resumed)
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    for index, entry in first["optimiser"]["state"].items():
        assert all(torch.equal(value, second["optimiser"]["state"][index][key]) for key, value in entry.items())


def train_plugged_in(plugin: Path, path: Path, cache: Path, devices: int) -> None:
    """Train on one of ``devices`` ranks, in a process that has not loaded the plug-in."""
    plug_in(plugin)
    train(path, cache, devices=devices)


def test_two_ranks_transform_as_one_does(halve: Any, plugin: Path, corpus: Path, tmp_path: Path) -> None:
    fields = run_fields(corpus, training={"transforms": [{"kind": "halve"}, {"kind": "halve", "every": 6}]})
    one, two = (make_run(tmp_path / name, corpus.parent / "cache", fields) for name in ("one", "two"))
    train(one.path, corpus.parent / "cache")
    on_ranks(2, train_plugged_in, plugin, two.path, corpus.parent / "cache", 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_refusal_names_the_transform(halve: Any, corpus: Path) -> None:
    fields = run_fields(corpus, model={"hidden_z": 1e-4}, training={"transforms": ["halve"]})
    with pytest.raises(ConfigError, match=r"training.transforms\[0\].model.hidden_z: got 0.0001; expected 0"):
        RunConfig.parse(fields)


def test_transforms_are_part_of_the_identity(halve: Any, corpus: Path) -> None:
    settings = [[], ["halve"], [{"kind": "halve", "every": 5}]]
    configs = [RunConfig.parse(run_fields(corpus, training={"transforms": each})) for each in settings]
    assert len({config.identity for config in configs}) == 3


def test_no_transforms_change_no_identity(corpus: Path) -> None:
    fields = run_fields(corpus)
    explicit = run_fields(corpus, training={"transforms": []})
    assert RunConfig.parse(fields).identity == RunConfig.parse(explicit).identity


def test_a_transform_to_another_model_is_refused(halve: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = lambda self, source, final: source.changed(depth=4)  # noqa: E731
    monkeypatch.setattr(halve, "target", deeper)
    assert isinstance(deeper(None, ModelConfig(), None), ModelConfig)
    with pytest.raises(ConfigError, match="expected the model of the run"):
        RunConfig.parse(run_fields(corpus, training={"transforms": ["halve"]}))
