"""What an arm is worth in training of the baseline."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from workbench.ablation.analysis.savings import CAVEAT, LossCurve, savings, savings_sentences, worth
from workbench.results.tables import Line, Points

TOKENS = np.geomspace(1e3, 1e6, 13)


def power_law(scale: float, exponent: float = 0.2) -> np.ndarray:
    """Losses scale · tokens^−exponent: at equal loss, tokens go as scale^(1 / exponent)."""
    return scale * TOKENS**-exponent


def points(losses: np.ndarray, flops: float = 6.0, seconds: float = 1e-3) -> Points:
    """Logged points with this many FLOPs and seconds per token."""
    columns = {"tokens": TOKENS, "flops": flops * TOKENS, "seconds": seconds * TOKENS, "selection_value": losses}
    return Points(pl.DataFrame(columns).cast({"tokens": pl.Int64}))


def curve(losses: np.ndarray, **per_token: float) -> LossCurve:
    found = LossCurve.of(points(losses, **per_token))
    assert found is not None
    return found


# straight lines between evaluations follow a power law to about 1 %
@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_tokens_at_equal_loss(factor: float) -> None:
    ratios, bound = worth(curve(factor * power_law(5)), curve(power_law(5)))
    assert ratios["tokens"] == pytest.approx(factor**-5, rel=0.02)
    assert bound == ""


def test_swapping_the_arms_inverts_the_ratio() -> None:
    one, other = curve(power_law(5)), curve(power_law(4.8))
    assert worth(one, other)[0]["tokens"] == pytest.approx(1 / worth(other, one)[0]["tokens"])


def test_the_same_run_is_worth_itself() -> None:
    assert worth(curve(power_law(5)), curve(power_law(5)))[0] == {"flops": 1, "tokens": 1, "seconds": 1}


@pytest.mark.parametrize(("measure", "factor"), [("tokens", 1.0), ("flops", 0.5), ("seconds", 4.0)])
def test_cost_and_speed_of_the_arm_count(measure: Any, factor: float) -> None:
    """An arm of twice the FLOPs and a quarter of the time per token."""
    arm, baseline = curve(power_law(5), flops=12.0, seconds=0.25e-3), curve(power_law(5))
    assert worth(arm, baseline)[0][measure] == pytest.approx(factor)


def test_flops_of_a_model_that_grows_are_read_where_the_loss_was_reached() -> None:
    """1 FLOP per token up to 1e3 tokens, then 4: an arm that is as good as the baseline at 2e3 tokens needed 5e3."""
    flat = LossCurve(np.array([1e3, 2e3]), np.array([3.0, 2.0]), {}, (np.array([1e3, 2e3]), np.array([1e3, 5e3])))
    assert (flat.spent("flops", 1e3), flat.spent("flops", 1.5e3), flat.spent("flops", 2e3)) == (1e3, 3e3, 5e3)


def test_a_crossing_is_interpolated_over_log_tokens() -> None:
    found = LossCurve(np.array([1e3, 1e5]), np.array([3.0, 2.0]), {})
    assert found.needed(2.5) == (pytest.approx(1e4), False)


def test_noise_is_smoothed_to_a_monotone_curve() -> None:
    """Isotonic regression averages a rise with what precedes it."""
    losses = power_law(5)
    losses[6] = losses[5] + 0.02
    assert curve(losses).losses[5:7] == pytest.approx([losses[5] + 0.01] * 2)


def test_an_arm_that_starts_below_the_baseline_has_a_bound() -> None:
    ratios, bound = worth(curve(power_law(1)), curve(power_law(5)))
    assert bound == "at least"
    assert ratios["tokens"] == pytest.approx(1e3)


def test_a_run_without_evaluations_has_no_curve() -> None:
    assert LossCurve.of(points(np.full(13, math.nan))) is None


# -- over seeds --------------------------------------------------------------------------------------------------------

FACTORS = (0.95, 0.97, 0.96, 0.99)


def run(verdict: Any = "a verdict", factors: tuple[float, ...] = FACTORS) -> Any:
    """An ablation of ``full`` and of ``gdn``, whose losses are these factors of the baseline's."""
    lines = [
        Line(arm, "confirmation", f"{arm}-{seed}", seed, points(power_law(5) * (factor if arm == "gdn" else 1)))
        for arm in ("full", "gdn")
        for seed, factor in enumerate(factors)
    ]
    rows = [
        {"arm": line.arm, "stage": line.stage, "run": line.run, "seed": line.seed, "status": "done"} for line in lines
    ]
    return SimpleNamespace(
        arms=["full", "gdn"],
        baseline="full",
        alpha=0.05,
        runs=lambda: pl.DataFrame(rows),
        lines=lambda: lines,
        verdict=lambda: verdict,
    )


def test_the_interval_is_the_t_interval_of_the_log_ratio() -> None:
    logs = [math.log(worth(curve(f * power_law(5)), curve(power_law(5)))[0]["tokens"]) for f in FACTORS]
    low, high = stats.t.interval(0.95, 3, np.mean(logs), stats.sem(logs))
    row = savings(run()).row(by_predicate=pl.col("measure") == "tokens", named=True)
    assert [row["ratio"], row["low"], row["high"]] == pytest.approx(np.exp([np.mean(logs), low, high]).tolist())


def test_one_seed_gives_no_interval() -> None:
    assert savings(run(factors=(0.9,)))["low"].to_list() == [None] * 3


def test_a_bound_has_no_interval() -> None:
    table = savings(run(factors=(0.2, 0.9)))
    assert set(table["bound"]) == {"at least"}
    assert table["low"].null_count() == 3


def test_the_worth_in_words() -> None:
    sentence, caveat = savings_sentences(run(factors=(0.95, 0.95)))
    assert sentence.startswith("gdn is worth 1.28× compute (95 % interval 1.28 to 1.28), 1.28× tokens (95 %")
    assert sentence.endswith("against full, 2 paired seeds.")
    assert caveat == CAVEAT
