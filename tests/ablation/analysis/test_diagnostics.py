"""Drift of the baseline over time, and the expected best of k trials."""

from __future__ import annotations

import polars as pl
import pytest

from workbench.ablation.analysis.diagnostics import best_of_table, drift
from workbench.ablation.spec.tuning import Tuning


def table(values: list[float], speeds: list[float], devices: list[str]) -> pl.DataFrame:
    n = len(values)
    return pl.DataFrame(
        {
            "run": ["r"] * n,
            "seed": range(n),
            "started": [float(i) for i in range(n)],
            "value": values,
            "tokens_per_second": speeds,
            "device": devices,
            "code": ["c"] * n,
            "torch": ["t"] * n,
        }
    )


def test_noise_is_no_drift() -> None:
    (sentence,) = drift(table([1.0, 1.2, 1.1, 1.0, 1.15, 1.05], [10.0] * 6, ["gpu"] * 6))
    assert sentence.startswith("No trend")
    assert "DRIFT" not in sentence


def test_a_trend_and_a_slower_machine_are_drift() -> None:
    sentence = drift(table([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [10.0, 10, 10, 8, 8, 8], ["gpu"] * 6))[0]
    assert sentence.count("DRIFT") == 2
    assert "−20.0 %" in sentence


def test_two_devices_are_named() -> None:
    sentences = drift(table([1.0, 1.1, 1.2], [10.0] * 3, ["gpu"] * 2 + ["other"]))
    assert "more than one device: gpu, other" in sentences[1]


def test_one_run_shows_no_drift() -> None:
    assert drift(table([1.0], [1.0], ["gpu"])) == []


class Run:
    arms = ("full",)

    def __init__(self, sampler: str = "random", pruned: int = 0):
        self.tuning = Tuning.parse({"sampler": sampler})
        self.pruned = pruned

    def runs(self) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "arm": "full",
                "stage": "tuning",
                "status": ["done", "diverged", "done"] + ["pruned"] * self.pruned,
                "selection_value": [2.0, None, 1.0] + [9.0] * self.pruned,
            }
        )


def test_best_of_k_counts_failures() -> None:
    best = best_of_table(Run())
    assert best["best"].to_list() == [None, pytest.approx((1 + 1 + 2) / 3), 1.0]
    assert best["finished"][0] == 2


def test_best_of_k_leaves_pruned_trials_out() -> None:
    best = best_of_table(Run(pruned=2))
    assert best["best"].to_list() == best_of_table(Run())["best"].to_list()
    assert best["pruned"].to_list() == [2, 2, 2]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_trials_that_are_not_exchangeable_have_no_best_of_k(sampler: str) -> None:
    assert best_of_table(Run(sampler)).is_empty()


def test_the_interval_of_a_best_of_k_is_that_of_resampled_trials() -> None:
    best = best_of_table(Run())
    assert best["low"][2] == 1.0  # all three drawn trials may be the best one
    assert best["high"][2] in (2.0, None)
