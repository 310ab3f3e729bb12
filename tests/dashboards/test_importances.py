"""Importances of fields with and without influence."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from workbench.dashboards.panels import importances
from workbench.dashboards.panels.importances import importance_table

TRIALS = 40


def table(weights: dict[str, float], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Importances where the value is a weighted sum of (field − ½)² and noise of sd 1."""
    random = np.random.default_rng(seed)
    settings = [{name: float(random.random()) for name in weights} for _ in range(TRIALS)]
    values = [
        sum(w * (setting[name] - 0.5) ** 2 for name, w in weights.items()) + random.normal() for setting in settings
    ]
    frame = pl.DataFrame(
        {
            "arm": "full",
            "stage": "tuning",
            "status": "done",
            "hyperparameters": [json.dumps(setting) for setting in settings],
            "selection_value": values,
        }
    )
    run: Any = SimpleNamespace(arms=["full"], runs=lambda: frame)
    return {row["hyperparameter"]: row for row in importance_table(run).iter_rows(named=True)}


@pytest.mark.parametrize("seed", range(3))
def test_the_only_field_is_not_everything_if_it_is_noise(seed: int) -> None:
    row = table({"rate": 0.0}, seed)["rate"]
    assert row["importance"] <= row["null_high"]
    assert row["p"] > 0.05


def test_a_field_with_influence_exceeds_its_permutations() -> None:
    rows = table({"rate": 60.0, "decay": 0.0})
    assert rows["rate"]["importance"] > rows["rate"]["null_high"]
    assert rows["rate"]["p"] < 0.05
    assert rows["decay"]["importance"] <= rows["decay"]["null_high"]


def test_the_same_trials_are_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = table({"rate": 60.0}, seed=7)
    monkeypatch.setattr(importances, "_importances", lambda *_: pytest.fail("analysed again"))
    assert table({"rate": 60.0}, seed=7) == first
