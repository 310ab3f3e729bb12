"""Muon: its orthogonal factor against fp64 singular vectors, which matrices take its step, its published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_run, run_fields
from ranks import on_ranks
from torch import Tensor, nn

from workbench.contract import ParameterRole, Role
from workbench.model import LanguageModel, ModelConfig
from workbench.optimisers import ParameterGroup, optimisers, parameter_groups
from workbench.optimisers.muon import QUINTIC, orthogonalise, scale_factor
from workbench.training.checkpoint import load_weights
from workbench.training.trial import train


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polynomial(singular_values: Tensor, iterations: int = 5) -> Tensor:
    """What the iterations make of singular values in exact arithmetic."""
    a, b, c = QUINTIC
    for _ in range(iterations):
        singular_values = a * singular_values + b * singular_values**3 + c * singular_values**5
    return singular_values


def stepped(
    parameter: Tensor, gradients: list[Tensor], role: ParameterRole | None = None, rate: float = 1.0, **config: Any
) -> Tensor:
    """The change of a parameter after steps with these gradients, without weight decay."""
    weight = nn.Parameter(parameter.clone())
    roles = {"w": role or ParameterRole.of(Role.HIDDEN)}
    group = ParameterGroup(lr=rate, weight_decay=0.0, parameters={"w": weight}, roles=roles)
    muon = optimisers["muon"]
    optimiser = muon(muon.Config(**config)).build([group])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
    return weight.detach() - parameter


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_iterations_act_on_singular_values_alone(shape: tuple[int, int]) -> None:
    matrix = normal(*shape).double()
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    exact = U @ torch.diag(polynomial(S / S.norm())) @ Vh
    torch.testing.assert_close(orthogonalise(matrix[None], precision="fp32")[0], exact, rtol=0, atol=1e-9)


def test_singular_values_end_near_one() -> None:
    matrices = normal(8, 32, 64)
    values = torch.linalg.svdvals(orthogonalise(matrices, precision="fp32"))
    assert float(values.min()) > 0.65
    assert float(values.max()) < 1.25


def test_the_result_is_near_the_polar_factor() -> None:
    matrix = normal(32, 64).double()
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix[None], precision="fp32")[0]
    cosine = (result * (U @ Vh)).sum() / (result.norm() * (U @ Vh).norm())
    assert cosine > 0.98


def test_bf16_iterations_keep_the_direction() -> None:
    matrices = normal(4, 64, 48)
    low, high = (orthogonalise(matrices, precision=precision) for precision in ("bf16", "fp32"))
    cosines = torch.cosine_similarity(low.flatten(1), high.flatten(1))
    assert low.dtype == torch.float32 and cosines.min() > 0.999


def test_zero_matrices_stay_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


@pytest.mark.parametrize("size", [1e-18, 1e-24, 1e-38])
def test_matrices_whose_squares_vanish_have_no_larger_update(size: float) -> None:
    result = orthogonalise(normal(1, 16, 16) * size)
    assert result.isfinite().all() and torch.linalg.matrix_norm(result, 2) < 1.3


def test_the_size_of_a_gradient_does_not_matter() -> None:
    matrix = normal(1, 16, 16)
    assert torch.equal(orthogonalise(matrix), orthogonalise(matrix * 2.0**-40))


def test_published_scales() -> None:
    assert scale_factor(400, 100, "match_rms") == pytest.approx(0.2 * 20)
    assert scale_factor(400, 100, "original") == pytest.approx(2.0)
    assert scale_factor(100, 400, "original") == 1.0
    assert scale_factor(100, 400, "spectral") == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_updates_have_the_published_root_mean_square(shape: tuple[int, int]) -> None:
    change = stepped(torch.zeros(shape), [normal(*shape)])
    assert float(change.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_nesterov_looks_one_step_ahead() -> None:
    first, second = normal(8, 8), normal(8, 8, seed=1)
    change = stepped(torch.zeros(8, 8), [first, second], precision="fp32", momentum=0.5)
    ahead = orthogonalise((second + 0.5 * (second + 0.5 * first))[None], precision="fp32")[0]
    before = orthogonalise((first + 0.5 * first)[None], precision="fp32")[0]
    torch.testing.assert_close(change, -(before + ahead) * scale_factor(8, 8, "match_rms"))


def test_experts_are_orthogonalised_one_by_one() -> None:
    role = ParameterRole(Role.EXPERT, fan_in=-2, fan_out=-1)
    gradients = normal(3, 8, 6)
    together = stepped(torch.zeros(3, 8, 6), [gradients], role, precision="fp32")
    for expert, gradient in enumerate(gradients):
        alone = stepped(torch.zeros(6, 8), [gradient.T], precision="fp32").T
        torch.testing.assert_close(together[expert], alone)


def test_an_expert_without_tokens_stays() -> None:
    role = ParameterRole(Role.EXPERT, fan_in=-2, fan_out=-1)
    later = normal(2, 8, 6, seed=1)
    later[1] = 0.0
    once = stepped(torch.zeros(2, 8, 6), [normal(2, 8, 6)], role)
    twice = stepped(torch.zeros(2, 8, 6), [normal(2, 8, 6), later], role)
    assert torch.equal(once[1], twice[1]) and not torch.equal(once[0], twice[0])


@pytest.mark.parametrize(
    ("split", "sizes"), [("none", [12]), ("parts", [8, 4]), ("heads", [2, 2, 2, 2, 4])], ids=["none", "parts", "heads"]
)
def test_stacked_projections_are_split(split: str, sizes: list[int]) -> None:
    role = ParameterRole(Role.HIDDEN, parts=((4, 2), (1, 4)))
    gradient = normal(12, 6)
    together = stepped(torch.zeros(12, 6), [gradient], role, split=split, precision="fp32")
    alone = [stepped(torch.zeros(len(part), 6), [part], precision="fp32") for part in gradient.split(sizes)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("pattern", ["full", "gdn", "mla", "nsa", "moba", "kda"])
@pytest.mark.parametrize("feedforward", ["swiglu", "moe"])
def test_declared_parts_add_up(pattern: str, feedforward: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(width=64, depth=1, pattern=pattern, feedforward=feedforward))
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, lr_factors={})
    parted = [
        (role, group.parameters[name].shape) for group in groups for name, role in group.roles.items() if role.parts
    ]
    assert parted
    for role, shape in parted:
        assert sum(count * channels for count, channels in role.parts) == shape[role.fan_out]


def test_embeddings_heads_routers_and_vectors_are_left_to_adamw() -> None:
    model = LanguageModel(ModelConfig(width=64, depth=1, tied=False, feedforward="moe"), seed=0)
    muon = optimisers["muon"]
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, lr_factors={})
    optimiser = muon(muon.Config(adamw_rate=0.1)).build(groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    adamw = {names[p] for group in optimiser.param_groups if "layouts" not in group for p in group["params"]}
    assert {"embedding.weight", "head.weight", "norm.weight", "blocks.0.feedforward.router.weight"} <= adamw
    assert "blocks.0.mixer.qkv.weight" not in adamw and "blocks.0.feedforward.up" not in adamw
    rates = {group["lr"] for group in optimiser.param_groups if "layouts" not in group}
    assert rates == {0.1}


def test_adamw_parameters_move_as_under_adamw() -> None:
    results = []
    for kind in ("adamw", "muon"):
        role = ParameterRole.of(Role.EMBEDDING)
        weight = nn.Parameter(normal(5, 4))
        group = ParameterGroup(lr=0.1, weight_decay=0.2, parameters={"w": weight}, roles={"w": role})
        optimiser = optimisers[kind](optimisers[kind].Config()).build([group])
        for seed in range(3):
            weight.grad = normal(5, 4, seed=seed)
            optimiser.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


FIELDS: dict[str, Any] = {
    "model": {"width": 32, "depth": 2, "pattern": "full gdn", "feedforward": "swiglu moe"},
    "training": {
        "tokens": 8 * 4 * 32,
        "batch_size": 4,
        "context": 32,
        "evaluations": 1,
        "optimiser": {"kind": "muon", "precision": "fp32"},
        "guards": [{"kind": "ratio", "factor": 100.0}],
    },
}


def _trained(corpus: Any, path: Any, devices: int) -> None:
    make_run(path / "run", path / "cache", run_fields(corpus, **FIELDS))
    if devices == 1:
        train(path / "run", path / "cache")
    else:
        on_ranks(devices, train, path / "run", path / "cache", _never, devices)


def _never() -> bool:
    return False


@pytest.mark.process
def test_two_ranks_train_as_one(tmp_path: Any) -> None:
    from helpers import write_corpus

    corpus = write_corpus(tmp_path / "corpus")
    weights = []
    for devices in (1, 2):
        _trained(corpus, tmp_path / str(devices), devices)
        weights.append(load_weights(tmp_path / str(devices) / "run" / "checkpoint" / "step-8"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-4, msg=lambda text, name=name: name + text)
