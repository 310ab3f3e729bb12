"""Ablations of the same arms side by side."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from workbench.ablation.analysis.compare import compare, rank_stability
from workbench.ablation.design import Design
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.ranking import ranks
from workbench.config import ConfigError
from workbench.metric import ANSWER_ERRORS, BITS_PER_BYTE

pytestmark = pytest.mark.process


def table(*ranks: dict[str, int | None]) -> pl.DataFrame:
    rows = [{"ablation": f"size{i}", "arm": arm, "rank": r} for i, arms in enumerate(ranks) for arm, r in arms.items()]
    return pl.DataFrame(rows)


GDN_FIRST, FULL_FIRST, TIE = {"full": 2, "gdn": 1}, {"full": 1, "gdn": 2}, {"full": 1, "gdn": 1}


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((GDN_FIRST, GDN_FIRST), "order of all arms is the same (1 of 1 pairs"),
        ((GDN_FIRST, FULL_FIRST), "order depends on scale: gdn before full in size0"),
        ((TIE, FULL_FIRST), "no two arms are shown to differ in both (0 of 1"),
        ((GDN_FIRST | {"kda": 2}, GDN_FIRST | {"kda": 2}), "as far as both show one; other arms tie (2 of 3"),
        ((GDN_FIRST, {"full": 1, "gdn": None}), "fewer than two arms that finished"),
    ],
)
def test_whether_the_order_holds(ranks: tuple[dict[str, int | None], ...], words: str) -> None:
    (sentence,) = rank_stability(table(*ranks))
    assert words in sentence


def test_every_two_ablations_are_compared() -> None:
    assert len(rank_stability(table(GDN_FIRST, GDN_FIRST, FULL_FIRST))) == 3


def verdict_of(*words: str, pairs: tuple[Any, ...] = ()) -> Any:
    rows = [
        SimpleNamespace(arm=f"arm{i}", verdict=w, value=None if w == "failed" else 1.0) for i, w in enumerate(words)
    ]
    return SimpleNamespace(rows=rows, pairs=[SimpleNamespace(arm=a, reference=b, verdict=w) for a, b, w in pairs])


def test_arms_that_are_not_shown_to_differ_tie() -> None:
    found = ranks(verdict_of("baseline", "undecided", "better", "worse", "equivalent", "failed"))
    assert list(found.values()) == [2, 2, 1, 5, 2, None]


def test_pairs_that_were_compared_decide_the_rank() -> None:
    pairs = (("arm1", "arm0", "better"), ("arm2", "arm0", "better"), ("arm2", "arm1", "worse"))
    assert list(ranks(verdict_of("baseline", "better", "better", pairs=pairs)).values()) == [3, 1, 2]


DESIGN = Design(BITS_PER_BYTE, "report", {"full": "d1", "gdn": "d1"}, {"full": {}, "gdn": {"model.pattern": "gdn"}})


def finished(
    name: str, flops: float, gap: float, baseline: str = "full", solved: bool = False, design: Design = DESIGN
) -> Any:
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
        design=design,
        finished=True,
        arms=["full", "gdn"],
        metric=BITS_PER_BYTE,
        verdict=lambda: judge(arms[0], arms[1:], seeds=range(4), replicates=50),
        runs=lambda: pl.DataFrame(rows),
        cost=lambda: pl.DataFrame({"arm": ["full", "gdn"], "training_flops": [flops, 1.1 * flops]}),
    )


def test_smaller_ablations_come_first() -> None:
    comparison = compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)])
    assert comparison.table["ablation"].to_list() == ["small", "small", "large", "large"]


@pytest.mark.parametrize(
    "words", ["order depends on scale: gdn before full in small", "flops^−", "extrapolated to 1e+08"]
)
def test_a_comparison_in_words(words: str) -> None:
    sizes = finished("large", 1e6, 0.02), finished("small", 1e4, -0.02), finished("middle", 1e5, 0.02)
    assert words in str(compare(sizes, at=1e8))


def test_two_sizes_have_no_law() -> None:
    comparison = compare([finished("large", 1e6, 0.02), finished("small", 1e4, -0.02)])
    assert not comparison.laws
    assert "full: no law; got 2 distinct size(s)" in str(comparison)


def test_ties_are_marked_and_explained() -> None:
    text = str(compare([finished("large", 1e6, 0.0), finished("small", 1e4, 0.0)]))
    assert "1=" in text and "are not shown to differ" in text and "no order to compare" in text


@pytest.mark.parametrize(
    ("design", "reason"),
    [
        (replace(DESIGN, data={"full": "d2", "gdn": "d2"}), "other: other data (d2, not d1)."),
        (replace(DESIGN, split="pilot"), "other: measured on the pilot split, not on the report split."),
        (
            replace(DESIGN, metric=replace(BITS_PER_BYTE, task="code")),
            "other: another task (loss/code, not loss/text).",
        ),
        (
            replace(DESIGN, metric=ANSWER_ERRORS),
            "other: measured in errors per answer (error rate), not in bits per byte (loss).",
        ),
    ],
)
def test_what_is_no_size_of_the_first_is_left_out(design: Design, reason: str) -> None:
    runs = [finished("small", 1e4, 0.02), finished("large", 1e6, 0.02), finished("other", 1e5, 0.02, design=design)]
    comparison = compare(runs)
    assert "other" not in comparison.table["ablation"]
    assert comparison.left_out[0].startswith(reason)
    assert f"Left out: {reason}" in str(comparison)


def test_an_arm_of_another_definition_is_left_out_alone() -> None:
    other = replace(DESIGN, definitions={"full": {}, "gdn": {"model.pattern": "gdn full"}})
    comparison = compare([finished("small", 1e4, 0.02), finished("large", 1e6, 0.02, design=other)])
    assert comparison.table.filter(pl.col("ablation") == "large")["arm"].to_list() == ["full"]
    assert comparison.left_out == ("large, gdn: model.pattern is 'gdn full', not 'gdn'.",)


def test_a_repetition_does_not_count_twice() -> None:
    runs = [finished("small", 1e4, 0.02), finished("copy", 1.01e4, 0.02), finished("large", 1e6, 0.02)]
    assert compare(runs).left_out == ("copy: of the size of small.",)


def test_an_unfinished_ablation_is_left_out() -> None:
    running = finished("running", 1e5, 0.02)
    running.finished = False
    assert "running: not finished." in compare([finished("a", 1e4, 0.0), finished("b", 1e6, 0.0), running]).left_out
    with pytest.raises(ConfigError, match=r"of which 1 can be compared.*running: not finished"):
        compare([finished("a", 1e4, 0.0), running])


def test_one_ablation_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        compare([finished("one", 1e4, 0.0)])


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="flops or parameters or tokens"):
        compare([], "seconds")


def test_an_arm_with_zero_loss_has_no_law() -> None:
    comparison = compare(
        [finished("small", 1e4, 0.0, solved=True), finished("middle", 1e5, 0.0), finished("large", 1e6, 0.0)]
    )
    assert set(comparison.laws) == {"full"}
    assert "gdn: no law" in str(comparison)


def test_ablations_of_one_name_are_told_apart_by_their_folders() -> None:
    comparison = compare([finished("same", 1e4, 0.02), finished("same", 1e6, -0.02)])
    assert comparison.table["ablation"].n_unique() == 2


def test_ablations_with_two_baselines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"large: compared with gdn, not with full"):
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
