"""Scores of suites as measurements, and verdicts by secondary metrics in their declared order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers import ablation_fields
from scipy import stats

from workbench.ablation.ablation import Ablation
from workbench.ablation.analysis.archive import archive
from workbench.ablation.execution.plan import Plan
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.protocol import ScoreMetric
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import Score, judge, judge_in_order
from workbench.ablation.verdict.scores import final_scores, measured_score
from workbench.ablation.verdict.statistics import holm, holm_in_order
from workbench.ablation.verdict.verdict import Verdict
from workbench.cli.results import scores as scores_command
from workbench.config import ConfigError
from workbench.files import read_json
from workbench.results.scores import ScoreTable
from workbench.results.tables import RUN_SCHEMA, SCORES_SCHEMA
from workbench.status import Stage, Status

ACCURACY = ScoreMetric(suite="ruler", metric="accuracy")
BITS = ScoreMetric(suite="loss", metric="bits per byte")


def rows(
    arm: str,
    seed: int,
    values: list[float],
    *,
    task: str = "vt",
    suite: str = "ruler",
    metric: str = "accuracy",
    counts: list[float] | None = None,
    upper: float | None = 1.0,
    better: bool = True,
    step: int = 10,
    **labels: list[Any],
) -> pl.DataFrame:
    """A task as its table has it: the row of all documents, then every document."""
    counts = counts or [1.0] * len(values)
    whole = float(np.average(values, weights=counts))
    about = {"arm": arm, "stage": "confirmation", "run": f"{arm}-{seed}", "seed": seed, "step": step}
    about |= {"split": "report", "suite": suite, "task": task, "metric": metric, "higher_is_better": better}
    table = [about | {"document": None, "value": whole, "count": sum(counts), "upper": upper}]
    table += [
        about
        | {"document": number, "value": value, "count": counts[number], "upper": upper}
        | {name: column[number] for name, column in labels.items()}
        for number, value in enumerate(values)
    ]
    return pl.DataFrame(table, schema_overrides=SCORES_SCHEMA, infer_schema_length=None)


def table(*frames: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=SCORES_SCHEMA), *frames], how="diagonal_relaxed")


def values(score: Score, *seeds: int) -> list[list[float]]:
    return [arm.values(seeds).tolist() for arm in score.arms]


# -- from the table to measurements ----------------------------------------------------------------------------------


def test_an_accuracy_counts_as_its_errors() -> None:
    score = measured_score(table(rows("a", 0, [1, 0, 1, 1]), rows("b", 0, [1, 1, 1, 1])), ACCURACY, ["a", "b"], [0])
    assert values(score, 0) == [[0.25], [0.0]]
    assert (score.unit, score.upper) == ("1 − accuracy", 1.0)


def test_a_loss_stays_as_it_is() -> None:
    frame = rows("a", 0, [2.0, 1.0], suite="loss", metric="bits per byte", counts=[1, 3], upper=None, better=False)
    score = measured_score(table(frame), BITS, ["a"], [0])
    assert values(score, 0) == [[pytest.approx(1.25)]]
    assert (score.unit, score.upper) == ("bits per byte", None)


def test_a_score_without_bound_changes_its_sign() -> None:
    frame = rows("a", 0, [-2.0], metric="loglikelihood", upper=None)
    score = measured_score(table(frame), ScoreMetric(suite="ruler", metric="loglikelihood"), ["a"], [0])
    assert values(score, 0) == [[2.0]]
    assert score.unit == "−loglikelihood"


def test_tasks_weigh_the_same_whatever_their_documents() -> None:
    frame = table(rows("a", 0, [1, 1, 1, 0]), rows("a", 0, [0.0, 0.0], task="fwe"))
    assert values(measured_score(frame, ACCURACY, ["a"], [0]), 0) == [[pytest.approx(1 - (0.75 + 0) / 2)]]


def test_labels_choose_documents() -> None:
    frame = table(rows("a", 0, [1, 0, 0, 0], length=[1024, 1024, 4096, 4096]))
    at = {length: ScoreMetric(suite="ruler", metric="accuracy", where={"length": length}) for length in (1024, 4096, 7)}
    assert values(measured_score(frame, at[1024], ["a"], [0]), 0) == [[0.5]]
    assert values(measured_score(frame, at[4096], ["a"], [0]), 0) == [[1.0]]
    assert not measured_score(frame, at[7], ["a"], [0]).arms


def test_documents_are_kept_where_runs_have_the_same_ones() -> None:
    frame = table(*(rows("a", seed, [1, 0, 1], cluster=[0, 0, 1]) for seed in range(3)))
    (arm,) = measured_score(frame, ACCURACY, ["a"], [0, 1, 2]).arms
    assert len(arm.sizes_D) == 3
    assert arm.num_clusters == 2


def test_other_documents_are_compared_as_wholes() -> None:
    frame = table(rows("a", 0, [1, 0]), rows("b", 0, [1, 0, 1, 0]))
    score = measured_score(frame, ACCURACY, ["a", "b"], [0])
    assert values(score, 0) == [[0.5], [0.5]]
    assert all(len(arm.sizes_D) == 1 for arm in score.arms)


def test_a_score_of_the_whole_task_counts_as_one_document() -> None:
    frame = rows("a", 0, [0.25] * 8, metric="macro F1").filter(pl.col("document").is_null())
    (arm,) = measured_score(table(frame), ScoreMetric(suite="ruler", metric="macro F1"), ["a"], [0]).arms
    assert arm.values([0]).tolist() == [0.75]
    assert arm.sizes_D.tolist() == [8.0]


def test_a_run_that_lacks_a_task_is_not_measured() -> None:
    frame = table(rows("a", 0, [1, 1]), rows("a", 0, [0, 0], task="fwe"), rows("a", 1, [1, 1]))
    (arm,) = measured_score(frame, ACCURACY, ["a"], [0, 1]).arms
    assert dict(arm.failures) == {1: "not measured"}
    assert arm.values([0, 1]).tolist() == [0.5]


def test_a_run_that_failed_stays_failed() -> None:
    frame = table(rows("a", 0, [1]), rows("b", 0, [1]), rows("b", 1, [1]))
    a, _ = measured_score(frame, ACCURACY, ["a", "b"], [0, 1], {"a": {1: "diverged"}}).arms
    assert dict(a.failures) == {1: "diverged"}


def test_only_the_ends_of_confirmation_runs_count() -> None:
    runs = pl.DataFrame(
        [
            {"arm": "a", "stage": "confirmation", "run": "a-0", "seed": 0, "status": "done", "steps": 10},
            {"arm": "a", "stage": "confirmation", "run": "a-1", "seed": 1, "status": "diverged", "steps": 10},
        ],
        schema=RUN_SCHEMA,
    )
    frame = table(rows("a", 0, [1], step=5), rows("a", 0, [0]), rows("a", 1, [1]))
    assert final_scores(frame, runs).select("seed", "step").unique().rows() == [(0, 10)]


# -- the order -------------------------------------------------------------------------------------------------------


def test_one_metric_is_holm() -> None:
    p_m = np.random.default_rng(0).uniform(size=6)
    assert holm_in_order(p_m[:, None])[:, 0] == pytest.approx(holm(p_m))


def test_one_arm_is_a_fixed_sequence() -> None:
    assert holm_in_order([[0.01, 0.03, 0.02, 0.2, 0.001]]).tolist() == [[0.01, 0.03, 0.03, 0.2, 0.2]]


def test_two_arms_by_hand() -> None:
    # a: 0.01 · 2; its second at ½ alpha: 0.03 · 2; then all of alpha goes to b: 0.05, and its second 0.04 stays behind
    assert holm_in_order([[0.01, 0.03], [0.05, 0.04]]) == pytest.approx(np.array([[0.02, 0.06], [0.06, 0.06]]))


def graph_adjusted(p_mk: np.ndarray) -> np.ndarray:
    """Algorithm 2 of Bretz et al. (2009) on the whole graph, by its matrix of transitions."""
    m, k = p_mk.shape
    p, n = p_mk.ravel(), m * k
    weight, edges = np.zeros(n), np.zeros((n, n))
    for arm in range(m):
        weight[arm * k] = 1 / m
        for metric in range(k - 1):
            edges[arm * k + metric, arm * k + metric + 1] = 1
        for other in set(range(m)) - {arm}:
            edges[arm * k + k - 1, other * k] = 1 / (m - 1)
    left, adjusted, highest = set(range(n)), np.ones(n), 0.0
    while left:
        ratio = {i: p[i] / weight[i] if weight[i] > 0 else np.inf for i in left}
        j = min(ratio, key=ratio.__getitem__)
        highest = adjusted[j] = max(highest, min(1.0, ratio[j]))
        left.remove(j)
        weight += weight[j] * edges[j]
        new = np.zeros_like(edges)
        for a in left:
            for b in left - {a}:
                back = edges[a, j] * edges[j, a]
                new[a, b] = (edges[a, b] + edges[a, j] * edges[j, b]) / (1 - back) if back < 1 else 0
        edges = new
    return adjusted.reshape(m, k)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (3, 2), (4, 3)])
def test_it_is_the_graphical_procedure(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        p_mk = random.uniform(size=shape) ** 4
        assert holm_in_order(p_mk) == pytest.approx(graph_adjusted(p_mk))


# -- verdicts --------------------------------------------------------------------------------------------------------


def losses(arm: str, mean: float, *, seeds: int = 8, noise: float = 0.01, offset: int = 0) -> ArmMeasurements:
    """An arm with a loss of this mean over one document."""
    random = np.random.default_rng([offset, *arm.encode()])
    return ArmMeasurements(arm, {s: np.array([random.normal(mean, noise)]) for s in range(seeds)}, np.ones(1))


def decide(*scores: Score, **options: Any) -> tuple[Verdict, ...]:
    return judge_in_order(scores, baseline="a", seeds=range(8), replicates=0, **options)


def words(verdicts: tuple[Verdict, ...]) -> list[list[str]]:
    return [[row.verdict for row in verdict.rows[1:]] for verdict in verdicts]


def test_one_metric_is_judged_as_a_primary_one() -> None:
    arms = [losses("a", 1.0), losses("b", 1.02), losses("c", 1.001)]
    (secondary,) = decide(Score(arms, "nats"))
    primary = judge(arms[0], arms[1:], seeds=range(8), replicates=0)
    for mine, other in zip(secondary.rows, primary.rows, strict=True):
        assert (mine.verdict, mine.low, mine.high) == (other.verdict, other.low, other.high)
        assert mine.p_holm == (None if other.p_holm is None else pytest.approx(other.p_holm, rel=1e-9))


def test_nothing_is_claimed_behind_a_metric_without_a_claim() -> None:
    equal, apart = (Score([losses("a", 1.0), losses("b", mean)], "x") for mean in (1.0, 1.5))
    assert words(decide(apart, equal, apart)) == [["worse"], ["undecided"], ["undecided"]]
    assert words(decide(apart, apart, equal)) == [["worse"], ["worse"], ["undecided"]]


def test_the_order_does_not_shrink_intervals() -> None:
    apart = Score([losses("a", 1.0), losses("b", 1.5)], "x")
    alone, behind = decide(apart)[0].rows[1], decide(Score([losses("a", 1), losses("b", 1)], "x"), apart)[1].rows[1]
    assert (alone.low, alone.high, alone.p) == (behind.low, behind.high, behind.p)
    assert alone.p_holm != behind.p_holm


def test_a_metric_that_was_not_measured_ends_the_order() -> None:
    apart = Score([losses("a", 1.0), losses("b", 1.5)], "x", label="second")
    missing, second = decide(Score((), "x", label="first"), apart)
    assert missing.rows == ()
    assert second.rows[1].verdict == "undecided"


def test_the_word_has_the_sign_of_the_difference() -> None:
    better, worse = ([losses("a", 1.0), losses("b", mean)] for mean in (0.8, 1.2))
    assert words(decide(Score(better, "x"), Score(worse, "x"))) == [["better"], ["worse"]]


def test_arms_have_orders_of_their_own() -> None:
    first = [losses("a", 1.0), losses("b", 1.0), losses("c", 1.5)]
    second = [losses("a", 1.0), losses("b", 1.5), losses("c", 1.5)]
    assert words(decide(Score(first, "x"), Score(second, "x"))) == [["undecided", "worse"], ["undecided", "worse"]]


def test_equivalences_skip_metrics_without_a_margin() -> None:
    equal = [losses("a", 1.0), losses("b", 1.001)]
    free, bounded = decide(Score(equal, "x"), Score(equal, "x", margin=0.1))
    assert (free.rows[1].p_equivalence, free.rows[1].verdict) == (None, "undecided")
    assert bounded.rows[1].verdict == "equivalent"


def test_a_rate_is_judged_by_exact_tests() -> None:
    arms = [
        ArmMeasurements(arm, {s: np.array([rate * 100]) for s in range(8)}, np.array([100.0]))
        for arm, rate in (("a", 0.6), ("b", 0.2))
    ]
    noisy = [ArmMeasurements(p.arm, {s: v + s for s, v in p.amounts.items()}, p.sizes_D) for p in arms]
    noisy[1] = ArmMeasurements("b", {s: v - 2 * s for s, v in arms[1].amounts.items()}, arms[1].sizes_D)
    (verdict,) = decide(Score(noisy, "1 − accuracy", 1.0))
    # all eight signs agree: 2 · 2⁻⁸, over the weight of sign flips beside 1 / C(16, 8)
    weight = 2**-8 / (2**-8 + 1 / 12870)
    assert verdict.rows[1].p == pytest.approx(2 * 2**-8 / weight)
    assert verdict.rows[1].verdict == "better"


def test_a_secondary_verdict_survives_as_plain_data() -> None:
    arms = [losses("a", 1.0), losses("b", 1.5)]
    whole = judge(arms[0], arms[1:], seeds=range(8), replicates=0)
    whole = replace(whole, secondary=decide(Score(arms, "x", label="s"), Score((), "x", label="t")))
    assert Verdict.from_plain(whole.plain()) == whole
    assert whole.secondary_table()["metric"].to_list() == ["s", "s"]


def test_the_text_has_a_section_of_secondary_metrics() -> None:
    arms = [losses("a", 1.0), losses("b", 1.5)]
    whole = judge(arms[0], arms[1:], seeds=range(8), replicates=0)
    secondary = decide(Score(arms, "1 − accuracy", label="ruler: accuracy"), Score((), "x", label="t"))
    text = str(replace(whole, secondary=secondary))
    head, section = text.split("Secondary metrics.")
    assert str(whole).rstrip() == head.rstrip()
    assert "t was not measured." in section
    assert "ruler: accuracy: b is worse than a by 0.4967 in 1 − accuracy (" in section


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_family_wise_error_is_at_most_alpha(correlation: float) -> None:
    """Three arms that differ in the first of four metrics: 4,000 ablations, paired t over 6 seeds."""
    random, draws, arms, metrics, seeds = np.random.default_rng(2), 4_000, 3, 4, 6
    shared = random.normal(size=(draws, 1, 1, seeds))
    noise = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * random.normal(size=(draws, arms, metrics, seeds))
    noise[:, :, 0] += 3.0
    p = stats.ttest_1samp(noise, 0, axis=-1).pvalue
    false = sum((holm_in_order(one)[:, 1:] <= 0.05).any() for one in p) / draws
    assert false <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
    assert correlation or false > 0.03  # it is not needlessly strict


# -- an ablation that declares them ----------------------------------------------------------------------------------

Make = Callable[..., Ablation]
RECALL = {"kind": "answers", "name": "recall", "data": {"kind": "mqar", "mixes": [{"length": 32, "pairs": 4}]}}
DECLARED: dict[str, Any] = {
    "tuning": {"trials": 0},
    "confirmation": {"seeds": [0, 1, 2, 3, 4, 5, 6, 7]},
    "base": {"evaluation": [RECALL, "loss"]},
    "protocol": {
        "secondary": [
            {"suite": "recall", "metric": "errors per answer", "where": {"length": 32}, "effect": 0.1},
            {"suite": "loss", "task": "text", "metric": "nats per token", "margin": 0.5},
        ]
    },
}


@pytest.fixture(scope="module")
def finished_suites(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> AblationRun:
    """An ablation whose runs ended without training: the second arm recalls, and has the loss of the first. Read
    only."""
    run = Ablation.parse(ablation_fields(corpus, **DECLARED), tmp_path_factory.mktemp("suites")).create()
    plan, random = Plan(run.files), np.random.default_rng(0)
    for number, arm in enumerate(run.arms):
        for seed in run.seeds:
            folder = plan.create_run(arm, Stage.CONFIRMATION, seed, {})
            folder.add_to_environment(device="none", code="1", python="3", libraries={"torch": "2"})
            sizes = np.full(3, 100.0)
            report = {run.metric.numerator: random.normal(2, 0.01) * sizes, run.metric.denominator: sizes}
            folder.write_report(pl.DataFrame(report))
            folder.finish(Status.DONE, None, selection_value=2.0, report_value=2.0)
            errors = np.full(20, 0.9 - 0.8 * number) + 0.01 * seed * (1 - 2 * number)
            about: dict[str, Any] = {"better": False, "step": folder.record().steps}
            recall = rows(arm, seed, errors.tolist(), metric="errors per answer", length=[32] * 20, **about)
            losses = random.normal(3, 0.01, 4).tolist()
            nats = rows(arm, seed, losses, metric="nats per token", upper=None, **about)
            for suite, task, frame in (("recall", "mqar", recall), ("loss", "text", nats)):
                measured = frame.drop("arm", "stage", "run", "seed", "step", "split", "suite", "task")
                ScoreTable(folder.suites_path, suite, {}).add(about["step"], "report", task, measured)
    run.files.mark_finished(True)
    return run


def test_the_verdict_has_a_part_for_each_secondary_metric(finished_suites: AblationRun) -> None:
    verdict = finished_suites.verdict()
    assert verdict is not None
    recall, nats = verdict.secondary
    assert [recall.label, nats.label] == ["recall, length 32: errors per answer", "loss text: nats per token"]
    assert (recall.rows[1].verdict, nats.rows[1].verdict) == ("better", "equivalent")
    assert recall.rows[1].difference == pytest.approx(-0.8 - 0.02 * 3.5)
    assert any("Secondary, in this order: recall, length 32: errors per answer (" in line for line in verdict.declared)


def test_the_primary_verdict_does_not_depend_on_suites(finished_suites: AblationRun, tmp_path: Path) -> None:
    shutil.copytree(finished_suites.folder, tmp_path / "test")
    for path in tmp_path.glob("test/runs/*/suites"):
        shutil.rmtree(path)
    before, after = finished_suites.verdict(), AblationRun(tmp_path / "test").verdict()
    assert before is not None and after is not None
    assert after.rows == before.rows
    assert [part.rows for part in after.secondary] == [(), ()]


def test_a_run_whose_suite_failed_counts_as_missing(finished_suites: AblationRun, tmp_path: Path) -> None:
    shutil.copytree(finished_suites.folder, tmp_path / "test")
    next(path for path in tmp_path.glob("test/runs/*/suites/recall.parquet") if "sliding" in str(path)).unlink()
    verdict = AblationRun(tmp_path / "test").verdict()
    assert verdict is not None
    row = verdict.secondary[0].rows[1]
    assert (row.seeds, row.failed) == (7, 1)
    assert "not measured" in row.sentence


def test_an_archive_keeps_them(finished_suites: AblationRun, tmp_path: Path) -> None:
    folder = archive(finished_suites, tmp_path / "archive")
    archived = AblationRun(folder)
    old, new = finished_suites.verdict(), archived.verdict()
    assert old is not None and new is not None
    assert new.secondary == old.secondary
    assert "Secondary metrics." in (folder / "verdict.md").read_text(encoding="utf-8")
    assert len(read_json(folder / "verdict.json")["secondary"]) == 2
    assert archived.scores().equals(finished_suites.scores())


def test_the_command_prints_and_writes_the_table(
    finished_suites: AblationRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores_command(finished_suites.folder, tmp_path / "t.csv", arms=False, lengths=True, metrics=False)
    assert "recall mqar, 32" in capsys.readouterr().out
    written = pl.read_csv(tmp_path / "t.csv")
    assert {"suite", "task", "metric", "arm", "value"} <= set(written.columns)
    scores_command(finished_suites.folder, tmp_path / "t.md", arms=False, lengths=True, metrics=False)
    assert "| 0.935 ±" in (tmp_path / "t.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("secondary", "path"),
    [
        ({"suite": "recal", "metric": "errors per answer"}, r"secondary\[0\].suite.*Nearest valid name: 'recall'"),
        ({"suite": "recall", "metric": "errors"}, r"secondary\[0\].metric.*Nearest valid name: 'errors per answer'"),
        ({"suite": "recall", "task": "mqr", "metric": "errors per answer"}, r"secondary\[0\].task.*'mqar'"),
        (
            {"suite": "recall", "metric": "errors per answer", "where": {"length": 64}},
            r"secondary\[0\].where.length: got 64; expected one of 32",
        ),
    ],
)
def test_a_score_that_no_suite_measures_is_refused(ablation: Make, secondary: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        ablation(**DECLARED | {"protocol": {"secondary": [secondary]}}).create()


@pytest.mark.parametrize("suite", [{"when": [1]}, {"split": "selection"}])
def test_a_suite_that_does_not_measure_the_report_at_the_end_is_refused(ablation: Make, suite: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"protocol.secondary\[0\].suite"):
        ablation(**DECLARED | {"base": {"evaluation": [RECALL | suite, "loss"]}})
