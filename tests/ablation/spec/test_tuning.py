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
