"""Several ablations of the same arms at other sizes or horizons: does the order hold, and where do scaling laws lead?

No torch. Runs that share a trunk (`workbench branch`) are correlated over horizons: they count as one seed, so nothing here
adds seeds up over ablations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import optimize, stats

from workbench.ablation.verdict.statistics import Floats
from workbench.config import ConfigError
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["Comparison", "ScalingLaw", "compare", "fit_scaling_law", "rank_stability"]

X = {"flops": "training_flops", "parameters": "non_embedding", "tokens": "tokens"}
"""What a law is fitted over -> column of the cost table."""
WITH_FLOOR = 4
"""Points from which on the law has an irreducible part (ours); with fewer it is a plain power law."""


@dataclass(frozen=True)
class ScalingLaw:
    """L(x) = floor + A · x^(−exponent), fitted to geometric means over seeds; intervals by drawing seeds anew at every x."""

    floor: float
    scale: float
    """A."""
    exponent: float
    exponent_low: float | None
    """None where some x has one seed: nothing is known of the noise there."""
    exponent_high: float | None
    points: int
    replicates: Floats
    """(R, 3): floor, log A, exponent of every bootstrap replicate; none where some x has one seed."""

    def at(self, x: float) -> tuple[float, float | None, float | None]:
        """Value at x with its 95 % interval over replicates, where there are any."""
        value = self.floor + self.scale * x**-self.exponent
        values = self.replicates[:, 0] + np.exp(self.replicates[:, 1] - self.replicates[:, 2] * math.log(x))
        return value, *_interval(values)

    def told(self, x: str, unit: str) -> str:
        """The law in words, without a full stop; ``x`` is what it is fitted over, ``unit`` that of the loss."""
        floor = f"{self.floor:.4g} + " if self.floor else ""
        law = f"{unit} = {floor}{self.scale:.4g} · {x}^−{self.exponent:.4f}"
        if self.exponent_low is None:
            return f"{law}, no interval where a place has one seed ({self.points} places)"
        return (
            f"{law}, exponent {self.exponent_low:.4f} to {self.exponent_high:.4f} (95 % over seeds, "
            f"{self.points} places)"
        )


def _interval(values: Floats) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of bootstrap values; nothing of none."""
    if not values.size:
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def fit_scaling_law(values: Mapping[float, Sequence[float]], replicates: int = 300, seed: int = 0) -> ScalingLaw:
    """Fit by least squares of log L (so that sizes of loss count alike), over seeds' means of log L.

    The interval has the noise over seeds in it, not that the law may be the wrong one; what is carried on beyond the largest x
    should be read accordingly.

    Args:
        values: x -> losses over seeds, at least two x; positive.
        replicates: bootstrap draws of seeds within every x.

    Raises:
        ValueError: with fewer than two x, or values that are not positive.
    """
    xs = np.array(sorted(values))
    groups = [np.asarray(values[x], np.float64) for x in xs]
    if len(xs) < 2 or xs[0] <= 0 or any(g.size == 0 or not ((g > 0) & np.isfinite(g)).all() for g in groups):
        raise ValueError(f"values: got {len(xs)} place(s); expected at least two positive x with positive losses each.")
    logs = [np.log(g) for g in groups]  # drawn there, no replicate is a loss below zero
    with_floor = len(xs) >= WITH_FLOOR
    best = _fit(xs, np.array([np.exp(group.mean()) for group in logs]), with_floor, None)
    rng = np.random.default_rng(seed)

    def mean(group: Floats) -> float:
        widened = math.sqrt(group.size / max(1, group.size - 1)) * _stretch(group.size)
        return math.exp(group.mean() + widened * (rng.choice(group, group.size).mean() - group.mean()))

    known = replicates if min(group.size for group in logs) > 1 else 0
    drawn = [_fit(xs, np.array([mean(group) for group in logs]), with_floor, best) for _ in range(known)]
    table = np.array(drawn).reshape(-1, 3)
    low, high = _interval(table[:, 2])
    return ScalingLaw(float(best[0]), float(np.exp(best[1])), float(best[2]), low, high, len(xs), table)


def _stretch(n: int) -> float:
    """How much longer a t-interval over n seeds is than a normal one; bootstrap draws of few seeds lie too close together."""
    return float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975)) if n > 1 else 1.0


def _fit(x: Floats, y: Floats, with_floor: bool, start: Floats | None) -> Floats:
    """Floor, log A, exponent."""
    log_x, log_y = np.log(x), np.log(y)
    slope, intercept = np.polyfit(log_x, log_y, 1)
    if not with_floor:
        return np.array([0.0, intercept, -slope])
    middle = log_x.mean()  # A is fitted at the middle of the data: far from it the three would hardly be told apart

    def residuals(p: Floats) -> Floats:
        return np.log(np.exp(p[0]) + np.exp(p[1] - np.exp(p[2]) * (log_x - middle))) - log_y

    starts = [
        np.array([math.log(y.min() * share), math.log(max(y.mean() - y.min() * share, 1e-9)), math.log(exponent)])
        for share in (0.3, 0.9)
        for exponent in (0.1, 0.5)
    ]
    if start is not None:
        floor, log_a, exponent = max(start[0], 1e-9), start[1], max(start[2], 1e-6)
        starts = [np.array([math.log(floor), log_a - exponent * middle, math.log(exponent)])]
    found = min((optimize.least_squares(residuals, s, max_nfev=400) for s in starts), key=lambda r: r.cost)
    exponent = math.exp(found.x[2])
    return np.array([math.exp(found.x[0]), found.x[1] + exponent * middle, exponent])


def rank_stability(table: pl.DataFrame) -> list[str]:
    """Whether the order of arms holds between every two ablations, in sentences.

    Order is that of the values; what decides is whether a difference that both show changes its sign.

    Args:
        table: columns ablation, arm, value, verdict, in order.
    """
    sentences = []
    names = table["ablation"].unique(maintain_order=True).to_list()
    for a, b in itertools.combinations(names, 2):
        one, two = (
            {r["arm"]: r for r in table.filter(pl.col("ablation") == name).iter_rows(named=True)} for name in (a, b)
        )
        shared = [arm for arm in one if arm in two and one[arm]["value"] is not None and two[arm]["value"] is not None]
        if len(shared) < 2:
            sentences.append(f"{a} and {b} share fewer than two arms that finished.")
            continue
        opposed = [arm for arm in shared if {one[arm]["verdict"], two[arm]["verdict"]} == {"better", "worse"}]
        tau = stats.kendalltau([one[arm]["value"] for arm in shared], [two[arm]["value"] for arm in shared]).statistic
        if opposed:
            told = f"the order depends on scale: {', '.join(opposed)} is better in one and worse in the other"
        elif tau == 1:
            told = "the order of all arms is the same"
        else:
            told = "the order of the values differs, by no difference that both show"
        sentences.append(f"{a} and {b}: {told} (Kendall's tau {tau:+.2f} over {len(shared)} arms).")
    return sentences


@dataclass(frozen=True)
class Comparison:
    """Ablations side by side."""

    table: pl.DataFrame
    """Columns: ablation (its folder's path where two have one name), arm, x, value, difference, verdict, rank (of the value, 1
    is best)."""
    laws: Mapping[str, ScalingLaw]
    """Arm -> its law, for arms that finished in at least two ablations with different x."""
    x: str
    at: float | None
    unit: str
    notes: tuple[str, ...] = ()
    """Arms without a law, and why."""

    def __str__(self) -> str:
        lines = [f"{'ablation':24s} {'arm':20s} {self.x:>12s} {self.unit:>16s} {'difference':>11s}  rank  verdict"]
        for r in self.table.iter_rows(named=True):
            value, difference = (
                ("–" if v is None else f"{v:{f}}") for v, f in ((r["value"], ".4f"), (r["difference"], "+.4f"))
            )
            lines.append(
                f"{r['ablation']:24s} {r['arm']:20s} {r['x']:12.4g} {value:>16s} {difference:>11s}  {r['rank'] or '–':>4}  {r['verdict']}"
            )
        lines += ["", *rank_stability(self.table)]
        for arm, law in self.laws.items():
            told = f"{arm}: {law.told(self.x, self.unit)}"
            if self.at is not None:
                reached, low, high = law.at(self.at)
                span = "" if low is None else f" ({low:.4f} to {high:.4f})"
                told += f"; at {self.at:g}: {reached:.4f}{span}, if the law goes on"
            lines.append(told + ".")
        lines += self.notes
        return "\n".join(lines)


def compare(runs: Sequence[AblationRun], x: str = "flops", at: float | None = None) -> Comparison:
    """Put finished ablations of the same arms side by side, smallest first.

    Raises:
        ConfigError: when one is not finished, or their metrics or baselines differ, or there is only one.
    """
    if x not in X:
        raise ConfigError.at("x", got=x, expected=" or ".join(X))
    if len(runs) < 2 or len({run.metric for run in runs}) != 1:
        raise ConfigError.at(
            "folders",
            got=f"{len(runs)} ablation(s) in {', '.join(sorted({r.metric.unit for r in runs}))}",
            expected="at least two, in one metric",
        )
    if len(baselines := sorted({run.baseline for run in runs})) > 1:
        raise ConfigError.at(
            "folders",
            got=f"ablations against {', '.join(baselines)}",
            expected="one baseline in all",
            do="Differences to different arms cannot be compared.",
        )
    namesakes = len({run.name for run in runs}) < len(runs)
    rows: list[dict[str, Any]] = []
    seeds: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        verdict = run.verdict()
        if verdict is None:
            raise ConfigError.at(
                "folders", got=f"{run.name}, whose confirmation runs are missing", expected="finished ablations"
            )
        costs = {row["arm"]: row[X[x]] for row in run.cost().iter_rows(named=True)}
        order = sorted((r for r in verdict.rows if r.value is not None), key=lambda r: r.value or 0.0)
        ranks = {r.arm: number + 1 for number, r in enumerate(order)}
        for r in verdict.rows:
            rows.append(
                {
                    "ablation": str(run.folder) if namesakes else run.name,
                    "arm": r.arm,
                    "x": float(costs[r.arm]),
                    "value": r.value,
                    "difference": r.difference,
                    "verdict": r.verdict,
                    "rank": ranks.get(r.arm),
                }
            )
        done = (pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE)
        for arm, value in run.runs().filter(done).select("arm", "report_value").iter_rows():
            seeds.setdefault(arm, {}).setdefault(float(costs[arm]), []).append(value)
    table = pl.DataFrame(rows, infer_schema_length=None).sort("x", maintain_order=True)
    first = {name: i for i, name in enumerate(table["ablation"].unique(maintain_order=True))}
    table = table.sort(pl.col("ablation").replace_strict(first), maintain_order=True)
    laws, notes = {}, []
    for arm, places in seeds.items():
        if len(places) > 1:
            try:
                laws[arm] = fit_scaling_law(places)
            except ValueError as error:  # a solved task has no loss left
                notes.append(f"{arm}: no law. {error}")
    return Comparison(table, laws, x, at, runs[0].metric.unit, tuple(notes))
