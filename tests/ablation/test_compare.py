"""Order over scales, and scaling laws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from workbench.ablation.compare import compare, fit_scaling_law, rank_stability
from workbench.ablation.verdict import ArmMeasurements, judge
from workbench.config import ConfigError
from workbench.metric import BITS_PER_BYTE


def test_the_law_is_found_again_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(0)
    places = {x: list((0.6 + 40 * x**-0.25) * np.exp(0.002 * rng.normal(size=8))) for x in np.geomspace(1e4, 1e8, 6)}
    law = fit_scaling_law(places, replicates=100)
    assert law.exponent == pytest.approx(0.25, rel=0.1) and law.floor == pytest.approx(0.6, rel=0.1)
    assert law.exponent_low < 0.25 < law.exponent_high
    value, low, high = law.at(1e9)
    assert low < 0.6 + 40 * 1e9**-0.25 < high and low < value < high
    plain = fit_scaling_law({10.0: [1.0, 1.02], 1000.0: [0.1, 0.102]})
    assert plain.floor == 0 and plain.exponent == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="two positive x"):
        fit_scaling_law({1.0: [1.0]})


def test_order_that_holds_and_order_that_does_not() -> None:
    def table(*verdicts: str) -> pl.DataFrame:
        values = {"better": 0.9, "worse": 1.1, "undecided": 0.999}
        rows = [row for i, word in enumerate(verdicts) for row in (
            {"ablation": f"size{i}", "arm": "full", "value": 1.0, "verdict": "baseline"},
            {"ablation": f"size{i}", "arm": "gdn", "value": values[word], "verdict": word})]  # fmt: skip
        return pl.DataFrame(rows)

    assert "order of all arms is the same" in rank_stability(table("better", "better"))[0]
    assert "order depends on scale: gdn" in rank_stability(table("better", "worse"))[0]
    assert "no difference that both show" in rank_stability(table("undecided", "worse"))[0]
    assert len(rank_stability(table("better", "better", "worse"))) == 3


def finished(name: str, flops: float, gap: float) -> Any:
    rng = np.random.default_rng(int(flops))
    sizes = np.array([100, 300])
    values = {
        arm: 1 + 5 * flops**-0.2 + shift + 0.001 * rng.normal(size=4) for arm, shift in (("full", 0.0), ("gdn", gap))
    }
    arms = [ArmMeasurements(arm, {s: v * sizes for s, v in enumerate(held)}, sizes) for arm, held in values.items()]
    rows = [
        {"arm": arm, "stage": "confirmation", "status": "done", "report_value": v}
        for arm, held in values.items()
        for v in held
    ]
    return SimpleNamespace(
        name=name, metric=BITS_PER_BYTE, verdict=lambda: judge(arms[0], arms[1:], seeds=range(4), replicates=50),
        runs=lambda: pl.DataFrame(rows), cost=lambda: pl.DataFrame({"arm": ["full", "gdn"], "training_flops": [flops, 1.1 * flops]}),
    )  # fmt: skip


def test_ablations_side_by_side() -> None:
    found = compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)], at=1e8)
    assert found.table["ablation"].to_list() == ["small", "small", "large", "large"]
    text = str(found)
    assert "order depends on scale: gdn" in text and "flops^−" in text and "at 1e+08" in text
    with pytest.raises(ConfigError, match="at least two"):
        compare([finished("one", 1e4, 0.0)])
    with pytest.raises(ConfigError, match="flops or parameters or tokens"):
        compare([], "seconds")
