"""Parameter groups: which parameters decay, and single learning rates."""

from __future__ import annotations

import pytest

from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import ParameterGroup, parameter_groups


def groups(lr_factors: dict[str, float] | None = None) -> list[ParameterGroup]:
    model = LanguageModel(ModelConfig(width=32, depth=2, pattern="gdn full", tied=False), seed=0)
    return parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, lr_factors=lr_factors or {})


def decayed() -> set[str]:
    return {name for group in groups() if group.weight_decay for name in group.parameters}


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.mixer.qkv.weight", "blocks.1.feedforward.up.weight"])
def test_matrices_decay(name: str) -> None:
    assert name in decayed()


@pytest.mark.parametrize("name", ["embedding.weight", "norm.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias"])
def test_embeddings_gains_and_vectors_do_not_decay(name: str) -> None:
    assert name not in decayed()


def test_every_parameter_is_in_one_group() -> None:
    model = LanguageModel(ModelConfig(width=32, depth=2, pattern="gdn full", tied=False))
    names = [name for group in groups() for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_learning_rate_factors_apply_by_pattern() -> None:
    rates = {name: group.lr for group in groups({"embedding.*": 0.5}) for name in group.parameters}
    assert rates["embedding.weight"] == pytest.approx(5e-3)
    assert rates["norm.weight"] == 1e-2


def test_factors_of_several_matching_patterns_multiply() -> None:
    rates = {name: group.lr for group in groups({"head.*": 0.5, "*.weight": 0.5}) for name in group.parameters}
    assert rates["head.weight"] == pytest.approx(2.5e-3)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.lr_factors.embeding.*Nearest valid name: 'embedding.weight'"):
        groups({"embeding.*": 0.5})
