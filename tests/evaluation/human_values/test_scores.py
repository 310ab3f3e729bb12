"""Scores of value detection: hand computation, and the organisers' published rows."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.evaluation.human_values.arguments import VALUES
from workbench.evaluation.human_values.scores import PUBLISHED, all_ones, intervals, scores, thresholds

TRUTH = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
PREDICTED = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0]], bool)

# per-label F1 in the organisers' table of the main test set, in the order of the values
ALL_ONES = ".17 .40 .09 .03 .41 .13 .12 .12 .51 .40 .19 .31 .07 .09 .35 .19 .54 .17 .22 .46"
BERT = ".44 .55 .05 .20 .56 .29 .44 .13 .74 .59 .43 .47 .23 .07 .46 .14 .67 .71 .32 .33"
BEST = ".57 .71 .32 .25 .66 .47 .53 .38 .76 .64 .63 .60 .65 .32 .57 .43 .73 .82 .46 .52"


def numbers(row: str) -> np.ndarray:
    return np.array(row.split(), float)


def test_the_official_score_by_hand() -> None:
    """Labels 1 and 2: precision 1/2 and 1/2, recall 1/2 and 1/2; the third has no argument and does not count."""
    result = scores(TRUTH, PREDICTED)
    assert (result.official, result.mean_f1) == (0.5, 0.5)
    assert result.f1[:2].tolist() == [0.5, 0.5] and np.isnan(result.f1[2])


def test_the_two_means_differ() -> None:
    """P = (1/3 + 1) / 2, R = (1 + 1/2) / 2; F1 = 1/2 and 2/3."""
    truth = np.array([[1, 1], [0, 1], [0, 0]], bool)
    predicted = np.array([[1, 1], [1, 0], [1, 0]], bool)
    result = scores(truth, predicted)
    assert result.official == pytest.approx(2 * (2 / 3) * (3 / 4) / (2 / 3 + 3 / 4))
    assert result.mean_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_nothing_predicted_is_zero() -> None:
    assert scores(TRUTH, np.zeros_like(TRUTH)).official == 0


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no argument has any label"):
        scores(np.zeros((3, 2)), np.ones((3, 2)))


@pytest.fixture(scope="module")
def main_test_set() -> np.ndarray:
    """1,576 arguments with the prevalences of the main test set."""
    counts = [round(value.prevalence * 1576) for value in VALUES]
    return np.arange(1576)[:, None] < np.array(counts)


def test_all_ones_gets_the_published_score(main_test_set: np.ndarray) -> None:
    assert round(all_ones(main_test_set).official, 2) == PUBLISHED["test"]["all ones"] == 0.26


def test_all_ones_gets_the_published_row(main_test_set: np.ndarray) -> None:
    assert np.abs(all_ones(main_test_set).f1 - numbers(ALL_ONES)).max() <= 0.011


@pytest.mark.parametrize(("row", "mean"), [(ALL_ONES, 0.25), (BERT, 0.39), (BEST, 0.55)])
def test_means_of_the_published_rows(row: str, mean: float) -> None:
    """Each below the official score of its system: .26, .42, .56."""
    assert round(float(numbers(row).mean()), 2) == mean


def test_prevalences_follow_from_the_row_of_all_ones() -> None:
    row = numbers(ALL_ONES)
    assert np.abs(row / (2 - row) - [value.prevalence for value in VALUES]).max() < 0.0061


# -- thresholds


def best_f1(truth: np.ndarray, values: np.ndarray) -> float:
    """Largest F1 over all thresholds, by trying every one."""
    return max(
        2 * (truth & (values >= t)).sum() / (truth.sum() + (values >= t).sum())
        for t in np.append(values, values + 1e-9)
    )


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_give_the_largest_f1(ties: bool) -> None:
    generator = np.random.default_rng(0)
    truth, values = generator.random((40, 20)) < 0.3, generator.normal(size=(40, 20))
    values = np.round(values) if ties else values
    chosen = thresholds(truth, values)
    for j in range(20):
        predicted = values[:, j] >= chosen[j]
        f1 = 2 * (truth[:, j] & predicted).sum() / (truth[:, j].sum() + predicted.sum())
        assert f1 == pytest.approx(best_f1(truth[:, j], values[:, j]))


def test_thresholds_lie_between_values() -> None:
    assert thresholds(np.array([[1], [1], [0]], bool), np.array([[3.0], [2.0], [0.0]])).tolist() == [1.0]


def test_a_label_without_arguments_is_never_predicted() -> None:
    assert thresholds(np.zeros((3, 1), bool), np.zeros((3, 1))).tolist() == [np.inf]


# -- intervals


def test_intervals_agree_with_drawing_arguments_one_by_one() -> None:
    generator = np.random.default_rng(1)
    truth = generator.random((300, 4)) < 0.4
    predicted = truth ^ (generator.random((2, 300, 4)) < 0.2)
    bounds = intervals(truth, predicted, resamples=1500)
    drawn = []
    for _ in range(1500):
        index = generator.integers(300, size=300)
        drawn.append(np.mean([scores(truth[index], one[index]).official for one in predicted]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert bounds["official"] == pytest.approx((low, high), abs=0.006)


def test_the_lift_is_resampled_together() -> None:
    """Predictions of all ones have no lift in any resample."""
    truth = np.random.default_rng(2).random((50, 3)) < 0.5
    assert intervals(truth, np.ones((1, 50, 3), bool))["lift"] == (0.0, 0.0)
