"""Calibration of the verdict: error rates below alpha, power as planned, arms tuned to different settings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import verdict_calibration as calibration

pytestmark = pytest.mark.process

CONTINUOUS = [name for name, noise in calibration.NOISES.items() if noise.answers is None and "tuned" not in name]
RATES = [name for name, noise in calibration.NOISES.items() if noise.answers is not None]


def drawn(noise: str, arms: int, seeds: int, effects: list[float], ablations: int = 4000) -> Any:
    """The metric of simulated ablations, (R, A, S)."""
    shape = ablations, arms + 1, seeds
    return calibration.NOISES[noise].draw(np.random.default_rng(0), shape, np.array([0.0, *effects]))


def rates(*cells: Any, ablations: int = 100) -> list[dict[str, Any]]:
    """The rates of every cell, drawn once."""
    return [row["rates"] for row in calibration.calibrate_grid(ablations, refined=0, grid=cells)]


def pool(seeds: int, fault: float) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for setting, shift in (("right", 0.0), ("fault", fault)):
        noise = np.random.default_rng(1).normal(size=seeds) + 0.3 * rng.normal(size=seeds)
        for seed in range(seeds):
            for document, size in enumerate((400, 900)):
                rows.append((setting, seed, document, size * (2 + shift + 0.01 * noise[seed]), size))
    return pl.DataFrame(rows, schema=["setting", "seed", "document", "bits", "bytes"], orient="row")


def test_rates_and_their_intervals() -> None:
    rate = calibration.Rate(10, 200).plain()
    assert rate["rate"] == 0.05 and 0.02 < rate["low"] < 0.05 < rate["high"] < 0.1
    # 4 to 16 of 200 are compatible with 5 %
    assert [calibration.Rate(n, 200).within(0.05) for n in (3, 4, 16, 17)] == [False, True, True, False]


@pytest.mark.parametrize("noise", CONTINUOUS)
def test_arms_have_the_effect_that_a_cell_declares(noise: str) -> None:
    values_RAS = drawn(noise, 2, 5, [1.5, 0.0])
    differences_A = (values_RAS[:, 1:] - values_RAS[:, :1]).mean((0, 2))
    assert differences_A == pytest.approx([1.5, 0.0], abs=0.06)


@pytest.mark.parametrize("noise", RATES)
def test_error_rates_have_the_effect_that_a_cell_declares(noise: str) -> None:
    values_RAS = drawn(noise, 2, 5, [0.1, 0.0])
    assert values_RAS.min() >= 0 and values_RAS.max() <= 1
    differences_A = (values_RAS[:, 1:] - values_RAS[:, :1]).mean((0, 2))
    assert differences_A == pytest.approx([0.1, 0.0], abs=0.012)


@pytest.mark.parametrize("noise", ["normal", "normal, unpaired", "skewed", "skewed arm"])
def test_paired_differences_have_an_sd_of_one(noise: str) -> None:
    values_RAS = drawn(noise, 1, 5, [0.0])
    assert (values_RAS[:, 1] - values_RAS[:, 0]).std() == pytest.approx(1, rel=0.03)


def test_only_the_skewed_arm_makes_differences_skewed() -> None:
    def skewness(noise: str) -> float:
        values_RAS = drawn(noise, 1, 5, [0.0], 20_000)
        difference = values_RAS[:, 1] - values_RAS[:, 0]
        return float(((difference - difference.mean()) ** 3).mean() / difference.std() ** 3)

    assert skewness("skewed") == pytest.approx(0, abs=0.15)
    assert skewness("skewed arm") == pytest.approx(2, rel=0.15)


def test_which_runs_fail() -> None:
    values_RAS = drawn("normal", 2, 6, [0.0, 0.0], 50)
    masks = {name: failed(np.random.default_rng(0), values_RAS) for name, failed in calibration.FAILURES.items()}
    failed = {name: mask.sum((0, 2)).tolist() for name, mask in masks.items()}
    assert failed["none"] == [0, 0, 0]
    assert failed["one of the baseline, at random"] == failed["the worst of the baseline"] == [50, 0, 0]
    assert failed["the worst of each arm"] == [0, 50, 50]
    assert failed["the worst of all arms"] == [50, 50, 50]
    worst = masks["the worst of all arms"]
    assert (values_RAS[worst].reshape(50, 3) == values_RAS.max(2)).all()
    assert masks["a fifth, at random"].mean() == pytest.approx(0.2, abs=0.04)


def test_two_and_three_seeds_claim_nothing() -> None:
    cells = [cell for cell in calibration.cells() if cell.question == "equal arms, fewer than 4 seeds"]
    assert {cell.seeds for cell in cells} == {2, 3} and {cell.bounds["false difference"] for cell in cells} == {0.0}
    assert all(row["false difference"]["count"] == 0 for row in rates(*cells[::5], ablations=3))


@pytest.mark.parametrize("noise", calibration.EQUAL)
def test_equal_arms_are_seldom_called_different(noise: str) -> None:
    (row,) = rates(calibration.Cell("equal arms", noise, 2, 6, bounds={"false difference": 0.055}))
    assert row["false difference"]["low"] < 0.055


def test_arms_at_the_margin_are_seldom_called_equivalent() -> None:
    bounds = {"false equivalence": 0.055}
    alike, mixed = (
        calibration.Cell("arms at the margin", "normal", 2, 6, effects, 6.0, bounds=bounds)
        for effects in ((6.0, 6.0), (6.0, 0.0))
    )
    for row in rates(alike, mixed, ablations=120):
        assert row["false equivalence"]["rate"] > 0 and row["false equivalence"]["low"] < 0.055


def test_planted_effects_are_detected_as_often_as_planned() -> None:
    cell = next(c for c in calibration.cells() if c.question.startswith("power, one arm") and c.effects == (1.5,))
    (row,) = rates(cell, ablations=200)
    assert row["detected"]["within"]


def test_all_pairs_are_one_family() -> None:
    cell = calibration.Cell(
        "x", arms=3, seeds=5, effects=(8.0, 0.0, 0.0), comparisons="all_pairs", bounds={"false difference": 0.055}
    )
    counts = cell.simulate(100, np.random.default_rng(0))
    assert counts["detected"] > 90 and calibration.Rate(counts["false difference"], 100).plain()["low"] < 0.055


def test_clustered_documents_are_covered_and_ignoring_clusters_is_not() -> None:
    counts = calibration.Coverage("x", 5, 20, 10.0).simulate(80, np.random.default_rng(0))
    assert counts["bootstrap misses"] < 12 < counts["t misses, any documents"]
    assert counts["bootstrap misses"] <= counts["bootstrap misses, clusters ignored"]
    assert counts["t misses, these documents"] < 12


def test_equal_arms_with_different_settings_do_differ() -> None:
    (row,) = rates(calibration.Cell("x", "tuned, 1 sd apart", 4, bounds={"false difference": None}))
    assert row["false difference"]["rate"] > 0.1 and "within" not in row["false difference"]


def test_cells_are_distinct_and_every_noise_and_failure_has_one() -> None:
    grid = list(calibration.cells())
    assert Counter(map(calibration._key, grid)).most_common(1)[0][1] == 1
    assert {cell.noise for cell in grid} == {*calibration.NOISES, "clustered documents"}
    assert {cell.failures for cell in grid if isinstance(cell, calibration.Cell)} == set(calibration.FAILURES)


def test_random_numbers_depend_on_the_cell_and_not_on_processes() -> None:
    grid = [calibration.Cell("x", "ties", 1, 6, bounds={"false difference": 0.055}), calibration.Cell("y", seeds=4)]
    one, other = (calibration.calibrate_grid(60, 0, grid=grid[start:]) for start in (0, 1))
    assert one[1:] == other
    assert calibration.calibrate_grid(60, 0, grid=grid, processes=2) == one
    assert calibration.calibrate_grid(60, 0, seed=1, grid=grid)[0] != one[0]


def test_a_rate_that_is_not_clearly_below_its_bound_is_drawn_again() -> None:
    tight, loose = (calibration.Cell("x", effects=(4.0,), bounds={"detected": bound}) for bound in (0.5, 1.0))
    again, kept = calibration.calibrate_grid(20, 40, grid=[tight, loose])
    assert (again["of"], again["first"]["of"]) == (40, 20)
    assert kept["of"] == 20 and "first" not in kept


def test_the_summary_has_the_worst_cell_of_each_noise() -> None:
    def row(seeds: int, value: float, **more: Any) -> dict[str, Any]:
        rate = {"rate": value, "low": 0.0, "high": 1.0, **more}
        return {"question": "q", "noise": "normal", "arms": 1, "seeds": seeds, "of": 100, "rates": {"r": rate}}

    bounded = [row(4, 0.02, bound=0.055, within=True), row(5, 0.06, bound=0.055, within=False)]
    (line,) = calibration.summary(bounded)
    assert (line["cells"], line["outside"], line["value"], line["design"]["seeds"]) == (2, 1, 0.06, 5)
    planned = [row(4, 0.5, expected=0.8, within=False), row(5, 0.9, expected=0.9, within=True)]
    assert calibration.summary(planned)[0]["design"]["seeds"] == 4


def test_ablations_from_a_pool_of_runs() -> None:
    same, planted = calibration.calibrate_pool(pool(24, 0.02), ablations=60)
    assert same["rates"]["claims"]["rate"] < 0.2
    assert planted["rates"]["detected"]["rate"] > 0.9


def test_a_pool_needs_disjoint_seeds_for_every_arm() -> None:
    with pytest.raises(ValueError, match="at least 15"):
        calibration.calibrate_pool(pool(10, 0.02))


def test_the_benchmark_writes_cells_summary_and_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(24, 0.02).write_parquet(tmp_path / "pool.parquet")
    options = f"--output {tmp_path} --ablations 20 --refined 0 --every 200 --processes 1"
    monkeypatch.setattr(sys, "argv", ["verdict_calibration.py", *options.split()])
    monkeypatch.setattr("workbench.environment.environment", lambda: {"code": "1.0"})
    calibration.main()
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert len(report["grid"]) == -(-len(list(calibration.cells())) // 200)
    assert sum(line["cells"] for line in report["summary"]) == sum(len(row["rates"]) for row in report["grid"])
    assert report["resampled_runs"][0]["rates"]["claims"]["of"] == 20
    assert report["environment"]["code"] == "1.0" and report["settings"]["every"] == 200
