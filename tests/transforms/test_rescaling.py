"""A transform over declared rescaling pairs: function-preserving bit for bit, in the suite and in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import make_run, run_fields, write_corpus
from torch import Tensor

from workbench.config import ConfigError
from workbench.model import LanguageModel, ModelConfig, rescaling_pairs
from workbench.testing import TransformConformance
from workbench.training.trial import train
from workbench.transforms import OptimiserState, Transform, TransformConfig, Weights, transforms


def pairs_of(config: ModelConfig) -> list[Any]:
    with torch.device("meta"):
        model = LanguageModel(config)
    return [pair for _, pair in rescaling_pairs(model)]


class Alternate(Transform):
    """Scales every rescaling pair by 2 and 1/2 in turn: a throw-away transform. The optimiser's moments follow."""

    conformance_cases = (
        {"source": {}},
        {"source": {"pattern": "mla sliding", "feedforward": "swiglu moe"}},
    )

    class Config(TransformConfig):
        """Alternate scales."""

        kind: Literal["alternate"] = "alternate"

    def check(self, source: ModelConfig, target: ModelConfig) -> None:
        if not pairs_of(source):
            raise ConfigError.at("model", got="no rescaling pairs", expected="components with any")

    def preserves_function(self, source: ModelConfig, target: ModelConfig) -> bool:
        return True

    def __call__(
        self, weights: Weights, optimiser_state: OptimiserState | None, source: ModelConfig, target: ModelConfig
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]] | None]:
        scaled = dict(weights)
        state = None if optimiser_state is None else {name: dict(entry) for name, entry in optimiser_state.items()}
        for pair in pairs_of(source):
            scales_S = 2.0 ** (1 - 2 * (torch.arange(len(pair.heads)) % 2))
            for name, factor in pair.factors(scales_S):
                scaled[name] = scaled[name] * factor.to(scaled[name])
                if state is not None and name in state:
                    state[name]["exp_avg"] = state[name]["exp_avg"] / factor.to(scaled[name])
                    state[name]["exp_avg_sq"] = state[name]["exp_avg_sq"] / factor.to(scaled[name]).square()
        return scaled, state


class TestAlternate(TransformConformance):
    transform = Alternate


@pytest.fixture
def alternate() -> Iterator[None]:
    transforms.register(Alternate)
    yield
    transforms.unregister("alternate")


@pytest.mark.usefixtures("alternate")
def test_training_computes_the_same_loss_until_the_next_update(tmp_path: Path) -> None:
    """Rescaled after step 7, step 8 computes the same bits, and its update of other weights changes step 9."""
    corpus, losses = write_corpus(tmp_path / "corpus"), []
    for name, schedule in (("plain", []), ("rescaled", [{"kind": "alternate", "every": 7}])):
        folder = make_run(tmp_path / name, tmp_path / "cache", run_fields(corpus, training={"transforms": schedule}))
        train(folder.path, tmp_path / "cache")
        losses.append([row["loss"] for row in folder.metrics()])
    assert [plain == rescaled for plain, rescaled in zip(*losses)].index(False) == 8
