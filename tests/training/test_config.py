"""The configuration of a run: errors name the field, and the identity covers what changes a run."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.config import ConfigError
from workbench.seeding import COMPONENTS
from workbench.training.config import RunConfig


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tokens": 10}, "training.tokens"),
        ({"warmup": 0.9, "decay": 0.9}, "training.decay"),
        ({"learning_rate": -1}, "training.learning_rate"),
        ({"schedule": "linear"}, "training.schedule"),
        ({"lerning_rate": 1e-3}, "training.lerning_rate"),
        ({"optimiser": "adamv"}, "training.optimiser.kind"),
        ({"optimiser": {"epsilon": -1.0}}, "training.optimiser.epsilon"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "training.optimiser.betas[1]"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig.parse({"training": fields})
    assert raised.value.problems[0].path == path


def test_the_identity_of_the_defaults_is_stable() -> None:
    assert RunConfig().identity == "f7e9246ae0d2"


@pytest.mark.parametrize("fields", [{"deterministic": True}, {"keep_trunk": True}, {"optimiser": {"epsilon": 1e-15}}])
def test_settings_that_change_a_run_change_its_identity(fields: dict[str, Any]) -> None:
    assert RunConfig.parse({"training": fields}).identity != RunConfig().identity


@pytest.mark.parametrize("seed", [2**63, -1])
@pytest.mark.parametrize("path", ["seed", "seeds.init", "data.seed"])
def test_seeds_outside_63_bits_are_refused(path: str, seed: int) -> None:
    fields = {"data": {"kind": "mqar"}, "model": {"vocabulary": 64}}
    outer, _, inner = path.partition(".")
    fields[outer] = {**fields.get(outer, {}), inner: seed} if inner else seed  # type: ignore[assignment]
    with pytest.raises(ConfigError) as raised:
        RunConfig.parse(fields)
    assert path in [problem.path for problem in raised.value.problems]


def test_one_seed_drives_every_component_by_default() -> None:
    config = RunConfig(seed=7)
    assert [config.seed_of(component) for component in COMPONENTS] == [7, 7, 7]


def test_a_component_seed_equal_to_the_seed_is_the_same_run() -> None:
    assert RunConfig.parse({"seed": 7, "seeds": {"order": 7}}).identity == RunConfig(seed=7).identity


def test_the_identity_depends_on_the_seeds_of_components_alone() -> None:
    seeds = {"init": 1, "order": 2, "other": 3}
    first, second = (RunConfig.parse({"seed": seed, "seeds": seeds}).identity for seed in (0, 9))
    assert first == second != RunConfig.parse({"seeds": {**seeds, "order": 4}}).identity


def test_an_optimiser_without_a_kind_is_adamw() -> None:
    fields = {"training": {"optimiser": {"epsilon": 1e-15}}}
    assert RunConfig.parse(fields).training.optimiser.kind == "adamw"


def test_counts_beyond_63_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.tokens"):
        RunConfig.parse({"training": {"tokens": 2**63}})


def test_an_optimiser_without_rules_in_the_parametrisation_is_refused_before_the_run() -> None:
    model = {"tied": False, "parametrisation": {"kind": "full_align", "base": {"width": 32}}}
    with pytest.raises(ConfigError, match=r"model.parametrisation.kind: got .*full_align.*as large as the gradient"):
        RunConfig.parse({"model": model, "training": {"optimiser": "sgd"}})


@pytest.mark.parametrize("buckets", [[64, 32, 128], [32, 64], [32, 256]])
def test_buckets_rise_to_the_context(buckets: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"training.buckets: got .* the last of them context=128"):
        RunConfig.parse({"training": {"context": 128, "buckets": buckets}})


def test_rows_of_equal_length_change_no_identity() -> None:
    assert RunConfig().identity == RunConfig.parse({"training": {"buckets": [], "ranks": "sharded"}}).identity
    assert "buckets" not in RunConfig().canonical()["training"]
