"""Roles and exact rescalings: complete for every component; weight decay as ever."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import nn

from workbench.contract import Role, feedforwards, mixers, residuals
from workbench.layers import Rotary
from workbench.mixers.families.softmax import channel_scales
from workbench.model import LanguageModel, ModelConfig, parameter_roles, rescaling_pairs
from workbench.training.config import TrainingConfig
from workbench.training.optimiser import groups_of

WITHOUT_DECAY = (
    "embedding.weight",
    "embedding.tables",
    "*.pool_?.position",
    "*.pool_?.mix",
    "*.project.norm.weight",
    "*.project.q_norm.weight",
    "*.mixer.vectors",
    "*.mixer.?_bias",
    "*.mixer.?_share",
    "*.mixer.level_scale",
    "*.mixer.norm.*",
    "*.reader.query",
    "residual_exit.query",
)
"""Parameters of two and more axes that do not decay."""
BASE: dict[str, Any] = {"width": 64, "depth": 2, "vocabulary": 300}
CASES: dict[str, dict[str, Any]] = {
    "token": {"embedding": {"kind": "token", "amplify": "norm"}, "tied": False},
    "ngram": {"embedding": "ngram", "mtp": {}},
    **{
        f"{name} {number}": {"pattern": name, "mixers": {name: case}}
        for name in mixers
        for number, case in enumerate(mixers[name].conformance_cases)
    },
    **{f"residual {name}": {"residual": name} for name in residuals},
    **{
        f"{name} {number}": {"feedforward": name, "feedforwards": {name: case}}
        for name in feedforwards
        for number, case in enumerate(feedforwards[name].conformance_cases)
    },
}


def build(name: str) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(ModelConfig.parse({**BASE, **CASES[name]}))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_role(case: str) -> None:
    model = build(case)
    assert list(parameter_roles(model)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("case", CASES)
def test_axes_exist_and_differ(case: str) -> None:
    model = build(case)
    for name, role in parameter_roles(model).items():
        axes = [axis for axis in (role.fan_out, role.fan_in) if axis is not None]
        legal = range(-model.get_parameter(name).ndim, 0)
        assert len(set(axes)) == len(axes), name
        assert all(axis in legal for axis in axes), name


@pytest.mark.parametrize("case", CASES)
def test_matrices_decay_and_all_else_does_not(case: str) -> None:
    model = build(case)
    groups = groups_of(model, TrainingConfig())
    decayed = {name for group in groups if group.weight_decay for name in group.parameters}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert decayed == {name for name in matrices if not any(fnmatch(name, pattern) for pattern in WITHOUT_DECAY)}


@pytest.mark.parametrize("case", CASES)
def test_each_sublayer_writes_the_residual_stream(case: str) -> None:
    model = build(case)
    writers = {".".join(name.split(".")[:3]) for name, role in parameter_roles(model).items() if role.writes_residual}
    assert {f"blocks.{i}.{sublayer}" for i in range(2) for sublayer in ("mixer", "feedforward")} <= writers


ROLES = [
    ("token", "embedding.weight", Role.EMBEDDING),
    ("token", "head.weight", Role.HEAD),
    ("token", "embedding.norm.weight", Role.NORM),
    ("ngram", "embedding.tables", Role.EMBEDDING),
    ("ngram", "mtp.project.weight", Role.HIDDEN),
    ("full 1", "blocks.0.mixer.sink", Role.VECTOR),
    ("mla 0", "blocks.0.mixer.project.down.weight", Role.LATENT_DOWN),
    ("mla 0", "blocks.0.mixer.project.q.weight", Role.HIDDEN),
    ("mla 1", "blocks.0.mixer.project.q.weight", Role.LATENT_UP),
    ("gdn 0", "blocks.0.mixer.A_log", Role.VECTOR),
    ("gdn 0", "blocks.0.mixer.conv.weight", Role.CONVOLUTION),
    ("nsa 0", "blocks.0.mixer.gate.bias", Role.BIAS),
    ("moe 0", "blocks.0.feedforward.router.weight", Role.ROUTER),
    ("moe 0", "blocks.0.feedforward.up", Role.EXPERT),
]


@pytest.mark.parametrize(("case", "name", "role"), ROLES)
def test_roles_by_name(case: str, name: str, role: Role) -> None:
    assert parameter_roles(build(case))[name].role == role


def test_the_axes_of_experts() -> None:
    model = build("moe 0")
    name = "blocks.0.feedforward.up"
    role = parameter_roles(model)[name]
    assert role.fan_in is not None
    assert model.get_parameter(name).shape[role.fan_in] == 64


class Undeclared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


def test_a_parameter_without_a_role_is_named() -> None:
    with pytest.raises(TypeError, match=r"0\.gain: Undeclared declares no role for 'gain'"):
        parameter_roles(nn.Sequential(Undeclared()))


class Corrected(nn.Module):
    roles = {"inner.gain": Role.NORM}

    def __init__(self) -> None:
        super().__init__()
        self.inner = Undeclared()


def test_an_outer_module_corrects_its_parts() -> None:
    assert parameter_roles(nn.Sequential(Corrected()))["0.inner.gain"].role == Role.NORM


PAIRS = [
    ("full 0", "blocks.0.mixer", ["qk", "vo"]),
    ("full 2", "blocks.0.mixer", ["vo"]),  # qk_norm
    ("mla 0", "blocks.0.mixer", ["qk", "vo", "qk_rotary"]),
    ("moba 0", "blocks.0.mixer", ["qk", "vo"]),
    ("nsa 0", "blocks.0.mixer", []),  # pooling by an MLP
    ("nsa 2", "blocks.0.mixer", ["qk", "vo"]),  # pooling by the mean
    ("asa_global 0", "blocks.0.mixer", ["qk", "vo"]),  # pooling of rotated keys by an MLP
    ("gdn 0", "blocks.0.mixer", []),
    ("moe 1", "blocks.0.feedforward", ["up_down", "up_down"]),  # routed and shared experts
    ("ngram", "embedding", ["tables_mix"]),
]


@pytest.mark.parametrize(("case", "component", "names"), PAIRS)
def test_rescaling_pairs_by_name(case: str, component: str, names: list[str]) -> None:
    assert [pair.name for path, pair in rescaling_pairs(build(case)) if path == component] == names


def test_rescaling_pairs_name_parameters_of_the_model() -> None:
    model = build("moe 1")
    names = {name for _, pair in rescaling_pairs(model) for name in (*pair.first, *pair.second)}
    assert "blocks.1.feedforward.shared.down.weight" in names
    assert names <= {name for name, _ in model.named_parameters()}


def test_channels_of_a_rotary_pair_share_a_scale() -> None:
    assert channel_scales(2, 6, Rotary(4)).tolist() == [[0, 1, 0, 1, 2, 3], [4, 5, 4, 5, 6, 7]]


def test_coarser_rescaling_gives_one_scale_to_a_group() -> None:
    pair = next(pair for _, pair in rescaling_pairs(build("full 1")) if pair.name == "qk")
    assert pair.heads.unique().tolist() == [0], "one key–value head serves all query heads"
