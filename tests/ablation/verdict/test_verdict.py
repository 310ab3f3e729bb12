"""Every verdict word and edge, and the error rates of the whole path from losses to verdict, by simulation."""

from __future__ import annotations

import doctest
import json
import math
import re

import numpy as np
import polars as pl
import pytest
from scipy import stats

from workbench.ablation.verdict import judge as module
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.statistics import detectable_difference, holm, paired_interval, power_of, seeds_needed
from workbench.ablation.verdict.subject import Subject
from workbench.ablation.verdict.verdict import WORDS, Verdict

pytestmark = pytest.mark.filterwarnings("error")

COLUMNS = (
    "arm verdict value value_sd difference low high bootstrap_low bootstrap_high simultaneous_low simultaneous_high "
    "p p_holm seeds failed rho detectable sentence reservations p_equivalence least_p skewness "
    "imputed_low imputed_high survival_p solved repeated_low repeated_high level"
)
BYTES = np.array([400, 1_000, 2_600])
SPREAD = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])  # five seeds, mean zero, sd 1.58


def measured(arm: str, bpb_S, failures=None, sizes=BYTES, tilt=0.0) -> ArmMeasurements:
    """An arm whose seeds 0, 1, … have these bits per byte; ``tilt`` moves bits from the last document to the first."""
    moved = np.zeros(len(sizes))
    moved[0], moved[-1] = tilt, -tilt
    bits = {seed: bpb * sizes + moved for seed, bpb in enumerate(bpb_S)}
    return ArmMeasurements(arm, {s: x for s, x in bits.items() if s not in (failures or {})}, sizes, failures or {})


def against(difference_S, *, base_S=1.0 + 0.001 * SPREAD[::-1], tilt=0.0, **options):
    """The verdict row of one arm with these differences to the baseline."""
    base_S = np.asarray(base_S)[: len(difference_S)]
    arm = measured("gdn", base_S + difference_S, tilt=tilt)
    return judge(measured("full", base_S), [arm], seeds=range(len(base_S)), replicates=400, **options).rows[1]


def test_examples():
    assert doctest.testmod(module).failed == 0


# --- words ---------------------------------------------------------------------------------------------------------


def test_worse_and_better():
    row = against(0.012 + 0.002 * SPREAD)
    interval = paired_interval(0.012 + 0.002 * SPREAD)
    assert row.verdict == "worse"
    assert (row.difference, row.low, row.high) == pytest.approx((interval.mean, interval.low, interval.high))
    assert row.p == row.p_holm == pytest.approx(interval.p)
    assert row.value == pytest.approx(1.012) and row.value_sd == pytest.approx(0.001 * np.std(SPREAD, ddof=1))
    assert row.bootstrap_low > 0 and (row.seeds, row.failed) == (5, 0)
    assert row.sentence == (
        "gdn is worse than full by 0.0120 bits per byte "
        "(95 % interval 0.0081 to 0.0159, Holm-adjusted p = 0.00106, 5 paired seeds)."
    )
    row = against(-0.012 - 0.002 * SPREAD)
    assert row.verdict == "better" and row.high < 0
    assert row.sentence.startswith("gdn is better than full by 0.0120 bits per byte (95 % interval 0.0081 to 0.0159,")


def test_undecided_says_what_could_have_been_shown():
    differences = 0.001 + 0.002 * SPREAD
    row = against(differences)
    assert row.verdict == "undecided" and row.p > 0.05
    assert row.detectable == pytest.approx(np.std(differences, ddof=1) * detectable_difference(5))
    assert "no difference shown: +0.0010 bits per byte (95 % interval -0.0029 to 0.0049" in row.sentence
    assert f"could have shown {row.detectable:.4f} bits per byte (80 % power)" in row.sentence


def test_no_power_is_computed_from_the_observed_difference():
    assert "would take" not in against(0.001 + 0.002 * SPREAD).sentence


def test_equivalent_only_by_a_margin():
    differences = 0.0001 + 0.0002 * SPREAD
    assert against(differences).verdict == "undecided"
    row = against(differences, margin=0.001)
    assert row.verdict == "equivalent"
    assert "gdn is equivalent to full: the difference lies within ±0.001 bits per byte" in row.sentence


def test_a_margin_that_is_not_kept_is_mentioned():
    row = against(0.0001 + 0.0002 * SPREAD, margin=0.0003)
    assert row.verdict == "undecided" and "nor is it shown to lie within ±0.0003" in row.sentence


def test_equivalence_is_two_one_sided_t_tests():
    differences = 0.0001 + 0.0002 * SPREAD
    row = against(differences, margin=0.0005)
    below = stats.ttest_1samp(differences, -0.0005, alternative="greater").pvalue
    above = stats.ttest_1samp(differences, 0.0005, alternative="less").pvalue
    assert row.p_equivalence == pytest.approx(max(below, above))


def test_equivalence_is_adjusted_over_arms():
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    arms = [measured(f"arm{i}", base_S + 0.0001 + 0.0002 * SPREAD) for i in range(3)]
    one = judge(measured("full", base_S), arms[:1], seeds=range(5), margin=0.0005, replicates=0).rows[1]
    three = judge(measured("full", base_S), arms, seeds=range(5), margin=0.0005, replicates=0).rows[1]
    assert three.p_equivalence == pytest.approx(3 * one.p_equivalence)
    assert (one.verdict, three.verdict) == ("equivalent", "undecided")


def test_a_difference_inside_the_margin_was_declared_not_to_matter():
    row = against(0.012 + 0.002 * SPREAD, margin=0.1)
    assert row.verdict == "equivalent" and row.p_holm < 0.05
    assert row.sentence.endswith("; there is a difference, too small to matter by the declared margin.")


def test_a_difference_that_reaches_the_margin_is_claimed():
    row = against(0.012 + 0.002 * SPREAD, margin=0.012)
    assert row.verdict == "worse"


def test_holm_decides_not_the_interval():
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    arms = [measured(f"arm{i}", base_S + mean + 0.002 * SPREAD) for i, mean in enumerate((0.004, 0.001, 0.012))]
    rows = judge(measured("full", base_S), arms, seeds=range(5), replicates=400).rows
    assert [row.verdict for row in rows] == ["baseline", "undecided", "undecided", "worse"]
    assert [row.p_holm for row in rows[1:]] == pytest.approx(holm([row.p for row in rows[1:]]))
    assert rows[1].low > 0 and rows[1].p < 0.05 < rows[1].p_holm
    assert "excludes zero, but p does not survive Holm's correction over 3 comparisons" in rows[1].sentence
    assert rows[3].detectable == pytest.approx(0.002 * np.std(SPREAD, ddof=1) * detectable_difference(5, 0.05 / 3))


def test_the_document_bootstrap_may_disagree():
    row = against(0.012 + 0.002 * SPREAD, tilt=200.0)  # large opposite effects in two documents: the mean rests on them
    assert row.verdict == "worse" and row.low > 0 > row.bootstrap_low
    assert "; the document bootstrap does not confirm it (95 % interval -" in row.sentence


def test_the_document_bootstrap_may_exclude_zero_alone():
    shift = 2.06 / math.sqrt(20)  # between the normal and the t quantile, in standard errors; 20 seeds: not widened
    base_S, sizes = np.linspace(1, 1.01, 20), np.full(20, 100)
    arm = measured("gdn", base_S + 0.001 * (shift + np.tile([-1.0, 1.0], 10)), sizes=sizes)
    row = judge(measured("full", base_S, sizes=sizes), [arm], seeds=range(20), replicates=400).rows[1]
    assert row.verdict == "undecided" and row.low < 0 < row.bootstrap_low
    assert "; the document bootstrap alone excludes zero (95 % interval " in row.sentence


def test_baseline_row_states_the_noise_floor():
    base_S = 1.0 + 0.001 * SPREAD
    verdict = judge(measured("full", base_S), [], seeds=range(5))
    (row,) = verdict.rows
    assert (row.arm, row.verdict, row.difference, row.p, row.p_holm) == ("full", "baseline", None, None, None)
    assert verdict.noise_floor is not None and verdict.noise_floor.sd == pytest.approx(row.value_sd)
    assert row.sentence == (
        "full, the baseline, has 1.0000 bits per byte over 5 seeds; "
        "the noise floor, its sd over seeds, is 0.0016 (95 % interval 0.0009 to 0.0045)."
    )


# --- failures ------------------------------------------------------------------------------------------------------


def with_a_failed_arm() -> Verdict:
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    moe = measured("moe", base_S, failures={3: "diverged at step 1,200"})
    gdn = measured("gdn", base_S + 0.012 + 0.002 * SPREAD)
    return judge(measured("full", base_S), [moe, gdn], seeds=range(5), replicates=400)


def test_a_failed_arm_keeps_the_mean_of_the_runs_that_finished():
    row = with_a_failed_arm().rows[1]
    assert (row.verdict, row.seeds, row.failed) == ("failed", 4, 1)
    assert row.value == pytest.approx(np.delete(1.0 + 0.001 * SPREAD[::-1], 3).mean())
    assert row.sentence.startswith("moe failed: 4 of 5 seeds finished (seed 3: diverged at step 1,200); ")


def test_a_failed_arm_counts_in_the_family():
    _, failed, worse = with_a_failed_arm().rows
    assert (failed.p, failed.p_holm, failed.detectable) == (1.0, 1.0, None)
    assert worse.verdict == "worse" and worse.p_holm == pytest.approx(2 * worse.p)


def test_a_claim_survives_failures_that_cannot_turn_its_sign():
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    gdn = measured("gdn", base_S + 0.02 + 0.001 * SPREAD, failures={4: "diverged"})
    row = judge(measured("full", base_S), [gdn], seeds=range(5), replicates=0).rows[1]
    assert row.verdict == "worse" and row.failed == 1
    # the missing run at the best value measured, 0.998, and at the worst, 1.02 (seed 0 of the arm)
    differences = 0.02 + 0.001 * SPREAD[:4]
    assert row.imputed_low == pytest.approx((differences.sum() + 0.998 - 0.998) / 5)
    assert row.imputed_high == pytest.approx((differences.sum() + 1.02 - 0.998) / 5)
    assert row.survival_p == pytest.approx(1.0)


def test_a_claim_does_not_survive_failures_that_could_turn_its_sign():
    base_S = 1.0 + 0.05 * SPREAD[::-1]
    gdn = measured("gdn", base_S - 0.02 + 0.001 * SPREAD, failures={4: "diverged"})
    row = judge(measured("full", base_S), [gdn], seeds=range(5), replicates=0).rows[1]
    assert row.imputed_low < 0 < row.imputed_high
    assert (row.verdict, row.p) == ("failed", 1.0)


def test_a_failed_baseline_seed_removes_a_pair():
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    full, gdn = measured("full", base_S, failures={0: "out of memory"}), measured("gdn", base_S + 0.02 + 0.001 * SPREAD)
    base, row = judge(full, [gdn], seeds=range(5), replicates=0).rows
    assert (base.verdict, row.verdict, row.seeds) == ("baseline", "worse", 5)
    assert row.p == pytest.approx(paired_interval(0.02 + 0.001 * SPREAD[1:]).p)
    assert row.imputed_low is not None and "full: 4 of 5 seeds finished (seed 0: out of memory)" in row.sentence


def test_missing_runs_count_as_the_least_favourable_that_their_arm_measured():
    base_S, differences_S = 1.0 + 0.01 * SPREAD, 0.012 + 0.002 * SPREAD
    full, gdn = measured("full", base_S, failures={0: "killed"}), measured("gdn", base_S + differences_S)
    row = judge(full, [gdn], seeds=range(5), replicates=0).rows[1]
    # pairs alone show "worse", but not with the baseline's missing run at 1.02, the worst that the baseline measured
    assert paired_interval(differences_S[1:]).p < 0.05
    imputed_S = np.append(base_S[0] + differences_S[0] - 1.02, differences_S[1:])
    assert row.verdict == "undecided" and row.p == pytest.approx(paired_interval(imputed_S).p)
    assert "p does not survive missing runs at the least favourable value of their arm" in row.sentence


def test_missing_error_rates_count_as_the_least_favourable_that_their_arm_measured():
    rate_S = np.array([0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.3])
    full, gdn = errors("full", rate_S + 0.1), errors("gdn", rate_S)
    failed = ArmMeasurements("gdn", {s: x for s, x in gdn.amounts.items() if s != 0}, gdn.sizes_D, {0: "killed"})
    options = {"seeds": range(8), "unit": "errors per answer", "replicates": 0, "upper": 1.0}
    row = judge(full, [failed], **options).rows[1]
    imputed = judge(full, [errors("gdn", [0.6, *rate_S[1:]])], **options).rows[1]
    without = judge(full, [failed], **{**options, "seeds": range(1, 8)}).rows[1]
    assert row.p == pytest.approx(imputed.p) and row.p > without.p


def test_a_baseline_without_a_run_leaves_nothing_to_judge():
    base_S = 1.0 + 0.001 * SPREAD
    full = measured("full", base_S, failures=dict.fromkeys(range(5), "killed"))
    base, gdn = judge(full, [measured("gdn", base_S)], seeds=range(5)).rows
    assert [base.verdict, gdn.verdict] == ["failed", "failed"]
    assert base.sentence.endswith("0 of 5 seeds finished (seeds 0, 1, 2, 3, 4: killed), so no arm can be judged.")
    assert gdn.sentence == "gdn cannot be compared with full, which has no finished seed."


def test_all_failed():
    lost = {seed: "diverged" for seed in range(3)}
    verdict = judge(measured("full", [1.0] * 3, lost), [measured("gdn", [1.0] * 3, lost)], seeds=range(3))
    assert [(row.verdict, row.value, row.seeds, row.failed) for row in verdict.rows] == [("failed", None, 0, 3)] * 2
    text = str(verdict)
    assert "which has no finished seed; of gdn, 0 of 3 seeds finished (seeds 0, 1, 2: diverged)" in text
    assert ["gdn", "failed", "0", "of", "3"] in [line.split() for line in text.splitlines()], "no p: nothing was tested"
    assert verdict.noise_floor is None and "0 of 3 seeds finished (seeds 0, 1, 2: diverged)" in str(verdict)
    assert verdict.table()["value"].dtype == pl.Float64


def test_a_declared_seed_without_a_run_counts_as_failed():
    base_S = 1.0 + 0.001 * SPREAD
    full, gdn = measured("full", base_S), measured("gdn", base_S[:4] + 0.01 + 0.001 * SPREAD[:4])
    row = judge(full, [gdn], seeds=range(5)).rows[1]
    assert row.failed == 1 and "4 of 5 seeds finished (seed 4: no result)" in row.sentence


def test_only_declared_seeds_count():
    base_S = 1.0 + 0.001 * SPREAD
    full, gdn = measured("full", base_S), measured("gdn", base_S + 0.01 + 0.001 * SPREAD)
    row = judge(full, [gdn], seeds=[4, 3, 1, 0]).rows[1]
    assert row.verdict == "worse" and row.seeds == 4
    assert row.difference == pytest.approx(0.01 + 0.001 * SPREAD[[4, 3, 1, 0]].mean())


# --- edges ---------------------------------------------------------------------------------------------------------


def test_one_seed_shows_nothing():
    row = against([0.5], margin=1.0)
    assert (row.verdict, row.p, row.p_holm, row.p_equivalence) == ("undecided", 1.0, 1.0, 1.0)
    assert row.difference == pytest.approx(0.5)
    assert row.low is row.high is row.bootstrap_low is row.value_sd is row.detectable is None
    assert "(1 paired seed)" in row.sentence


def test_one_seed_gives_no_noise_floor():
    verdict = judge(measured("full", [1.0]), [], seeds=[0])
    assert verdict.noise_floor is None and "one seed gives no noise floor" in verdict.rows[0].sentence


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_seeds_decide_nothing(n):
    row = against(0.5 + 1e-6 * SPREAD[:n], margin=0.6)
    assert (row.verdict, row.p, row.p_equivalence) == ("undecided", 1.0, 1.0)
    assert "fewer than 4 paired seeds show no difference and no equivalence" in row.sentence


def test_identical_arms_are_undecided():
    row = against(np.zeros(5), margin=0.001)
    assert (row.verdict, row.difference, row.low, row.p, row.detectable) == ("undecided", 0.0, None, 1.0, None)
    assert "the difference is the same in all 5 seeds: check that change and seed reach the model" in row.sentence


def test_rounding_is_no_difference():
    row = against(np.full(5, 4e-16), base_S=np.full(5, 1.0))
    assert (row.verdict, row.difference, row.p) == ("undecided", 0.0, 1.0)
    assert "bootstrap" not in row.sentence


def test_a_constant_difference_of_a_loss_is_no_evidence():
    row = against(np.full(5, 0.25), base_S=np.ones(5))
    assert (row.verdict, row.p, row.low) == ("undecided", 1.0, None)
    assert "check that change and seed reach the model" in row.sentence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="arm 'gdn', seed 1: got NaN or infinite amounts"):
        ArmMeasurements("gdn", {0: np.ones(3), 1: np.array([1.0, value, 1.0])}, BYTES)


def test_measurements_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="both measured and failed"):
        ArmMeasurements("gdn", {0: np.ones(3)}, BYTES, {0: "killed"})
    with pytest.raises(ValueError, match=re.escape("shape (2,); expected (3,)")):
        ArmMeasurements("gdn", {0: np.ones(2)}, BYTES)
    for sizes in (np.array([1, 0, 2]), np.array([]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="sizes_D"):
            ArmMeasurements("gdn", {}, sizes)


def test_arms_that_cannot_be_compared_are_refused():
    full, gdn = measured("full", [1.0, 1.1]), measured("gdn", [1.0, 1.2])
    with pytest.raises(ValueError, match="arm 'other': its documents are not those of 'full'"):
        judge(full, [measured("other", [1.0, 1.1], sizes=BYTES + 1)], seeds=range(2))
    for arms in ([full], [gdn, gdn]):
        with pytest.raises(ValueError, match="expected each once"):
            judge(full, arms, seeds=range(2))
    for seeds in ([], [0, 1, 1]):
        with pytest.raises(ValueError, match="seeds"):
            judge(full, [gdn], seeds=seeds)
    for options in ({"alpha": 0.0}, {"alpha": 0.5}, {"margin": 0.0}, {"margin": math.nan}):
        with pytest.raises(ValueError, match=next(iter(options))):
            judge(full, [gdn], seeds=range(2), **options)


@pytest.mark.parametrize(
    ("mean", "spread", "effect", "says"),
    [
        (0.02, 0.001, 0.01, "the whole interval is at least the smallest difference of interest, 0.01"),
        (0.012, 0.003, 0.01, "more than the smallest difference of interest, 0.01, but the interval also holds less"),
        (0.005, 0.001, 0.01, "that is less than the smallest difference of interest, 0.01"),
        (0.0, 0.01, 0.005, "showing the smallest difference of interest, 0.005, would take"),
        (0.0, 0.001, 0.1, None),
    ],
)
def test_a_difference_is_held_against_the_smallest_one_of_interest(mean, spread, effect, says):
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    full, gdn = measured("full", base_S), measured("gdn", base_S + mean + spread * SPREAD)
    verdict = judge(full, [gdn], seeds=range(5), effect=effect, declared=("Declared: so.",), replicates=200)
    sentence = verdict.rows[1].sentence
    assert says in sentence if says else "of interest" not in sentence
    assert str(verdict).startswith("Declared: so.\n\nfull, the baseline")


def test_simultaneous_intervals_agree_with_the_words(every_word):
    for row in every_word.rows[1:-1]:
        claimed = row.verdict in ("better", "worse")
        assert claimed == (row.simultaneous_low >= 0 or row.simultaneous_high <= 0)


def test_arms_have_their_correlation_with_the_baseline(every_word):
    assert every_word.rows[4].rho == pytest.approx(-1)


# --- shapes of the answer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_word() -> Verdict:
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    means = {"sliding": 0.02, "gdn": -0.02, "mla": 0.0, "nsa": 0.004}
    arms = [measured(arm, base_S + mean + 0.001 * SPREAD) for arm, mean in means.items()]
    arms[2] = measured("mla", base_S + 0.0001 * SPREAD)
    arms[3] = measured("nsa", base_S + 0.001 + 0.003 * SPREAD)
    arms.append(measured("moe", base_S, failures={2: "out of memory"}))
    return judge(measured("full", base_S), arms, margin=0.002, seeds=range(5), exploratory="an arm was added late")


def test_every_word_appears(every_word):
    assert tuple(row.verdict for row in every_word.rows) == ("baseline", "worse", "better", *WORDS[3:])
    for row in every_word.rows:
        assert row.sentence.startswith(f"Exploratory (an arm was added late): {row.arm}")
        assert row.sentence.endswith(".") and "nan" not in row.sentence and "inf " not in row.sentence


def test_table(every_word):
    table = every_word.table()
    assert table.columns == COLUMNS.split()
    assert table.height == 6 and table["arm"].to_list()[0] == "full"
    kinds = {name: kind for name, kind in table.schema.items() if kind != pl.Float64}
    assert kinds == {
        **dict.fromkeys(("arm", "verdict", "sentence"), pl.String),
        **dict.fromkeys(("seeds", "failed"), pl.Int64),
        "reservations": pl.List(pl.String),
        "solved": pl.Int64,
    }


def test_plain_survives_json(every_word):
    one = judge(measured("full", [1.0]), [measured("gdn", [1.1])], seeds=[0])
    for verdict in (every_word, one):
        text = json.dumps(verdict.plain(), allow_nan=False)
        assert Verdict.from_plain(json.loads(text)) == verdict
    earlier = json.loads(text)
    for row in earlier["rows"]:
        del row["rho"]
    assert [row.rho for row in Verdict.from_plain(earlier).rows] == [None, None], "kept by a version that knew less"


def test_text(every_word):
    text = str(every_word)
    lines = text.splitlines()
    assert lines[0] == every_word.rows[0].sentence  # the noise floor comes first
    assert lines[2].split()[:3] == ["arm", "verdict", "bits/byte"] and "95 % interval" in lines[2]
    assert [line.split()[0] for line in lines[4:10]] == [row.arm for row in every_word.rows]
    assert lines[-5:] == [row.sentence for row in every_word.rows[1:]]


# --- what was compared --------------------------------------------------------------------------------------------


SUBJECT = Subject(
    {"full": {"training.learning_rate": 0.003}, "gdn": {"training.learning_rate": 0.001}},
    source="stdlib",
    documents=312,
    clusters=300,
    size=640_000,
    overlap=0.07,
    look=2,
)


def test_a_sentence_names_the_settings():
    row = against(0.012 + 0.002 * SPREAD, subject=SUBJECT)
    assert row.sentence.startswith("gdn at learning_rate 0.001 is worse than full at learning_rate 0.003 by 0.0120 ")


def test_the_head_of_a_verdict_names_the_documents():
    verdict = judge(measured("full", [1.0]), [], seeds=[0], subject=SUBJECT)
    assert str(verdict).splitlines()[0] == (
        "Measured on 312 documents (300 clusters, 640,000 bytes) of stdlib, report split; 7 % of their 13-token "
        "shingles are in the training text; look 2 at these documents. The verdict is about the chosen setting of each "
        "arm on these documents."
    )


def test_a_subject_survives_json():
    verdict = judge(measured("full", [1.0]), [], seeds=[0], subject=SUBJECT)
    assert Verdict.from_plain(json.loads(json.dumps(verdict.plain()))) == verdict


def test_reservations_follow_the_sentence():
    row = against(0.012 + 0.002 * SPREAD, reservations={"gdn": ["The optimum lies at the edge of the grid."]})
    assert row.reservations == ("The optimum lies at the edge of the grid.",)
    assert row.sentence.endswith("5 paired seeds). The optimum lies at the edge of the grid.")


# --- all pairs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_pairs() -> Verdict:
    base_S = 1.0 + 0.001 * SPREAD[::-1]
    arms = [measured("gdn", base_S + 0.02 + 0.001 * SPREAD), measured("kda", base_S + 0.04 + 0.0005 * SPREAD)]
    return judge(measured("full", base_S), arms, seeds=range(5), comparisons="all_pairs", replicates=0)


def test_every_pair_is_judged(all_pairs):
    pairs = [(pair.arm, pair.reference, pair.verdict) for pair in all_pairs.pairs]
    assert pairs == [("gdn", "full", "worse"), ("kda", "full", "worse"), ("kda", "gdn", "worse")]


def test_pairs_are_one_family(all_pairs):
    assert [pair.p_holm for pair in all_pairs.pairs] == pytest.approx(holm([pair.p for pair in all_pairs.pairs]))
    assert [row.p_holm for row in all_pairs.rows[1:]] == [pair.p_holm for pair in all_pairs.pairs[:2]]


def test_pairs_are_a_table_and_part_of_the_text(all_pairs):
    assert all_pairs.pair_table()["arm"].to_list() == ["gdn", "kda", "kda"]
    assert "All pairs:" in str(all_pairs) and str(all_pairs).endswith(all_pairs.pairs[2].sentence)


def test_pairs_survive_json(all_pairs):
    assert Verdict.from_plain(json.loads(json.dumps(all_pairs.plain(), allow_nan=False))) == all_pairs


# --- error rates of a task -----------------------------------------------------------------------------------------


def errors(arm: str, rate_S, examples: int = 200) -> ArmMeasurements:
    """An arm with these error rates; the first examples are the wrong ones."""
    wrong = {seed: (np.arange(examples) < round(rate * examples)).astype(float) for seed, rate in enumerate(rate_S)}
    return ArmMeasurements(arm, wrong, np.ones(examples))


def tasks(rate_S, base_S, **options):
    arms = [errors("sliding", rate_S)]
    options = {"replicates": 0, "upper": 1.0, "unit": "errors per answer", **options}
    return judge(errors("full", base_S), arms, seeds=range(len(base_S)), **options).rows[1]


def test_five_seeds_that_all_solve_a_task_against_five_that_do_not():
    row = tasks([0.5, 0.6, 0.55, 0.7, 0.62], [0.0, 0.01, 0.0, 0.005, 0.0])
    assert (row.verdict, row.solved) == ("worse", 0)
    assert row.p == pytest.approx(stats.fisher_exact([[0, 5], [5, 0]]).pvalue)
    assert "sliding solves the task (error at most 0.1) on 0 of 5 seeds, full on 5" in row.sentence


def test_three_seeds_decide_nothing_about_a_task():
    assert tasks([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]).verdict == "undecided"


def test_one_more_error_in_every_seed_is_within_the_noise_of_counting():
    row = tasks(np.full(8, 0.01), np.full(8, 0.005))
    assert (row.verdict, row.p) == ("undecided", 1.0) and row.low < 0 < row.high


def test_rates_that_solve_nothing_are_compared_by_sign_flips():
    base_S = np.array([0.41, 0.43, 0.46, 0.42, 0.44, 0.45, 0.47, 0.40])
    row = tasks(base_S + 0.005 * np.arange(1, 9), base_S)
    flips, shares = 2.0**-8, 1 / math.comb(16, 8)
    assert row.verdict == "worse" and row.p == row.least_p == pytest.approx(2 * (flips + shares))
    assert "Holm-adjusted p = 0.00797 of exact tests, least reachable 0.00797, 8 paired seeds" in row.sentence


def test_seeds_that_cannot_be_decisive_are_said_to_be_too_few():
    row = tasks([0.5, 0.6, 0.55, 0.7], [0.0, 0.01, 0.0, 0.005], alpha=0.01)
    assert row.verdict == "undecided" and "no outcome of 4 seeds is decisive: more seeds are needed" in row.sentence


def test_intervals_of_a_rate_stay_in_its_range():
    row = tasks([0.0, 1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0])
    assert -1 <= row.low <= row.high <= 1
    assert -1 <= row.simultaneous_low < 0 < row.simultaneous_high <= 1


def test_a_detectable_difference_outside_the_range_is_not_stated():
    row = tasks([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    assert row.detectable is None and "would need a larger difference than can exist" in row.sentence


def test_a_missing_run_of_a_task_is_bounded_by_no_and_all_errors():
    arm = ArmMeasurements("sliding", dict(errors("", [0.5, 0.6, 0.5, 0.6]).amounts), np.ones(200), {4: "killed"})
    row = judge(errors("full", [0.0] * 5), [arm], seeds=range(5), upper=1.0, replicates=0).rows[1]
    assert (row.imputed_low, row.imputed_high) == pytest.approx((2.2 / 5, 3.2 / 5))


def test_skewed_differences_are_mentioned():
    row = against(np.array([0.0, 0.0001, -0.0001, 0.0, 0.02]))
    assert row.skewness == pytest.approx(stats.skew([0.0, 0.0001, -0.0001, 0.0, 0.02]), rel=1e-6)
    assert "the differences are skewed (+1.5;" in row.sentence


# --- error rates ---------------------------------------------------------------------------------------------------


def simulated(rng, effects, seeds: int, rho: float = 0.5, sd: float = 0.0015) -> Verdict:
    """An ablation whose arms differ from the baseline by ``effects``; seeds correlate by ``rho`` between all arms."""
    shared, own = rng.normal(size=(1, seeds)), rng.normal(size=(1 + len(effects), seeds))
    bpb = 1.0 + np.array([[0.0], *([effect] for effect in effects)])
    bpb = bpb + sd * (math.sqrt(rho) * shared + math.sqrt(1 - rho) * own)
    full, *arms = (measured(f"arm{i}", row, sizes=BYTES[:2]) for i, row in enumerate(bpb))
    return judge(full, arms, seeds=range(seeds), replicates=0)


def test_null_keeps_the_family_wise_error_rate():
    """2,000 ablations of four arms that equal the baseline: at most 0.06 of them may claim any difference.

    At a true rate of 0.05 the count is Binomial(2000, 0.05): mean 100, standard error 9.7, so 120 lies 2.05 of them
    out and a fresh seed would pass in 98 of 100 cases; Holm stays below 0.05 here, as the arms share a baseline. The
    lower bound makes sure that the test can fail at all.
    """
    rng = np.random.default_rng(0)
    claims = sum(
        any(row.verdict in ("better", "worse") for row in simulated(rng, [0.0] * 4, seeds=5).rows) for _ in range(2_000)
    )
    assert 0.025 < claims / 2_000 <= 0.06


@pytest.mark.parametrize(
    ("difference", "rho", "seeds", "arms"), [(0.001, 0.8, 10, 1), (0.002, 0.5, 7, 1), (0.002, 0.5, 10, 4)]
)
def test_an_effect_is_found_with_the_planned_power(difference, rho, seeds, arms):
    """Within 5 points of the plan for alpha / arms; 600 ablations have a standard error of 1.5 points.

    Of four arms one differs; Holm then adds power only where an equal arm is rejected by chance.
    """
    sd_diff = 0.0015 * math.sqrt(2 * (1 - rho))
    assert seeds_needed(difference / sd_diff, 0.05 / arms) == seeds
    planned = power_of(seeds, difference / sd_diff, 0.05 / arms)
    rng = np.random.default_rng(seeds)
    effects = [difference] + [0.0] * (arms - 1)
    found = sum(simulated(rng, effects, seeds, rho).rows[1].verdict == "worse" for _ in range(600)) / 600
    assert found == pytest.approx(planned, abs=0.05)
