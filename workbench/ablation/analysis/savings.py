"""Effect sizes in compute: how much more or less training the baseline needs for the loss of an arm.

Every run evaluates the selection split while it trains. For a pair of runs with one seed, the loss at which they are
compared is the worse of their two final losses, which both of them reach; the ratio is what the baseline needed to
reach it over what the arm needed. A ratio of 1.17 means that the arm is worth 1.17 times the baseline's training. A
better arm is read where it reached the baseline's final loss, the baseline of a worse arm where it reached the arm's.
Definition ours; "equal loss at fewer tokens" is how Chinchilla (arXiv 2203.15556) and the speed-runs of the field state
gains.

The curves belong to one schedule each. A run whose learning rate had decayed to its end at the point where a curve is
read would have a lower loss there, so ratios between finished runs lie further from 1 than these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import polars as pl
from scipy import optimize

from workbench.ablation.verdict.statistics import Floats, paired_interval
from workbench.results.tables import Points, confirmed

__all__ = ["CAVEAT", "MEASURES", "LossCurve", "savings", "savings_sentences", "worth"]

Measure: TypeAlias = Literal["flops", "tokens", "seconds"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""What is saved."""

SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "measure": pl.String,
    "ratio": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "seeds": pl.Int64,
    "bound": pl.String,
}
CAVEAT = (
    "Worth: what the baseline needs for the loss that both reach (the worse of the two final losses on the selection "
    "split), over what the arm needs; read from the evaluations during training. Runs whose schedule ended at that "
    "point would have a lower loss, so ratios of finished runs lie further from 1."
)


@dataclass(frozen=True)
class LossCurve:
    """A run's loss over its training tokens, made monotone."""

    tokens: Floats
    """(E,) at each evaluation, increasing."""
    losses: Floats
    """(E,) decreasing: isotonic regression of the measured losses, so that noise between evaluations does not bias
    crossings."""
    per_token: Mapping[Measure, float]
    """Training FLOPs and seconds per token, means over the run; 1 for tokens."""
    flops: tuple[Floats, Floats] = (np.empty(0), np.empty(0))
    """Tokens and the FLOPs spent until then, at each evaluation, since archives have no other points: a model that
    grows costs more per token later."""

    @classmethod
    def of(cls, points: Points) -> Self | None:
        """The curve of a run's logged points; None with fewer than two evaluations."""
        tokens, losses = points.line("tokens", "selection_value")
        if len(tokens) < 2 or not tokens[0] > 0:
            return None
        last = points.last
        per_token = {measure: float(last.get(measure) or math.nan) / last["tokens"] for measure in MEASURES}
        isotonic = optimize.isotonic_regression(losses, increasing=False).x
        evaluations = Points(points.frame.filter(pl.col("selection_value").is_not_null()))
        return cls(tokens, isotonic, per_token, evaluations.line("tokens", "flops"))

    def spent(self, measure: Measure, tokens: float) -> float:
        """How much of a measure the first ``tokens`` took; NaN where it is unknown."""
        evaluated, flops = self.flops
        if measure != "flops" or not len(evaluated):
            return tokens * self.per_token[measure]
        return float(np.interp(tokens, np.concatenate(([0.0], evaluated)), np.concatenate(([0.0], flops))))

    def needed(self, loss: float) -> tuple[float, bool]:
        """Tokens until ``loss``, which the run reaches, by linear interpolation over log tokens; and whether that is
        only an upper bound, because the first evaluation is as good already."""
        first = int(np.argmax(self.losses <= loss))
        if first == 0:
            return float(self.tokens[0]), True
        (high, low), logs = self.losses[first - 1 : first + 1], np.log(self.tokens[first - 1 : first + 1])
        return float(np.exp(logs[0] + (logs[1] - logs[0]) * (high - loss) / (high - low))), False


def worth(arm: LossCurve, baseline: LossCurve) -> tuple[dict[Measure, float], str]:
    """Ratio of what the baseline needed to what the arm needed for the worse of their final losses.

    Returns:
        measure -> ratio; and "", "at least" (the arm was as good before its first evaluation), "at most" (the baseline
        was) or "unknown" (both were).
    """
    loss = max(arm.losses[-1], baseline.losses[-1])
    (needed, is_bound), (reference, is_reference_bound) = arm.needed(loss), baseline.needed(loss)
    bound = {(False, False): "", (True, False): "at least", (False, True): "at most", (True, True): "unknown"}
    ratios = {m: baseline.spent(m, reference) / arm.spent(m, needed) for m in MEASURES}
    return ratios, bound[is_bound, is_reference_bound]


def savings(run: Any) -> pl.DataFrame:
    """What each arm is worth at equal loss, in confirmation runs that share their seed with the baseline's.

    Args:
        run: anything with the runs, lines, arms, baseline and alpha of an ablation.

    Columns: arm; measure (of :data:`MEASURES`); ratio (geometric mean over seeds; above 1 the arm saves); low and high
    (t-interval of the mean log ratio at level 1 − ``run.alpha``, not corrected for the number of arms; null with one
    seed or a bound); seeds; bound ("at least" or "at most" where the loss was reached before the first evaluation of a
    run, else ""). Arms without a common loss have no row.
    """
    finished = set(confirmed(run.runs())["run"])
    curves: dict[str, dict[int, LossCurve]] = {}
    for line in run.lines():
        if line.run in finished and (curve := LossCurve.of(line.points)) is not None:
            curves.setdefault(line.arm, {})[line.seed] = curve
    rows: list[dict[str, Any]] = []
    for arm in run.arms:
        pairs = [
            worth(curve, reference)
            for seed, curve in curves.get(arm, {}).items()
            if (reference := curves.get(run.baseline, {}).get(seed)) is not None
        ]
        bounds = {bound for _, bound in pairs} - {""}
        if arm == run.baseline or not pairs or len(bounds) > 1 or "unknown" in bounds:
            continue
        rows += [
            {
                "arm": arm,
                "measure": measure,
                **_mean([ratios[measure] for ratios, _ in pairs], run.alpha, bool(bounds)),
                "bound": next(iter(bounds), ""),
            }
            for measure in MEASURES
        ]
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return table.filter(pl.col("ratio").is_finite())


def _mean(ratios: Sequence[float], alpha: float, is_bound: bool) -> dict[str, float | int | None]:
    """Geometric mean with its interval; NaN where a run does not know its time or FLOPs."""
    if not all(0 < ratio < math.inf for ratio in ratios):
        return {"ratio": math.nan, "low": None, "high": None, "seeds": len(ratios)}
    interval = paired_interval(np.log(ratios), alpha)
    has_interval = interval.n > 1 and not is_bound
    return {
        "ratio": math.exp(interval.mean),
        "low": math.exp(interval.low) if has_interval else None,
        "high": math.exp(interval.high) if has_interval else None,
        "seeds": interval.n,
    }


def savings_sentences(run: Any) -> list[str]:
    """What each arm is worth, in words, and how to read it; empty with nothing to compare."""
    table = savings(run)
    sentences = []
    for arm in table["arm"].unique(maintain_order=True):
        rows = {row["measure"]: row for row in table.filter(pl.col("arm") == arm).iter_rows(named=True)}
        seeds = max(row["seeds"] for row in rows.values())
        parts = [
            _worth(rows[measure], words, run.alpha)
            for measure, words in (("flops", "compute"), ("tokens", "tokens"), ("seconds", "at equal wall-clock"))
            if measure in rows
        ]
        plural = "s" * (seeds > 1)
        sentences.append(f"{arm} is worth {', '.join(parts)}: against {run.baseline}, {seeds} paired seed{plural}.")
    return [*sentences, CAVEAT] if sentences else []


def _worth(row: Mapping[str, Any], words: str, alpha: float) -> str:
    bound = f"{row['bound']} " if row["bound"] else ""
    interval = ""
    if row["low"] is not None:
        interval = f" ({100 * (1 - alpha):g} % interval {row['low']:.2f} to {row['high']:.2f})"
    return f"{bound}{row['ratio']:.2f}× {words}{interval}"
