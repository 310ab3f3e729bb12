"""benchmarks/decoding_selection.py, reduced: orders that hold on any distribution of its kind."""

from __future__ import annotations

import decoding_selection
import pytest
import torch


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"CACHED": 1024, "STEPS": 10, "KEPT": 96, "SEARCHED": 256}
    for name, size in sizes.items():
        monkeypatch.setattr(decoding_selection, name, size)
    small = {"tokens": 96, "candidates": 256, "sink": 4, "local": 8, "block": 32}
    policies = {
        name: {**fields, **{key: small[key] for key in small if key in fields or key in ("sink", "local")}}
        for name, fields in decoding_selection.POLICIES.items()
        if not name.startswith("streaming")
    }
    monkeypatch.setattr(decoding_selection, "POLICIES", policies)


def mass(policy: str, correlation: str) -> float:
    with torch.inference_mode():
        return decoding_selection.cell(policy, correlation, 2)["mass"]


def test_a_lag_costs_less_where_queries_change_slowly() -> None:
    costs = [
        mass("two_level, mean, synchronous", correlation) - mass("two_level, mean, lagged", correlation)
        for correlation in ("0", "0.99")
    ]
    assert costs[0] > 4 * abs(costs[1])


def test_tokens_of_any_block_cover_most() -> None:
    every = mass("double_sparsity, exact", "0.9")
    assert every >= mass("double_sparsity", "0.9") > mass("two_level, minmax, synchronous", "0.9")


def test_tokens_inside_blocks_cover_more_than_whole_blocks() -> None:
    assert mass("two_level, minmax, synchronous", "0.9") > mass("quest, minmax", "0.9")
