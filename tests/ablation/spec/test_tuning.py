"""The search as declared: what cannot be searched, and settings that contradict one another."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.ablation.spec.tuning import Tuning
from workbench.config import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"seed": {"values": [1, 2]}}}, "never a hyper-parameter"),
        ({"space": {"data.seed": {"values": [1, 2]}}}, "never a hyper-parameter"),
        ({"space": {"training.tokens": {"values": [10_000, 20_000]}}}, "equal tokens"),
        ({"warm_start": ["x"]}, r"warm_start: got \['x'\]; expected nothing: random"),
        ({"sampler": "grid", "enqueue": [{}]}, "a grid is its points"),
        ({"sampler": "nsga2"}, "sampler: got 'nsga2'"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tuning.parse(fields)


def test_shared_trials_cover_the_enqueued_ones() -> None:
    assert Tuning(trials=9, enqueue=({},) * 7).num_shared == 7


def test_no_more_trials_are_shared_than_there_are() -> None:
    assert Tuning(trials=2).num_shared == 2


# -- fields without effect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.evaluation_bytes", "data.corpus.limit_bytes"])
@pytest.mark.parametrize("place", ["space", "enqueue"])
def test_prepared_data_are_not_tuned(name: str, place: str) -> None:
    fields = {"space": {name: {"values": [64, 512]}}} if place == "space" else {"enqueue": [{name: 64}]}
    with pytest.raises(ConfigError, match="Data are prepared once, at launch"):
        Tuning.parse(fields)


@pytest.mark.parametrize("name", ["training.log_every", "training.recompute", "training.batch_plan.kind", "evaluation"])
def test_fields_without_effect_on_the_model_are_not_tuned(name: str) -> None:
    with pytest.raises(ConfigError, match="expected fields that change the trained model"):
        Tuning.parse({"space": {name: {"values": [1, 2]}}})


# -- policies and repeats ----------------------------------------------------------------------------------------------


def test_trials_are_equal_or_in_proportion_to_tuned_fields() -> None:
    assert [Tuning(trials=4).num_trials(fields) for fields in (1, 3)] == [4, 4]
    assert [Tuning(trials=4, policy="per_dimension").num_trials(fields) for fields in (1, 3)] == [4, 12]


def test_repeats_are_settings_times_seeds() -> None:
    tuning = Tuning.parse({"trials": 8, "repeats": {"settings": 3, "seeds": [1, 2]}})
    assert (tuning.num_repeats, tuning.seeds) == (6, (1000, 1, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeats": {"seeds": [1, 1]}}, "all different"),
        ({"repeats": {"seeds": [1000]}}, "other seeds than tuning.seed"),
        ({"trials": 2, "repeats": {"settings": 3}}, "at most the 2 trials"),
        ({"trials": 2, "interpolate": True}, "at least 3 to fit a parabola"),
        ({"sampler": "grid", "policy": "per_dimension"}, "a grid has the points that its ranges list"),
    ],
)
def test_contradicting_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tuning.parse(fields)


def test_the_search_is_described() -> None:
    tuning = Tuning.parse({"trials": 8, "repeats": {"settings": 2, "seeds": [1, 2]}, "interpolate": True})
    assert tuning.describe() == (
        "8 trials per arm (random, seed 1000); the best 2 repeated on seeds 1, 2, the best mean chosen; "
        "confirmed at the fitted optimum between trials"
    )
