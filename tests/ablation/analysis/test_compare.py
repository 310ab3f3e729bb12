"""Order over scales, and scaling laws."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from workbench.ablation.analysis.compare import compare, rank_stability
from workbench.ablation.analysis.scaling import fit_scaling_law
from workbench.ablation.verdict.judge import ArmMeasurements, judge
from workbench.config import ConfigError
from workbench.metric import BITS_PER_BYTE


def test_the_law_is_found_again_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(0)
    places = {x: list((0.6 + 40 * x**-0.25) * np.exp(0.002 * rng.normal(size=8))) for x in np.geomspace(1e4, 1e8, 6)}
    law = fit_scaling_law(places, replicates=100)
    assert law.exponent == pytest.approx(0.25, rel=0.1) and law.floor == pytest.approx(0.6, rel=0.1)
    assert law.exponent_low is not None and law.exponent_high is not None
    assert law.exponent_low < 0.25 < law.exponent_high
    value, low, high = law.at(1e9)
    assert low is not None and high is not None
    assert low < 0.6 + 40 * 1e9**-0.25 < high and low < value < high
    plain = fit_scaling_law({10.0: [1.0, 1.02], 1000.0: [0.1, 0.102]})
    assert plain.floor == 0 and plain.exponent == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="two positive x"):
        fit_scaling_law({1.0: [1.0]})


def test_order_that_holds_and_order_that_does_not() -> None:
    def table(*verdicts: str) -> pl.DataFrame:
        values = {"better": 0.9, "worse": 1.1, "undecided": 0.999}
        rows = [
            row
            for i, word in enumerate(verdicts)
            for row in (
                {"ablation": f"size{i}", "arm": "full", "value": 1.0, "verdict": "baseline"},
                {"ablation": f"size{i}", "arm": "gdn", "value": values[word], "verdict": word},
            )
        ]
        return pl.DataFrame(rows)

    assert "order of all arms is the same" in rank_stability(table("better", "better"))[0]
    assert "order depends on scale: gdn" in rank_stability(table("better", "worse"))[0]
    assert "no difference that both show" in rank_stability(table("undecided", "worse"))[0]
    assert len(rank_stability(table("better", "better", "worse"))) == 3


def finished(name: str, flops: float, gap: float, baseline: str = "full", solved: bool = False) -> Any:
    rng = np.random.default_rng(int(flops))
    sizes = np.array([100, 300])
    values = {
        arm: 1 + 5 * flops**-0.2 + shift + 0.001 * rng.normal(size=4) for arm, shift in (("full", 0.0), ("gdn", gap))
    }
    if solved:
        values["gdn"][0] = 0.0
    arms = [ArmMeasurements(arm, {s: v * sizes for s, v in enumerate(held)}, sizes) for arm, held in values.items()]
    rows = [
        {"arm": arm, "stage": "confirmation", "status": "done", "report_value": v}
        for arm, held in values.items()
        for v in held
    ]
    return SimpleNamespace(
        name=name,
        folder=f"results/{flops:g}/{name}",
        baseline=baseline,
        metric=BITS_PER_BYTE,
        verdict=lambda: judge(arms[0], arms[1:], seeds=range(4), replicates=50),
        runs=lambda: pl.DataFrame(rows),
        cost=lambda: pl.DataFrame({"arm": ["full", "gdn"], "training_flops": [flops, 1.1 * flops]}),
    )


def test_ablations_side_by_side() -> None:
    found = compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)], at=1e8)
    assert found.table["ablation"].to_list() == ["small", "small", "large", "large"]
    text = str(found)
    assert "order depends on scale: gdn" in text and "flops^−" in text and "extrapolated to 1e+08" in text
    with pytest.raises(ConfigError, match="at least two"):
        compare([finished("one", 1e4, 0.0)])
    with pytest.raises(ConfigError, match="flops or parameters or tokens"):
        compare([], "seconds")


def test_one_seed_has_no_interval_and_noise_makes_no_loss_negative() -> None:
    law = fit_scaling_law({10.0: [1.0], 1000.0: [0.1, 0.102]})
    assert law.exponent_low is None and law.exponent_high is None and law.at(1e4)[1:] == (None, None)
    noisy = fit_scaling_law({10.0: [1.0, 0.001], 1000.0: [0.5, 0.0001]}, replicates=50)
    assert np.isfinite(noisy.replicates).all() and noisy.exponent_low is not None
    single = compare([finished("a", 1e4, 0.0), finished("b", 1e6, 0.0)])
    one = fit_scaling_law({1e4: [1.8], 1e6: [1.3]})
    assert "no interval because a point has one seed" in str(replace(single, laws={"full": one}, at=1e8))


def test_what_has_no_law_is_a_note_for_its_arm() -> None:
    found = compare([finished("small", 1e4, 0.0, solved=True), finished("large", 1e6, 0.0)])
    assert set(found.laws) == {"full"} and "gdn: no law" in str(found)


def test_ablations_of_one_name_are_two_and_of_two_baselines_none() -> None:
    found = compare([finished("same", 1e4, 0.02), finished("same", 1e6, -0.02)])
    assert found.table["ablation"].n_unique() == 2 and "order depends on scale: gdn" in str(found)
    with pytest.raises(ConfigError, match=r"ablations against full, gdn'; expected one baseline"):
        compare([finished("small", 1e4, 0.0), finished("large", 1e6, 0.0, baseline="gdn")])
