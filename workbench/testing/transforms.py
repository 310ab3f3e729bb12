"""What every weight transform must do, checked in fp64 on the CPU.

class TestStack(TransformConformance):
    transform = Stack
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import optimisers
from workbench.testing.measure import assert_close

MODEL: dict[str, Any] = {"width": 64, "depth": 2, "vocabulary": 300}
"""Fields of every model of a case, where the case does not set them."""


class TransformConformance:
    """Checks for one transform. Set ``transform`` to its class; the cases are its ``conformance_cases``."""

    transform: ClassVar[Any] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.transform.conformance_cases if self.transform else ())
        if "variant" in metafunc.fixturenames:
            metafunc.parametrize("variant", variant_models())
        if "fields" in metafunc.fixturenames:
            metafunc.parametrize("fields", self.transform.variant_configs if self.transform else ())

    # -- helpers -------------------------------------------------------------------------------------------------

    def build(self, case: dict[str, Any]) -> tuple[Any, ModelConfig, ModelConfig]:
        """The transform, its source and its target, which it has accepted."""
        source = ModelConfig.parse({**MODEL, **case["source"]})
        final = ModelConfig.parse({**MODEL, **case.get("target", case["source"])})
        transform = self.instance(case.get("config", {}))
        target = transform.target(source, final)
        transform.check(source, target)
        return transform, source, target

    def instance(self, fields: dict[str, Any]) -> Any:
        """The transform with these fields, in a run with AdamW."""
        adamw = optimisers["adamw"]
        return self.transform(self.transform.Config.parse(fields), adamw(adamw.Config()))

    def weights(self, config: ModelConfig) -> dict[str, Tensor]:
        """Weights of a model in fp64, every gain and bias away from its initial value."""
        model = LanguageModel(config, seed=0).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def state(self, config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """AdamW's state of these weights, with random moments."""
        return {
            name: {
                "step": torch.tensor(7.0),
                "exp_avg": torch.randn_like(weights[name]),
                "exp_avg_sq": torch.rand_like(weights[name]),
            }
            for name, _ in LanguageModel(config).named_parameters()
        }

    # -- checks --------------------------------------------------------------------------------------------------

    def test_weights_fit_the_target(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        weights, _ = transform(self.weights(source), None, source, target)
        expected = {name: tensor.shape for name, tensor in LanguageModel(target).state_dict().items()}
        assert {name: tensor.shape for name, tensor in weights.items()}.items() <= expected.items()

    def test_no_weight_is_missing(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        if transform.complete:
            weights, _ = transform(self.weights(source), None, source, target)
            assert weights.keys() == LanguageModel(target).state_dict().keys()

    def test_optimiser_state_fits_the_weights(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        weights = self.weights(source)
        new_weights, state = transform(weights, self.state(source, weights), source, target)
        assert state is not None
        trainable = dict(LanguageModel(target).named_parameters())
        for name, entry in state.items():
            assert name in trainable and name in new_weights, f"state of {name}, which has no weights"
            moments = {key: value.shape for key, value in entry.items() if key != "step"}
            assert all(shape == trainable[name].shape for shape in moments.values()), f"{name}: {moments}"

    def test_an_unknown_optimiser_state_stays_unknown(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        assert transform(self.weights(source), None, source, target)[1] is None

    def test_the_arguments_are_not_modified(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        weights = self.weights(source)
        before = {name: tensor.clone() for name, tensor in weights.items()}
        transform(weights, self.state(source, weights), source, target)
        assert weights.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())

    def test_the_function_is_preserved_where_claimed(self, case: dict[str, Any]) -> None:
        transform, source, target = self.build(case)
        if not transform.preserves_function(source, target):
            return
        weights = self.weights(source)
        new_weights, _ = transform(weights, None, source, target)
        tokens_BT = torch.randint(0, source.vocabulary or 0, (2, 33))
        before, after = (logits(config, w, tokens_BT) for config, w in ((source, weights), (target, new_weights)))
        assert_close(after, before, "logits after the transform")

    def test_it_keeps_the_function_of_every_variant_or_refuses_it(
        self, fields: dict[str, Any], variant: dict[str, Any]
    ) -> None:
        source, transform = ModelConfig.parse({**MODEL, **variant}), self.instance(fields)
        try:
            target = transform.example_target(source)
            transform.check(source, target)
        except ConfigError as error:
            assert all(problem.path and problem.expected for problem in error.problems)
            return
        assert transform.preserves_function(source, target)
        weights, tokens_BT = self.weights(source), torch.randint(0, source.vocabulary or 0, (2, 40))
        new_weights, _ = transform(weights, None, source, target)
        before, after = (logits(config, w, tokens_BT) for config, w in ((source, weights), (target, new_weights)))
        assert_close(after, before, "logits after the transform")

    def test_config_round_trip(self, case: dict[str, Any]) -> None:
        config = self.transform.Config.parse(case.get("config", {}))
        assert type(config).parse(config.plain()) == config


def variant_models() -> list[Any]:
    """Fields of a model of every registered mixer, feed-forward, embedding and residual, in every case of its
    conformance suite."""
    places: tuple[tuple[Any, str, str], ...] = (
        (mixers, "pattern", "mixers"),
        (feedforwards, "feedforward", "feedforwards"),
    )
    models = [
        pytest.param({pattern: name, settings: {name: case} if case else {}}, id=f"{name}-{number}")
        for registry, pattern, settings in places
        for name in registry
        for number, case in enumerate(registry[name].conformance_cases)
    ]
    wholes: tuple[tuple[Any, str], ...] = ((embeddings, "embedding"), (residuals, "residual"))
    return models + [
        pytest.param({field: {"kind": name, **case}}, id=f"{name}-{number}")
        for registry, field in wholes
        for name in registry
        for number, case in enumerate(registry[name].conformance_cases)
    ]


@torch.no_grad()
def logits(config: ModelConfig, weights: dict[str, Tensor], tokens_BT: Tensor) -> Tensor:
    """(B, T, V) of a model with these weights."""
    model = LanguageModel(config).double()
    model.load_state_dict(weights)
    return model.logits(model(tokens_BT))
