"""Scores of value detection.

The official score is the harmonic mean of macro precision and macro recall,

    P = mean_j TP_j / (TP_j + FP_j)        R = mean_j TP_j / (TP_j + FN_j)        score = 2 P R / (P + R)

over the labels with at least one argument in the truth; a precision is 0 where nothing is predicted. The mean of
per-label F1 is another number: .25 where the official score is .26 (all ones on the main test set).

Legend: N arguments, J labels, R resamples, S seeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PUBLISHED = {
    "test": {"all ones": 0.26, "BERT": 0.42, "best system": 0.56},
    "test-nahjalbalagha": {"all ones": 0.13, "BERT": 0.28, "best system": 0.40},
    "test-nyt": {"all ones": 0.15, "BERT": 0.24, "best system": 0.34},
}
"""Official scores in the organisers' tables (SemEval-2023 task 4), by test set."""


class Scores(NamedTuple):
    """Scores of predictions."""

    official: float
    """Harmonic mean of macro precision and macro recall."""
    mean_f1: float
    """Mean of the labels' F1."""
    f1: np.ndarray
    """(J,) F1 of every label; NaN where no argument has it."""


def scores(truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """Scores of (N, J) boolean predictions.

    Raises:
        ValueError: when no argument has any label.
    """
    weights = np.ones((1, len(truth)))
    official, mean_f1, f1 = _weighted(np.asarray(truth, bool), np.asarray(predicted, bool), weights)
    if np.isnan(official[0]):
        raise ValueError("no argument has any label")
    return Scores(float(official[0]), float(mean_f1[0]), f1[0])


def all_ones(truth: np.ndarray) -> Scores:
    """Scores of predicting every value for every argument: the organisers' 1-Baseline."""
    return scores(truth, np.ones_like(np.asarray(truth, bool)))


def thresholds(truth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(J,) thresholds that maximise each label's F1 on these (N, J) values; an argument has the label where its value
    is at least the threshold.

    To be called on validation data only. Thresholds are midpoints between neighbouring values; where several are
    equally good, the highest one is taken; a label without arguments is never predicted.
    """
    truth, values = np.asarray(truth, bool), np.asarray(values, np.float64)
    chosen = np.full(truth.shape[1], np.inf)
    for j in np.flatnonzero(truth.any(0)):
        order = np.argsort(-values[:, j], kind="stable")
        sorted_values, hits = values[order, j], np.cumsum(truth[order, j])
        taken = np.arange(1, len(order) + 1)
        f1 = 2 * hits / (taken + hits[-1])
        last_of_ties = np.append(sorted_values[1:] < sorted_values[:-1], True)
        best = int(np.argmax(np.where(last_of_ties, f1, -1)))
        below = sorted_values[best + 1] if best + 1 < len(order) else sorted_values[best] - 1
        chosen[j] = (sorted_values[best] + below) / 2
    return chosen


class Interval(NamedTuple):
    """A bootstrap interval of the mean over seeds."""

    low: float
    high: float


def intervals(
    truth: np.ndarray, predicted: np.ndarray, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """Percentile bootstrap over arguments of the official score, the mean F1 and the lift over all ones.

    Args:
        truth: (N, J).
        predicted: (S, N, J), the predictions of every seed; their scores are averaged in every resample.
        seed: of the resamples.
        resamples: R.
        level: coverage.

    Returns:
        "official", "mean F1", "lift" -> interval.
    """
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    N = len(truth)
    weights_RN = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=resamples).astype(np.float64)
    official, mean_f1 = np.zeros(resamples), np.zeros(resamples)
    for prediction in predicted:
        one_official, one_mean, _ = _weighted(truth, prediction, weights_RN)
        official += one_official / len(predicted)
        mean_f1 += one_mean / len(predicted)
    baseline, _, _ = _weighted(truth, np.ones_like(truth), weights_RN)
    columns = {"official": official, "mean F1": mean_f1, "lift": official - baseline}
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {name: Interval(*map(float, np.nanquantile(column, tails))) for name, column in columns.items()}


def _weighted(
    truth: np.ndarray, predicted: np.ndarray, weights_RN: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) official score, (R,) mean F1 and (R, J) F1 with arguments counted by weight; NaN without any label."""
    relevant_RJ, taken_RJ = weights_RN @ truth, weights_RN @ predicted
    hits_RJ = weights_RN @ (truth & predicted)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall_RJ = np.where(relevant_RJ > 0, hits_RJ / relevant_RJ, np.nan)
        precision_RJ = np.where(taken_RJ > 0, hits_RJ / taken_RJ, 0.0)
        precision_RJ = np.where(relevant_RJ > 0, precision_RJ, np.nan)
        f1_RJ = np.where(relevant_RJ > 0, 2 * hits_RJ / (relevant_RJ + taken_RJ), np.nan)
        labels_R = (relevant_RJ > 0).sum(1)
        P, R, mean = (np.nansum(part, axis=1) / labels_R for part in (precision_RJ, recall_RJ, f1_RJ))
        official = np.where(P + R > 0, 2 * P * R / (P + R), np.where(labels_R > 0, 0.0, np.nan))
    return official, mean, f1_RJ
