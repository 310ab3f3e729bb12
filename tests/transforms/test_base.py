"""Sequences of transforms, and the configuration of a start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import small_model

from workbench.config import ConfigError
from workbench.model import ModelConfig
from workbench.testing import TransformConformance
from workbench.transforms import StartConfig, Transform, TransformConfig, apply_transforms, transforms
from workbench.transforms.start_from import StartFrom


class AppendLayers(Transform):
    """Repeats the last layer up to the final depth: a throw-away transform."""

    class Config(TransformConfig):
        """Append layers."""

        kind: str = "append_layers"

    def target(self, source: ModelConfig, final: ModelConfig) -> ModelConfig:
        return source.changed(depth=final.depth)

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        if source.pattern != "full":
            raise ConfigError.at("model.pattern", got=source.pattern, expected="one kind of layer")

    def __call__(self, weights: Any, optimiser_state: Any, source: ModelConfig, target: ModelConfig) -> Any:
        assert source.depth and target.depth
        last = f"blocks.{source.depth - 1}."
        repeated = {
            name.replace(last, f"blocks.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(last)
            for layer in range(source.depth, target.depth)
        }
        return {**weights, **repeated}, optimiser_state


APPEND, START_FROM = AppendLayers(AppendLayers.Config()), StartFrom(StartFrom.Config())


def test_transforms_are_applied_in_order() -> None:
    """Two layers become three; then a sliding model starts from the three layers of full attention."""
    source, final = small_model(), small_model(depth=3, pattern="sliding")
    weights, _ = apply_transforms([APPEND, START_FROM], source.state_dict(), None, source.config, final.config)
    assert weights.keys() == final.state_dict().keys()
    last = "blocks.2.mixer.qkv.weight"
    assert torch.equal(weights[last], source.state_dict()["blocks.1.mixer.qkv.weight"])


def test_a_sequence_that_ends_at_another_model_is_refused() -> None:
    source, final = small_model(), small_model(depth=3, pattern="sliding")
    with pytest.raises(ConfigError, match=r"transforms: got .*layers.*End with \{kind: start_from\}"):
        apply_transforms([APPEND], source.state_dict(), None, source.config, final.config)


def test_a_transform_that_leaves_out_weights_must_be_the_last() -> None:
    source = small_model()
    with pytest.raises(ConfigError, match=r"transforms\[0\]: got .*'start_from' before others.*; expected the last"):
        apply_transforms([START_FROM, APPEND], source.state_dict(), None, source.config, source.config)


def test_the_suite_refuses_a_false_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deeper model with a repeated layer has another function."""
    monkeypatch.setattr(AppendLayers, "preserves_function", lambda *_: True)
    suite = TransformConformance()
    monkeypatch.setattr(TransformConformance, "transform", AppendLayers)
    with pytest.raises(AssertionError, match="logits after the transform"):
        suite.test_the_function_is_preserved_where_claimed({"source": {}, "target": {"depth": 3}})


def test_a_refusal_names_the_obstacle() -> None:
    source, final = small_model(pattern="sliding"), small_model(depth=3)
    with pytest.raises(ConfigError, match=r"model.pattern: got 'sliding'; expected one kind of layer"):
        apply_transforms([APPEND, START_FROM], source.state_dict(), None, source.config, final.config)


def test_a_transform_of_one_file_is_used_by_its_name() -> None:
    transforms.register(AppendLayers)
    try:
        (config,) = StartConfig(folder="weights", transforms=[{"kind": "append_layers"}]).transforms
        assert isinstance(config, AppendLayers.Config)
    finally:
        transforms.unregister("append_layers")


def test_a_start_copies_weights_by_default() -> None:
    (config,) = StartConfig(folder="weights").transforms
    assert config == StartFrom.Config()


def test_a_start_has_no_interval() -> None:
    with pytest.raises(ConfigError, match=r"transforms\[0\].every: got 5; expected nothing"):
        StartConfig(folder="weights", transforms=[{"kind": "start_from", "every": 5}])


def test_a_start_has_a_transform() -> None:
    with pytest.raises(ConfigError, match="expected at least one"):
        StartConfig(folder="weights", transforms=[])


def test_an_unknown_transform_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"transforms.*got 'start_form'; expected a registered transform.*start_from"):
        StartConfig(folder="weights", transforms=["start_form"])
