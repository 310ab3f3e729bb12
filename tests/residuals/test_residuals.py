"""Residuals against their equations, token by token in fp64, and in models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from workbench.ablation.cost.memory import activation_bytes
from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Residual, ResidualConfig, residuals
from workbench.model import LanguageModel, ModelConfig
from workbench.model.language_model import LanguageModel as Model
from workbench.residuals.hyper_connections import sinkhorn
from workbench.testing import check
from workbench.testing.residuals import Chain
from workbench.training.config import RunConfig
from workbench.training.layer_monitors import watching

WIDTH, DEPTH = 16, 3
FIELDS: dict[str, Any] = {"width": 32, "depth": 2, "vocabulary": 100, "mixers": {"full": {"head_dim": 16}}}


def chain(kind: str, **fields: Any) -> Chain:
    """In fp64, with random parameters."""
    cls = residuals[kind]
    module = Chain(cls, cls.Config.parse(fields).resolved(WIDTH, DEPTH), WIDTH, DEPTH).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def model(**fields: Any) -> Model:
    return LanguageModel(ModelConfig.parse({**FIELDS, **fields}), seed=0).double()


def assert_computes(module: Chain, x_D: Tensor, expected_D: Tensor) -> None:
    torch.testing.assert_close(module(x_D[None, None])[0, 0], expected_D, rtol=1e-10, atol=1e-12)


def test_the_plain_residual_is_a_sum() -> None:
    module, x = chain("plain"), torch.randn(WIDTH).double()
    stream = x
    for number in range(2 * DEPTH):
        stream = stream + module.branch(number, stream)
    assert_computes(module, x, stream)


def test_scalars_weight_stream_and_embedding_once_per_block() -> None:
    module, x = chain("scalars"), torch.randn(WIDTH).double()
    stream = x
    for number in range(2 * DEPTH):
        if number % 2 == 0:
            of_stream, of_embedding = module.residuals[number].scalars
            stream = of_stream * stream + of_embedding * x
        stream = stream + module.branch(number, stream)
    assert_computes(module, x, stream)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_attention_residuals_are_a_softmax_over_outputs(block: int) -> None:
    module, x = chain("attention", block=block), torch.randn(WIDTH).double()

    def read(reader: Any, sources: list[Tensor]) -> Tensor:
        scores = [reader.query[0] @ (reader.gain * v / (v.square().mean() + 1e-6).sqrt()) for v in sources]
        return sum(w * v for w, v in zip(torch.stack(scores).softmax(0), sources))  # type: ignore[return-value]

    outputs: list[Tensor] = []

    def sources() -> list[Tensor]:
        sums = [sum(outputs[first : first + block]) for first in range(0, len(outputs), block)]
        return [x, *sums]  # type: ignore[list-item]

    for number, residual in enumerate(module.residuals):
        outputs.append(module.branch(number, read(residual.reader, sources())))
    assert_computes(module, x, read(module.exit, sources()))


def test_hyper_connections_mix_streams_by_doubly_stochastic_matrices() -> None:
    n = 3
    module, x = chain("hyper_connections", streams=n, iterations=7), torch.randn(WIDTH).double()
    streams = torch.stack([x] * n)
    for number, residual in enumerate(module.residuals):
        flat = streams.flatten()
        normed = flat / (flat.square().mean() + 1e-6).sqrt()
        scores = torch.stack([row.flatten() @ normed for row in residual.weight])
        a, b = residual.factors, residual.bias
        read = torch.sigmoid(a[0] * scores[:n] + b[:n])
        write = 2 * torch.sigmoid(a[1] * scores[n : 2 * n] + b[n : 2 * n])
        mix = (a[2] * scores[2 * n :] + b[2 * n :]).view(n, n).exp()
        for _ in range(7):
            mix = mix / mix.sum(0, keepdim=True)
            mix = mix / mix.sum(1, keepdim=True)
        streams = mix @ streams + torch.outer(write, module.branch(number, read @ streams))
    assert_computes(module, x, streams.mean(0))


def test_sinkhorn_converges_to_doubly_stochastic_matrices() -> None:
    matrix = sinkhorn(torch.randn(5, 4, 4).double(), 200)
    for axis in (-1, -2):
        torch.testing.assert_close(matrix.sum(axis), torch.ones(5, 4).double())


def test_sinkhorn_is_finite_where_a_row_or_column_underflows() -> None:
    for axis in (0, 1):
        logarithms = torch.zeros(4, 4)
        logarithms.select(axis, 2).fill_(-300.0)
        logarithms.requires_grad_()
        mixed = sinkhorn(logarithms, 20)
        (gradient,) = torch.autograd.grad((mixed * torch.randn(4, 4)).sum(), logarithms)
        assert mixed.isfinite().all() and gradient.isfinite().all()


def test_hyper_connections_start_close_to_the_plain_residual() -> None:
    ids = torch.randint(100, (2, 9))
    plain, streams = model()(ids), model(residual="hyper_connections")(ids)
    assert (plain - streams).norm() < 0.05 * plain.norm()


def test_attention_residuals_start_as_means() -> None:
    start, x = LanguageModel(ModelConfig.parse({**FIELDS, "residual": "attention"}), seed=0).double(), None
    reader = start.blocks[1].get_submodule("feedforward_residual.reader")
    sources = [torch.randn(1, 2, 32).double() for _ in range(4)]
    x = reader(sources)
    torch.testing.assert_close(x, sum(sources) / 4)


@pytest.mark.parametrize("kind", sorted(residuals))
def test_the_embedding_starts_the_same_with_every_residual(kind: str) -> None:
    """Parameters keep their names and initial values, so that arms start alike."""
    plain, other = model().state_dict(), model(residual=kind).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("kind", sorted(residuals))
def test_monitors_see_a_stream_of_the_models_width(kind: str) -> None:
    watched, seen = model(residual=kind, mixers={"full": {"head_dim": 16}}), {}
    with watching(watched, seen.__setitem__):
        watched.loss(torch.randint(100, (2, 9)), torch.randint(100, (2, 9)), objective_aux=AuxOutputs())
    assert sorted(seen) == [0, 1]
    for values in seen.values():
        assert {"activation_rms", "attention_score_max"} <= values.keys()


@pytest.mark.parametrize("kind", sorted(residuals))
def test_activation_memory_is_estimated(kind: str) -> None:
    run = RunConfig.parse({"model": {**FIELDS, "depth": 4, "residual": kind}, "training": {"context": 16}})
    plain = run.changed(model=run.model.changed(residual={"kind": "plain"}))
    assert activation_bytes(run) >= activation_bytes(plain) > 0


def test_a_model_with_the_plain_residual_keeps_its_identity() -> None:
    given = ModelConfig.parse({**FIELDS, "residual": {"kind": "plain"}})
    assert given.identity == ModelConfig.parse(FIELDS).identity
    assert "residual" not in given.canonical()
    assert ModelConfig.parse({**FIELDS, "residual": "scalars"}).identity != given.identity


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"residual": "plian"}, "residual.kind", "'plain'"),
        ({"residual": {"kind": "hyper_connections", "streams": 1}}, "residual.streams", "2"),
        ({"residual": "scalars", "shortcut": "swiglu"}, "shortcut", "the plain residual"),
    ],
)
def test_residuals_that_cannot_be_built(fields: dict[str, Any], path: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        ModelConfig.parse({**FIELDS, **fields})
    assert error.value.problems[0].path == path


def test_a_residual_of_another_package_is_one_class() -> None:
    """Registered, it passes the conformance suite and is named by a model."""

    @residuals.register
    class Halved(Residual):
        """x / 2 + branch(x): a throw-away residual."""

        class Config(ResidualConfig):
            """Half of the stream."""

            kind: Literal["halved"] = "halved"

        def __init__(self, config: Any, width: int, number: int):
            super().__init__()

        def forward(self, state: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
            return state / 2 + branch(state)

    try:
        assert check("halved") == {}
        ids = torch.randint(100, (2, 9))
        assert not torch.equal(model(residual="halved")(ids), model()(ids))
    finally:
        residuals.unregister("halved")
