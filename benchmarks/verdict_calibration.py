"""Calibration of the verdict: how often it claims what is not so, and how often it detects a planted effect.

    OMP_NUM_THREADS=1 python benchmarks/verdict_calibration.py   # the grid, on all cores, and the pool of real runs
    python benchmarks/verdict_calibration.py --train 48          # train the pool again, on 48 seeds (two runs each)

*The grid* has simulated ablations: the metric of every arm and seed is drawn from a model, nothing is trained.
*Resampled runs* are ablations assembled from a pool of real training runs of one setting (and of one with a planted
fault) on many seeds. Both are decided by `workbench.ablation.verdict.judge.judge`.

Every cell of the grid is drawn ``--ablations`` times. Where a rate is not at least one standard error below its bound,
the cell is drawn again, ``--refined`` times from other random numbers, and the second rate replaces the first: of
hundreds of cells at a rate of alpha, many would exceed the bound by chance. Random numbers depend on ``--seed`` and the
cell, not on the number of processes. The models are our own definitions. The result goes to
results/calibration/calibration.json.

Legend: R ablations, A arms with the baseline first, S seeds, D documents, K clusters of documents. Effects, margins and
differences are in sd of paired differences where the metric has no upper bound, else in its own unit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from common import exact_rate, provenance
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import special, stats

from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.statistics import MIN_SEEDS, Floats, equivalence_power, power_of
from workbench.ablation.verdict.verdict import ArmVerdict, PairVerdict, Verdict
from workbench.status import Status

OUTPUT = Path(__file__).parents[1] / "results" / "calibration"
ALPHA = 0.05
BOUND = 0.055
"""Largest rate of false claims that a cell may have: alpha and a tenth for what is approximate."""
MISSES = 0.07
"""Largest share of intervals that may miss the true difference."""
REPLICATES = 400
"""Bootstrap draws per arm of a resampled ablation. The bootstrap does not enter the verdict, so a few are enough."""
CHUNK = 250
"""Ablations that one process draws at a time."""
FAULT = 1.3
"""The planted fault of the real pool: the learning rate is divided by this factor."""


@dataclass(frozen=True)
class Rate:
    """A count of ablations, with its exact (Clopper–Pearson) 95 % interval."""

    count: int
    of: int

    def plain(self) -> dict[str, Any]:
        return exact_rate(self.count, self.of)

    def within(self, rate: float) -> bool:
        """Whether the count lies inside the central 95 % of Binomial(of, rate)."""
        low, high = stats.binom.ppf([0.025, 0.975], self.of, rate)
        return bool(low <= self.count <= high)


Shape = tuple[int, int, int]

LEVEL = 100.0
"""Mean of every arm of a metric without an upper bound."""


@dataclass(frozen=True)
class Noise:
    """How the metric of ablations is drawn."""

    draw: Callable[[Generator, Shape, Floats], Floats]
    """Random numbers, (R, A, S), effects (A,) -> metric (R, A, S)."""
    answers: int | None = None
    """Answers that an error rate is counted over; None for a metric without an upper bound."""
    about: str = ""


def _normal(rng: Generator, shape: tuple[int, ...]) -> Floats:
    return rng.normal(size=shape)


def _t3(rng: Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_t(3, shape) / math.sqrt(3)


def _exponential(rng: Generator, shape: tuple[int, ...]) -> Floats:
    return rng.exponential(size=shape) - 1


def _seeds(
    draw: Callable[[Generator, tuple[int, ...]], Floats],
    rho: float = 0.5,
    scales: Callable[[Generator, Shape], Floats] = lambda rng, shape: np.ones(1),
) -> Callable[[Generator, Shape, Floats], Floats]:
    """Arms whose noise correlates at ``rho`` over seeds. The sd of paired differences is 1 where ``scales``, which
    multiplies the part of each arm, is 1."""

    def values(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
        shared_RAS = math.sqrt(rho) * draw(rng, (shape[0], 1, shape[2]))
        private_RAS = math.sqrt(1 - rho) * scales(rng, shape) * draw(rng, shape)
        return LEVEL + effects_A[:, None] + (shared_RAS + private_RAS) / math.sqrt(2 * (1 - rho))

    return values


def _arm_scales(rng: Generator, shape: Shape) -> Floats:
    return np.resize([1.0, 3.0, 0.3, 2.0, 0.5, 1.0, 4.0], shape[1])[:, None]


def _seed_scales(rng: Generator, shape: Shape) -> Floats:
    return rng.choice([0.3, 1.0, 3.0], size=(shape[0], 1, shape[2]))


def _skewed_arm(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
    """The baseline has no noise but the shared one; that of arms is exponential (skewness 2)."""
    private_RAS = _exponential(rng, shape)
    private_RAS[:, 0] = 0
    return LEVEL + effects_A[:, None] + _normal(rng, (shape[0], 1, shape[2])) + private_RAS


def _rounded(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
    return np.round(_seeds(_normal)(rng, shape, effects_A))


def _tuned(spacing: float) -> Callable[[Generator, Shape, Floats], Floats]:
    """Three settings that are ``spacing`` apart; the arm has the one that is best in one noisy tuning trial each."""

    def values(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
        trials_RA3 = spacing * np.arange(3) + rng.normal(size=(*shape[:2], 3))
        return _seeds(_normal)(rng, shape, effects_A) + spacing * trials_RA3.argmin(2)[..., None]

    return values


def _counts(rate: float, answers: int) -> Noise:
    """Independent errors."""

    def values(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
        return rng.binomial(answers, np.broadcast_to((rate + effects_A)[:, None], shape)) / answers

    return Noise(values, answers, f"errors of {answers} answers at rate {rate:g}")


def _recall(solved: float, answers: int = 512, arms_only: bool = False) -> Noise:
    """Seeds solve the task (error rate about 0.03) with this probability, or fail (about 0.65); arms correlate."""
    low, high = 2 / 62, 0.4 + 0.5 / 2

    def values(rng: Generator, shape: Shape, effects_A: Floats) -> Floats:
        luck_RAS = special.ndtr((_normal(rng, (shape[0], 1, shape[2])) + _normal(rng, shape)) / math.sqrt(2))
        solves_RAS = luck_RAS < (solved - effects_A / (high - low))[:, None]
        rates_RAS = np.where(solves_RAS, rng.beta(2, 60, shape), 0.4 + 0.5 * rng.beta(2, 2, shape))
        if arms_only:
            rates_RAS[:, 0] = solved * low + (1 - solved) * high
        return rng.binomial(answers, rates_RAS) / answers

    return Noise(values, answers, f"seeds solve a task with probability {solved:g}, or fail")


NOISES: dict[str, Noise] = {
    "normal": Noise(_seeds(_normal)),
    "normal, unpaired": Noise(_seeds(_normal, rho=0.0)),
    "t3": Noise(_seeds(_t3), about="t with 3 degrees of freedom"),
    "skewed": Noise(_seeds(_exponential), about="exponential in all arms"),
    "sd differs by arm": Noise(_seeds(_normal, scales=_arm_scales), about="0.3 to 4 times the baseline's"),
    "sd differs by seed": Noise(_seeds(_normal, scales=_seed_scales), about="0.3, 1 or 3"),
    "ties": Noise(_rounded, about="rounded to one sd of differences, no upper bound"),
    "recall, half": _recall(0.5),
    "recall, most": _recall(0.85),
    "counts, rare": _counts(0.05, 20),
    "counts": _counts(0.3, 20),
    "counts, many": _counts(0.2, 500),
    "skewed arm": Noise(_skewed_arm, about="only arms are skewed: exponential, skewness of differences 2"),
    "recall, arm": _recall(0.7, arms_only=True),
    "tuned, 10 sd apart": Noise(_tuned(10.0), about="one noisy trial for each of three settings"),
    "tuned, 1 sd apart": Noise(_tuned(1.0), about="one noisy trial for each of three settings"),
}
"""Noises of the grid."""

EQUAL = (
    "normal",
    "normal, unpaired",
    "t3",
    "skewed",
    "sd differs by arm",
    "sd differs by seed",
    "ties",
    "recall, half",
    "recall, most",
    "counts, rare",
    "counts",
)
"""Noises that arm and baseline have alike, or that are symmetric: alpha must hold."""
UNEQUAL = ("skewed arm", "recall, arm")
"""Noises of which alpha is not promised: the mean is the same, the distribution is not."""


def _random(rng: Generator, values_RAS: Floats) -> NDArray[np.bool_]:
    return rng.random(values_RAS.shape) < 0.2


def _random_of_baseline(rng: Generator, values_RAS: Floats) -> NDArray[np.bool_]:
    failed_RAS = np.zeros(values_RAS.shape, bool)
    failed_RAS[:, 0, 0] = True  # seeds are exchangeable
    return failed_RAS


def _worst(arms: slice) -> Callable[[Generator, Floats], NDArray[np.bool_]]:
    """The worst seed of each of these arms."""

    def failed(rng: Generator, values_RAS: Floats) -> NDArray[np.bool_]:
        failed_RAS = values_RAS == values_RAS.max(2, keepdims=True)
        failed_RAS[:, [a for a in range(values_RAS.shape[1]) if a not in range(values_RAS.shape[1])[arms]]] = False
        return failed_RAS

    return failed


def _above(rng: Generator, values_RAS: Floats) -> NDArray[np.bool_]:
    """Runs that would be worse than one sd above their mean diverge, in all arms."""
    return values_RAS > LEVEL + 1


FAILURES: dict[str, Callable[[Generator, Floats], NDArray[np.bool_]]] = {
    "none": lambda rng, values_RAS: np.zeros(values_RAS.shape, bool),
    "a fifth, at random": _random,
    "one of the baseline, at random": _random_of_baseline,
    "the worst of each arm": _worst(slice(1, None)),
    "the worst of the baseline": _worst(slice(0, 1)),
    "the worst of all arms": _worst(slice(None)),
    "all that are bad": _above,
}
"""Which runs fail, given what they would have measured."""


@dataclass(frozen=True)
class Cell:
    """Ablations of one design, drawn in the same way."""

    question: str
    noise: str = "normal"
    arms: int = 1
    """Arms beside the baseline."""
    seeds: int = 5
    effects: tuple[float, ...] = ()
    """True difference of each arm to the baseline; none where it is empty."""
    margin: float | None = None
    failures: str = "none"
    comparisons: Literal["baseline", "all_pairs"] = "baseline"
    bounds: Mapping[str, float | None] = field(default_factory=dict)
    """Rate -> its largest allowed value; None if the rate is reported as it is."""
    planned: Mapping[str, float] = field(default_factory=dict)
    """Rate -> its planned value."""

    def simulate(self, ablations: int, rng: Generator) -> Counter[str]:
        """Counts of ablations in which

        - ``false difference``: any arm is better or worse that is not;
        - ``false equivalence``: any arm is shown to lie within the margin that differs by it or more;
        - ``detected``: the first arm has the right one of better and worse; ``equivalent``: it is equivalent.
        """
        noise, names = NOISES[self.noise], [str(number) for number in range(self.arms + 1)]
        effects_A = np.array([0.0, *(self.effects or (0.0,) * self.arms)])
        values_RAS = noise.draw(rng, (ablations, self.arms + 1, self.seeds), effects_A)
        failed_RAS = FAILURES[self.failures](rng, values_RAS)
        sizes_D = np.array([float(noise.answers or 1)])
        counts: Counter[str] = Counter()
        for values_AS, failed_AS in zip(values_RAS, failed_RAS, strict=True):
            measured = [
                ArmMeasurements(
                    name,
                    {seed: value * sizes_D for seed, value in enumerate(values_S) if not failed_S[seed]},
                    sizes_D,
                    {int(seed): "diverged" for seed in failed_S.nonzero()[0]},
                )
                for name, values_S, failed_S in zip(names, values_AS, failed_AS, strict=True)
            ]
            verdict = judge(
                measured[0],
                measured[1:],
                alpha=ALPHA,
                margin=self.margin,
                seeds=range(self.seeds),
                replicates=0,
                upper=None if noise.answers is None else 1.0,
                comparisons=self.comparisons,
            )
            counts.update(self._outcomes(verdict, effects_A))
        return counts

    def _outcomes(self, verdict: Verdict, effects_A: Floats) -> set[str]:
        """Which of the counted outcomes the verdict has."""
        outcomes = set()
        rows: tuple[ArmVerdict | PairVerdict, ...] = verdict.pairs or verdict.rows[1:]
        for number, row in enumerate(rows):
            reference = row.reference if isinstance(row, PairVerdict) else verdict.baseline
            difference = effects_A[int(row.arm)] - effects_A[int(reference)]
            if (row.verdict == "better" and difference >= 0) or (row.verdict == "worse" and difference <= 0):
                outcomes.add("false difference")
            is_within = row.p_equivalence is not None and row.p_equivalence <= ALPHA
            if is_within and self.margin is not None and abs(difference) >= self.margin:
                outcomes.add("false equivalence")
            if number == 0 and difference and row.verdict == ("worse" if difference > 0 else "better"):
                outcomes.add("detected")
            if number == 0 and row.verdict == "equivalent":
                outcomes.add("equivalent")
        return outcomes


def _row(baseline_SD: Floats, arm_SD: Floats, sizes_D: Floats, clusters_D: NDArray[np.int64] | None) -> ArmVerdict:
    baseline, arm = (
        ArmMeasurements(name, dict(enumerate(amounts_SD)), sizes_D, clusters_D=clusters_D)
        for name, amounts_SD in (("0", baseline_SD), ("1", arm_SD))
    )
    return judge(baseline, [arm], alpha=ALPHA, seeds=range(len(arm_SD)), replicates=1000).rows[1]


def _misses(low: float | None, high: float | None, true: float) -> bool:
    return low is not None and high is not None and not low <= true <= high


@dataclass(frozen=True)
class Coverage:
    """Intervals of one arm against the baseline on clustered documents; the true difference is zero.

    The difference of seed s on document d of cluster k is z_s + c_k + e_d + i_sd: normal, with sd 1, ``cluster_sd``,
    half of that, and 1. Documents are a sample of those that the difference is about.
    """

    question: str
    seeds: int
    clusters: int
    cluster_sd: float
    bounds: Mapping[str, float | None] = field(default_factory=dict)
    planned: Mapping[str, float] = field(default_factory=dict)
    noise: str = "clustered documents"

    def simulate(self, ablations: int, rng: Generator) -> Counter[str]:
        """Counts of intervals that miss the true difference: of the crossed bootstrap over seeds and clusters, of the
        same with clusters ignored, of t, and of t for the mean over the documents that were drawn."""
        S, counts = self.seeds, Counter[str]()
        for _ in range(ablations):
            cluster_D = np.repeat(np.arange(self.clusters), 1 + rng.poisson(2, self.clusters))
            D = cluster_D.size
            sizes_D = rng.integers(200, 2000, D).astype(np.float64)
            level_D = LEVEL + 20 * rng.normal(size=D)
            document_D = self.cluster_sd * (rng.normal(size=self.clusters)[cluster_D] + rng.normal(size=D) / 2)
            difference_SD = document_D + rng.normal(size=(S, 1)) + rng.normal(size=(S, D))
            baseline_SD = level_D + rng.normal(size=(S, 1))
            here = float(document_D @ sizes_D / sizes_D.sum())

            measured = sizes_D * baseline_SD, sizes_D * (baseline_SD + difference_SD)
            clustered, ignored = (_row(*measured, sizes_D, clusters_D) for clusters_D in (cluster_D, None))
            counts["bootstrap misses"] += _misses(clustered.bootstrap_low, clustered.bootstrap_high, 0)
            counts["bootstrap misses, clusters ignored"] += _misses(ignored.bootstrap_low, ignored.bootstrap_high, 0)
            counts["t misses, any documents"] += _misses(clustered.low, clustered.high, 0)
            counts["t misses, these documents"] += _misses(clustered.low, clustered.high, here)
        return counts


def cells() -> Iterator[Cell | Coverage]:
    """The grid."""
    yield from _equal_arms()
    yield from _arms_at_the_margin()
    yield from _clustered_documents()
    yield from _failed_runs()
    yield from _all_pairs()
    yield from _planted_effects()
    for noise in ("tuned, 10 sd apart", "tuned, 1 sd apart"):
        # arms with different chosen settings do differ, so that no rate is expected where noise chooses them
        bound = BOUND if noise == "tuned, 10 sd apart" else None
        yield Cell("equal arms, tuned", noise, arms=4, bounds={"false difference": bound})


def _equal_arms() -> Iterator[Cell]:
    for noise in EQUAL:
        for seeds in range(2, 9):
            for arms in range(1, 7):
                few = seeds < MIN_SEEDS
                question = f"equal arms, fewer than {MIN_SEEDS} seeds" if few else "equal arms"
                yield Cell(question, noise, arms, seeds, bounds={"false difference": 0.0 if few else BOUND})
    for noise in UNEQUAL:
        for seeds in range(MIN_SEEDS, 9):
            for arms in (1, 2, 3, 6):
                yield Cell("equal means, unequal noise", noise, arms, seeds, bounds={"false difference": None})


def _arms_at_the_margin() -> Iterator[Cell]:
    """Arms that differ by the margin: all by the same, with both signs, or every second one, others not at all."""
    margins = {"recall, half": 0.2, "counts, many": 0.1}
    for noise in ("normal", "t3", "skewed", "sd differs by arm", *margins):
        margin = margins.get(noise, 6.0)  # so wide that lying outside on the other side does not matter: the worst case
        for arms in range(1, 7) if noise == "normal" else (1, 2, 4, 6):
            signs = [(1.0,) * arms, tuple(np.resize([1.0, 0.0], arms).tolist())]
            signs += [tuple(np.resize([1.0, -1.0], arms).tolist())] if noise == "normal" else []
            for chosen in dict.fromkeys(signs):  # with one arm all are the same
                effects = tuple(margin * sign for sign in chosen)
                for seeds in range(MIN_SEEDS, 9):
                    bounds = {"false equivalence": BOUND}
                    yield Cell("arms at the margin", noise, arms, seeds, effects, margin, bounds=bounds)


def _clustered_documents() -> Iterator[Coverage]:
    for seeds in (4, 5, 8):
        for clusters in (10, 20, 40, 80):
            for cluster_sd in (1.0, 3.0, 10.0):
                bounds: dict[str, float | None] = {
                    "bootstrap misses": MISSES,
                    "t misses, these documents": MISSES,
                    "bootstrap misses, clusters ignored": None,
                    "t misses, any documents": None,
                }
                yield Coverage("clustered documents", seeds, clusters, cluster_sd, bounds)


def _failed_runs() -> Iterator[Cell]:
    for failures in FAILURES:
        for noise in ("normal", "normal, unpaired", "skewed", "recall, half"):
            for arms in (1, 3):
                for seeds in (5, 6, 8):
                    bounds = {"false difference": BOUND}
                    is_above = failures == "all that are bad" and NOISES[noise].answers is not None
                    if failures != "none" and not is_above:
                        yield Cell(f"failed: {failures}", noise, arms, seeds, failures=failures, bounds=bounds)
    for failures in ("one of the baseline, at random", "the worst of each arm"):
        for seeds in (5, 6, 8):
            for effect in (2.0, 3.0):
                as_is = {"detected": None}
                yield Cell(f"power, {failures} failed", "normal", 1, seeds, (effect,), failures=failures, bounds=as_is)


def _all_pairs() -> Iterator[Cell]:
    for noise in ("normal", "t3", "skewed", "recall, half"):
        for arms in (2, 3, 5):
            for seeds in (4, 5, 6, 8):
                bounds = {"false difference": BOUND}
                yield Cell("all pairs, equal arms", noise, arms, seeds, comparisons="all_pairs", bounds=bounds)
                if NOISES[noise].answers is None:
                    effects = (8.0, *(0.0,) * (arms - 1))
                    question = "all pairs, one arm differs"
                    yield Cell(question, noise, arms, seeds, effects, comparisons="all_pairs", bounds=bounds)


def _planted_effects() -> Iterator[Cell]:
    for arms in (1, 3):
        for seeds in range(MIN_SEEDS, 9):
            for effect in (1.0, 1.5, 2.0, 3.0):
                planned = {"detected": power_of(seeds, effect, ALPHA / arms)}
                effects = (effect, *(0.0,) * (arms - 1))
                yield Cell("power, one arm differs", arms=arms, seeds=seeds, effects=effects, planned=planned)
    for seeds in range(MIN_SEEDS, 9):
        for margin in (2.0, 3.0):
            planned = {"equivalent": equivalence_power(seeds, margin, ALPHA)}
            yield Cell("power, equal within the margin", seeds=seeds, margin=margin, planned=planned)


def _key(cell: Cell | Coverage) -> str:
    """Identifies a cell by what is drawn."""
    return json.dumps({k: v for k, v in asdict(cell).items() if k not in ("question", "bounds", "planned")})


def _task(task: tuple[Cell | Coverage, int, tuple[int, int, int]]) -> Counter[str]:
    cell, ablations, numbers = task
    entropy = int.from_bytes(hashlib.sha256(_key(cell).encode()).digest()[:8], "big")
    return cell.simulate(ablations, np.random.default_rng([entropy, *numbers]))


def _counts_of(
    grid: Sequence[Cell | Coverage], ablations: int, seed: int, stage: int, map_: Callable[..., Iterable[Counter[str]]]
) -> list[Counter[str]]:
    """Counts of every cell, drawn in chunks whose random numbers do not depend on how they are mapped."""
    sizes = [min(CHUNK, ablations - start) for start in range(0, ablations, CHUNK)]
    tasks = [(cell, size, (seed, stage, chunk)) for cell in grid for chunk, size in enumerate(sizes)]
    results = iter(map_(_task, tasks))
    return [sum((next(results) for _ in sizes), Counter()) for _ in grid]


def calibrate_grid(
    ablations: int = 2000,
    refined: int = 20_000,
    seed: int = 0,
    grid: Sequence[Cell | Coverage] | None = None,
    processes: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Simulate every cell. Returns its design, and its rates with intervals, bounds and planned values.

    Args:
        ablations: of every cell.
        refined: of a cell that has a rate less than one standard error below its bound.
        seed: of the random numbers.
        grid: the cells. Default: all.
        processes: that simulate at the same time.
        progress: receives a line before each stage.
        keep: receives the rows before any cell is drawn again, so that an interruption leaves them.
    """
    grid = list(cells()) if grid is None else grid
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        map_ = map if pool is None else pool.map
        progress(f"{len(grid)} cells of {ablations:,} ablations")
        rows = [
            _described(cell, counts, ablations)
            for cell, counts in zip(grid, _counts_of(grid, ablations, seed, 0, map_), strict=True)
        ]
        keep(rows)
        again = [number for number, row in enumerate(rows) if refined and _is_open(row)]
        progress(f"{len(again)} cells of {refined:,} ablations")
        refinement = _counts_of([grid[number] for number in again], refined, seed, 1, map_)
        for number, counts in zip(again, refinement, strict=True):
            first = {name: rate["count"] for name, rate in rows[number]["rates"].items()}
            rows[number] = _described(grid[number], counts, refined) | {"first": {"of": ablations, **first}}
    return rows


def _described(cell: Cell | Coverage, counts: Counter[str], of: int) -> dict[str, Any]:
    design = {k: v for k, v in asdict(cell).items() if k not in ("bounds", "planned") and v not in ((), None, "none")}
    rates = {}
    for name, bound in cell.bounds.items():
        rates[name] = Rate(counts[name], of).plain()
        if bound is not None:
            rates[name] |= {"bound": bound, "within": rates[name]["rate"] <= bound}
    for name, planned in cell.planned.items():
        rate = Rate(counts[name], of)
        rates[name] = rate.plain() | {"expected": planned, "within": rate.within(planned)}
    return {**design, "of": of, "rates": rates}


def _is_open(row: Mapping[str, Any]) -> bool:
    """Whether a rate is less than one standard error below its bound; never where nothing may be claimed."""
    rates = [rate for rate in row["rates"].values() if rate.get("bound")]
    return any(
        rate["rate"] + math.sqrt(rate["rate"] * (1 - rate["rate"]) / row["of"]) > rate["bound"] for rate in rates
    )


def _distance(pair: tuple[Mapping[str, Any], dict[str, Any]]) -> float:
    return float(abs(pair[1]["rate"] - pair[1].get("expected", 0.0)))


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst cell of every question, noise and rate: that of the highest rate, or of the one farthest from its plan.

    Columns: question, noise, rate (name), cells, outside (cells that are not within their bound, or the central 95 % of
    their plan), design, of, value, low, high, bound or expected.
    """
    grouped: dict[tuple[str, str, str], list[tuple[Mapping[str, Any], dict[str, Any]]]] = {}
    for row in rows:
        for name, rate in row["rates"].items():
            grouped.setdefault((row["question"], row["noise"], name), []).append((row, rate))
    lines = []
    for (question, noise, name), pairs in grouped.items():
        row, rate = max(pairs, key=_distance)
        design = {k: v for k, v in row.items() if k not in ("question", "noise", "of", "rates", "first")}
        limits: dict[str, float] = {k: rate[k] for k in ("low", "high", "bound", "expected") if k in rate}
        lines.append(
            {
                "question": question,
                "noise": noise,
                "rate": name,
                "cells": len(pairs),
                "outside": sum(not rate.get("within", True) for _, rate in pairs),
                "design": design,
                "of": row["of"],
                "value": rate["rate"],
                **limits,
            }
        )
    return lines


def summary_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table."""
    titles = ["question", "noise", "rate", "cells", "outside", "worst", "95 % interval", "limit", "design of the worst"]
    shown = ("arms", "seeds", "clusters", "cluster_sd", "effects")
    table = [titles]
    for line in lines:
        design = {k: v for k, v in line["design"].items() if k in shown}
        limit = f"<= {line['bound']:g}" if "bound" in line else f"{line['expected']:.3f}" if "expected" in line else ""
        table.append(
            [
                *(line[k] for k in ("question", "noise", "rate")),
                *(str(line[k]) for k in ("cells", "outside")),
                f"{line['value']:.4f}",
                f"{line['low']:.4f}-{line['high']:.4f}",
                limit,
                ", ".join(f"{k} {v}" for k, v in design.items()),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def _count(make: Callable[[], Verdict], ablations: int) -> dict[str, Rate]:
    """Count ablations in which any arm is judged different (claims), the first arm is judged worse (detected) or
    equivalent, and in which the bootstrap interval of the first arm excludes zero."""
    counts = dict.fromkeys(("claims", "detected", "equivalent", "bootstrap"), 0)
    for _ in range(ablations):
        rows = make().rows[1:]
        different = [row.verdict in ("better", "worse") for row in rows]
        counts["claims"] += any(different)
        counts["detected"] += rows[0].verdict == "worse"
        counts["equivalent"] += rows[0].verdict == "equivalent"
        low, high = rows[0].bootstrap_low, rows[0].bootstrap_high
        counts["bootstrap"] += low is not None and high is not None and not low <= 0 <= high
    return {name: Rate(count, ablations) for name, count in counts.items()}


def _report(scenario: dict[str, Any], rates: Mapping[str, Rate], expected: Mapping[str, float]) -> dict[str, Any]:
    plain = {name: rate.plain() for name, rate in rates.items()}
    for name, rate in expected.items():
        plain[name] |= {"expected": rate, "within": rates[name].within(rate)}
        if name == "claims":  # an error rate may be smaller
            plain[name]["within"] |= rates[name].count < rate * rates[name].of
    return {**scenario, "rates": plain}


def pool_run(learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of one run of the real pool: two layers of width 32 on Python's standard library, 60 steps."""
    return {
        "model": {"width": 32, "depth": 2, "vocabulary": 512},
        "data": {
            "corpus": {"kind": "stdlib", "limit_bytes": 1_000_000},
            "evaluation_documents": 24,
            "evaluation_bytes": 512,
        },
        "training": {
            "tokens": 60 * 4 * 64,
            "batch_size": 4,
            "context": 64,
            "learning_rate": learning_rate,
            "evaluations": 1,
            "checkpoint_every": 10**9,
            "log_every": 20,
        },
        "seed": seed,
    }


def train_pool(
    seeds: int, progress: Callable[[str], None] = lambda line: None, learning_rate: float = 5e-3
) -> pl.DataFrame:
    """Train the real pool in this process: ``seeds`` seeds of the right setting, and as many with the learning rate
    divided by :data:`FAULT`.

    Columns: setting ("right", "fault"), seed, document, bits, bytes.
    """
    from workbench.training.config import RunConfig
    from workbench.training.trial import new_run, train

    frames = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting, rate in (("right", learning_rate), ("fault", learning_rate / FAULT)):
            for seed in range(seeds):
                progress(f"pool: {setting}, seed {seed}")
                config = RunConfig.parse(pool_run(rate, seed))
                folder = new_run(Path(scratch) / "run", Path(scratch) / "cache", config)
                result = train(folder.path, Path(scratch) / "cache")
                if result["status"] != Status.DONE:
                    raise RuntimeError(f"pool: {setting}, seed {seed} ended as {result['status']}: {result['reason']}")
                report = pl.read_parquet(folder.path / "report.parquet")
                frames.append(
                    report.select(
                        pl.lit(setting).alias("setting"),
                        pl.lit(seed).alias("seed"),
                        "document",
                        (pl.col("nll_nats") / math.log(2)).alias("bits"),
                        "bytes",
                    )
                )
                shutil.rmtree(folder.path)
    return pl.concat(frames)


def calibrate_pool(
    pool: pl.DataFrame, ablations: int = 400, seeds: int = 5, arms: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Ablations assembled from a pool of real runs.

    A/A: baseline and arms use disjoint seeds of the right setting, drawn without replacement, so pairs share nothing
    (rho 0). Planted: the arm has the fault, on the same seeds as the baseline. Ablations share runs, so the intervals
    of the rates are conditional on this pool.
    """
    rng = np.random.default_rng(seed)
    table = {
        key[0]: np.stack(
            [
                part["bits"].to_numpy()
                for _, part in group.sort("seed", "document").group_by("seed", maintain_order=True)
            ]
        )
        for key, group in pool.group_by("setting")
    }
    right_SD, fault_SD = table["right"], table["fault"]
    sizes_D = pool.filter((pl.col("setting") == "right") & (pl.col("seed") == 0)).sort("document")["bytes"].to_numpy()
    per_byte = sizes_D.sum()
    if len(right_SD) < seeds * (arms + 1):
        raise ValueError(f"pool: got {len(right_SD)} seeds; expected at least {seeds * (arms + 1)} for disjoint ones.")

    def arm(name: str, rows_SD: Floats) -> ArmMeasurements:
        return ArmMeasurements(name, dict(enumerate(rows_SD)), sizes_D)

    def same() -> Verdict:
        drawn = rng.permutation(len(right_SD))[: seeds * (arms + 1)].reshape(arms + 1, seeds)
        first, *others = (arm(f"arm{i}", right_SD[rows]) for i, rows in enumerate(drawn))
        return judge(first, others, seeds=range(seeds), replicates=REPLICATES)

    def planted() -> Verdict:
        rows = rng.permutation(len(right_SD))[:seeds]
        return judge(
            arm("right", right_SD[rows]), [arm("fault", fault_SD[rows])], seeds=range(seeds), replicates=REPLICATES
        )

    differences_S = (fault_SD - right_SD).sum(1) / per_byte
    effect = float(differences_S.mean() / differences_S.std(ddof=1))
    common = {
        "runs": int(2 * len(right_SD)),
        "seeds": seeds,
        "sd_over_seeds": float((right_SD.sum(1) / per_byte).std(ddof=1)),
        "unit": "bits per byte",
    }
    reports = [
        _report({"name": "A/A, resampled real runs", "arms": arms, **common}, _count(same, ablations), {"claims": 0.05})
    ]
    about = {
        "name": f"learning rate off by {FAULT:g}, resampled real runs",
        "arms": 1,
        **common,
        "difference": float(differences_S.mean()),
        "effect_in_sd_of_differences": effect,
    }
    reports.append(
        _report(about, _count(planted, ablations), {"detected": power_of(seeds, effect, 0.05)} if effect > 0 else {})
    )
    return reports


def write(
    output: Path, grid: list[dict[str, Any]], resampled: list[dict[str, Any]], seconds: float, **settings: Any
) -> None:
    """Write ``calibration.json`` in ``output``, one line per cell."""
    report = {
        "summary": summary(grid),
        "grid": grid,
        "resampled_runs": resampled,
        "alpha": ALPHA,
        "intervals": "exact (Clopper-Pearson), 95 %",
        "noises": {name: noise.about for name, noise in NOISES.items() if noise.about},
        "settings": settings,
        "environment": provenance(seconds=round(seconds, 1)),
    }

    def lines(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return "[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n ]"

    body = ",\n".join(f" {json.dumps(name)}: {lines(value)}" for name, value in report.items())
    (output / "calibration.json").write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the result")
    parser.add_argument("--ablations", type=int, default=2000, help="per cell of the grid, at least 20")
    parser.add_argument("--refined", type=int, default=20_000, help="per cell that is drawn again; 0 draws none again")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that simulate at the same time")
    parser.add_argument("--only", default="", help="cells whose question or noise contains this")
    parser.add_argument("--every", type=int, default=1, help="only every so many cells")
    parser.add_argument("--train", type=int, default=0, help="train the pool of real runs again, on this many seeds")
    options = parser.parse_args()
    if options.ablations < 20:
        parser.error("--ablations: at least 20")
    started = time.perf_counter()

    def progress(line: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: getattr(options, k) for k in ("ablations", "refined", "seed", "only", "every")}

    def keep(rows: list[dict[str, Any]], resampled: Sequence[dict[str, Any]] = ()) -> None:
        write(options.output, rows, list(resampled), time.perf_counter() - started, **settings)

    chosen = [cell for cell in cells() if options.only in cell.question or options.only in cell.noise]
    grid = calibrate_grid(
        options.ablations, options.refined, options.seed, chosen[:: options.every], options.processes, progress, keep
    )
    path = options.output / "pool.parquet"
    if options.train:
        train_pool(options.train, progress).write_parquet(path)
    progress("resampled real runs")
    resampled = calibrate_pool(pl.read_parquet(path), max(20, options.ablations // 5)) if path.exists() else []
    keep(grid, resampled)
    print(summary_text(summary(grid)))
    for row in resampled:
        rates = ", ".join(f"{name} {_rate(row['rates'][name])}" for name in ("claims", "detected", "equivalent"))
        print(f"{row['name']} ({row['rates']['claims']['of']} ablations): {rates}")
    if not path.exists():
        print("There is no pool of real runs; --train 48 creates one.")
    print(options.output / "calibration.json")


def _rate(rate: dict[str, Any]) -> str:
    text = f"{rate['rate']:.3f} ({rate['low']:.3f}–{rate['high']:.3f})"
    return (
        text if "expected" not in rate else f"{text}, expected {rate['expected']:.3f}{'' if rate['within'] else ' !'}"
    )


if __name__ == "__main__":
    main()
