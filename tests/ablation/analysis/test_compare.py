"""Ablations of the same arms side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from workbench.ablation.analysis.compare import compare, rank_stability
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.config import ConfigError
from workbench.metric import BITS_PER_BYTE

pytestmark = pytest.mark.process


def table(*verdicts: str) -> pl.DataFrame:
    values = {"better": 0.9, "worse": 1.1, "undecided": 0.999}
    rows = []
    for i, word in enumerate(verdicts):
        rows.append({"ablation": f"size{i}", "arm": "full", "value": 1.0, "verdict": "baseline"})
        rows.append({"ablation": f"size{i}", "arm": "gdn", "value": values[word], "verdict": word})
    return pl.DataFrame(rows)


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("better", "better"), "order of all arms is the same"),
        (("better", "worse"), "order depends on scale: gdn"),
        (("undecided", "worse"), "no difference that both show"),
    ],
)
def test_whether_the_order_holds(verdicts: tuple[str, ...], words: str) -> None:
    (sentence,) = rank_stability(table(*verdicts))
    assert words in sentence


def test_every_two_ablations_are_compared() -> None:
    assert len(rank_stability(table("better", "better", "worse"))) == 3


def finished(name: str, flops: float, gap: float, baseline: str = "full", solved: bool = False) -> Any:
    """An ablation of two arms that ended, with made-up values; ``solved`` lets one run have zero loss."""
    rng = np.random.default_rng(int(flops))
    sizes = np.array([100, 300])
    values = {
        arm: 1 + 5 * flops**-0.2 + shift + 0.001 * rng.normal(size=4) for arm, shift in (("full", 0.0), ("gdn", gap))
    }
    if solved:
        values["gdn"][0] = 0.0
    arms = [ArmMeasurements(arm, {s: v * sizes for s, v in enumerate(losses)}, sizes) for arm, losses in values.items()]
    rows = [
        {"arm": arm, "stage": "confirmation", "status": "done", "seed": seed, "report_value": value}
        for arm, losses in values.items()
        for seed, value in enumerate(losses)
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


def test_smaller_ablations_come_first() -> None:
    comparison = compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)])
    assert comparison.table["ablation"].to_list() == ["small", "small", "large", "large"]


@pytest.mark.parametrize("words", ["order depends on scale: gdn", "flops^−", "extrapolated to 1e+08"])
def test_a_comparison_in_words(words: str) -> None:
    assert words in str(compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)], at=1e8))


def test_one_ablation_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        compare([finished("one", 1e4, 0.0)])


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="flops or parameters or tokens"):
        compare([], "seconds")


def test_an_arm_with_zero_loss_has_no_law() -> None:
    comparison = compare([finished("small", 1e4, 0.0, solved=True), finished("large", 1e6, 0.0)])
    assert set(comparison.laws) == {"full"}
    assert "gdn: no law" in str(comparison)


def test_ablations_of_one_name_are_told_apart_by_their_folders() -> None:
    comparison = compare([finished("same", 1e4, 0.02), finished("same", 1e6, -0.02)])
    assert comparison.table["ablation"].n_unique() == 2


def test_ablations_with_two_baselines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ablations against full, gdn'; expected one baseline"):
        compare([finished("small", 1e4, 0.0), finished("large", 1e6, 0.0, baseline="gdn")])


def test_a_difference_is_predicted_from_four_sizes_on() -> None:
    runs = [finished(str(flops), flops, 0.02) for flops in (1e3, 1e4, 1e5, 1e6)]
    comparison = compare(runs, at=1e8)
    at = comparison.paired["gdn"].at(1e8)
    assert at.low is not None and at.high is not None and at.low < at.value < at.high
    assert "95 % prediction interval" in str(comparison)


def test_three_sizes_predict_no_difference() -> None:
    runs = [finished(str(flops), flops, 0.02) for flops in (1e3, 1e4, 1e5)]
    comparison = compare(runs, at=1e8)
    assert not comparison.paired
    assert "floor unknown and no interval" in str(comparison)


def test_what_the_budget_gives_an_arm_is_in_the_units_of_the_metric() -> None:
    """gdn trains with 1.1 times the FLOPs."""
    comparison = compare([finished(str(flops), flops, 0.02) for flops in (1e3, 1e4, 1e5, 1e6)])
    rows = comparison.table.filter(pl.col("arm") == "gdn")
    expected = [5 * ((1.1 * flops) ** -0.2 - flops**-0.2) for flops in (1e3, 1e4, 1e5, 1e6)]
    assert rows["budget"].to_list() == pytest.approx(expected, rel=0.1)
    assert "by its law that alone is" in str(comparison)
