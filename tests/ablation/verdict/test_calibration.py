"""Calibration of the verdict: error rates below alpha, power as planned, arms tuned to different settings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "benchmarks" / "verdict_calibration.py"

_spec = importlib.util.spec_from_file_location("verdict_calibration", SCRIPT)
assert _spec is not None and _spec.loader is not None
calibration = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = calibration
_spec.loader.exec_module(calibration)


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


def test_equal_arms_planted_effects_and_arms_tuned_apart() -> None:
    scenarios = tuple(
        s
        for s in calibration.SCENARIOS
        if s.name in ("A/A", "effect of 1.5 sd, one arm", "A/A, tuned, settings one seed's sd apart")
    )
    same, tuned, planted = calibration.calibrate_tables(150, scenarios=scenarios)
    assert same["rates"]["claims"]["rate"] < 0.1 and planted["rates"]["detected"]["within"]
    assert tuned["rates"]["claims"]["rate"] > 0.1, "equal arms with different chosen settings do differ"


def test_drawn_tables_have_the_noise_of_the_scenario() -> None:
    scenario = calibration.Scenario("x", arms=1, seeds=6, rho=0.8, effect=3.0)
    rng = np.random.default_rng(0)
    rows = [calibration.draw(scenario, rng).rows[1] for _ in range(150)]
    assert np.mean([row.difference for row in rows]) == pytest.approx(3 * scenario.sd_difference, rel=0.1)
    assert np.mean([row.rho for row in rows]) == pytest.approx(0.8, abs=0.12)


def test_ablations_from_a_pool_of_runs() -> None:
    same, planted = calibration.calibrate_pool(pool(24, 0.02), ablations=60)
    assert same["rates"]["claims"]["rate"] < 0.2
    assert planted["rates"]["detected"]["rate"] > 0.9


def test_a_pool_needs_disjoint_seeds_for_every_arm() -> None:
    with pytest.raises(ValueError, match="at least 15"):
        calibration.calibrate_pool(pool(10, 0.02))


def test_the_benchmark_writes_every_scenario_and_the_pool(tmp_path: Path) -> None:
    pool(24, 0.02).write_parquet(tmp_path / "pool.parquet")
    call = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--ablations", "20"]
    process = subprocess.run(call, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert len(report["synthetic_tables"]) == len(calibration.SCENARIOS)
    assert report["resampled_runs"][0]["rates"]["claims"]["of"] == 200
