"""How often a verdict on two equally good architectures claims a difference, by the way their arms were tuned.

    python benchmarks/tuning_claims.py

Ablations are simulated (ours): two arms whose smallest losses are equal, each with optima of its own, loss(x) =
c Σ (x − optimum)² in units of the sd of a run over seeds, x in [0, 1] for each tuned field, optima uniform in
[0.2, 0.8]. With the steep shape a value above the optimum costs four times as much, as too high learning rates do. Runs
of both arms have independent noise, on trials and on five confirmation seeds. Choices are made by the functions that
an ablation uses (workbench.ablation.search.optimum), verdicts by the paired t-test at 0.05; results go to
results/calibration/tuning_claims.json.

A claim is false for the architectures whenever one is called better or worse. *Allowed* counts those that carry no
reservation (workbench.ablation.verdict.effort). Rates are given for the whole procedure, claims per ablation.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import exact_rate, write_report
from numpy.random import Generator
from scipy import stats

from workbench.ablation.search.optimum import Setting, best, edges, fit_surface, interpolate, leading
from workbench.ablation.verdict.effort import MIN_SEEDS, MIN_VALUES
from workbench.ranges import Range

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "tuning_claims.json"
CONFIRMATION_SEEDS = 5
STEEP = 4.0
EFFECT = 1.0
"""Smallest difference of interest, in standard deviations of a run."""
LEAST = stats.t.ppf(0.975, CONFIRMATION_SEEDS - 1) / math.sqrt(CONFIRMATION_SEEDS)
"""Mean difference, in its standard deviations, from which on the paired t-test at 0.05 claims one."""
GRID = (0.0, 0.5, 1.0)
RANGE, LISTED = Range(low=0.0, high=1.0), Range(values=GRID)


@dataclass(frozen=True)
class Search:
    """How an arm is tuned: trials on one seed, then the best ones on further seeds, then the fitted optimum."""

    trials: int
    repeated: int = 0
    further_seeds: int = 0
    interpolated: bool = False

    @property
    def name(self) -> str:
        words = [f"{self.trials} trials"]
        words += [f"best {self.repeated} on {self.further_seeds} more seeds"] if self.repeated else []
        words += ["interpolated"] if self.interpolated else []
        return ", ".join(words)

    @property
    def runs(self) -> int:
        return self.trials + self.repeated * self.further_seeds


@dataclass(frozen=True)
class Landscape:
    """The losses of an arm."""

    curvature: float
    """c: half the range away from the optimum costs c / 4 standard deviations."""
    steep: bool = False
    fields: int = 1

    def loss(self, x_F: np.ndarray, optimum_F: np.ndarray) -> float:
        distance_F = x_F - optimum_F
        factor = np.where(distance_F > 0, STEEP, 1.0) if self.steep else 1.0
        return float(self.curvature * (factor * distance_F**2).sum())


def tuned(search: Search, landscape: Landscape, draws: np.ndarray, rng: Generator) -> tuple[float, bool]:
    """The true loss of the chosen setting, and whether a claim about the architecture is allowed.

    Args:
        draws: (trials, F), positions of the trials.
    """
    names = [f"field{i}" for i in range(landscape.fields)]
    is_grid = landscape.fields == 1 and len(draws) == len(GRID)
    space = dict.fromkeys(names, LISTED if is_grid else RANGE)
    optimum_F = rng.uniform(0.2, 0.8, landscape.fields)

    def position(hyperparameters: Any) -> np.ndarray:
        return np.array([hyperparameters[name] for name in names])

    def measured(hyperparameters: Any) -> float:
        return landscape.loss(position(hyperparameters), optimum_F) + rng.normal()

    settings = [Setting(point, {0: measured(point)}) for point in (dict(zip(names, map(float, row))) for row in draws)]
    seeds = [0, *range(1, search.further_seeds + 1)]
    for setting in leading(settings, search.repeated, 0):
        for seed in seeds[1:]:
            setting.values[seed] = measured(setting.hyperparameters)  # type: ignore[index]
    chosen = best(settings, seeds)
    assert chosen is not None
    point = dict(chosen.hyperparameters)
    if search.interpolated and (found := interpolate(settings, space, chosen)) is not None:
        point = found[0]
    loss = landscape.loss(position(point), optimum_F)
    if search.trials < MIN_VALUES * landscape.fields or len(seeds) < MIN_SEEDS or edges(settings, space, point):
        return loss, False
    surface = fit_surface(settings, space, chosen)
    gap = None if surface is None else surface.gap(point).high
    return loss, gap is not None and gap <= EFFECT


def positions(search: Search, landscape: Landscape, rng: Generator) -> np.ndarray:
    """(trials, F), shared by both arms: a grid of three values, or uniform draws."""
    if search.trials == len(GRID) and landscape.fields == 1:
        return np.array(GRID)[:, None]
    return rng.random((search.trials, landscape.fields))


def claims(
    searches: Sequence[Search], landscapes: Sequence[Landscape], ablations: int, seed: int = 0
) -> dict[str, Any]:
    """Rates over ablations of two arms, each with its own search and landscape.

    Returns:
        the share of ablations with a false claim, with the arm called worse, with an allowed false claim, and with
        a claim allowed at all; the mean loss above the optimum of both arms; exact 95 % intervals of the first three.
    """
    rng = np.random.default_rng(seed)
    counts = {"claims": 0, "worse": 0, "allowed_claims": 0, "allowed": 0}
    regret = 0.0
    for _ in range(ablations):
        widest = max(zip(searches, landscapes), key=lambda pair: (pair[1].fields, pair[0].trials))
        draws = positions(*widest, rng)
        losses, allowed = zip(
            *(
                tuned(search, landscape, draws[: search.trials, : landscape.fields], rng)
                for search, landscape in zip(searches, landscapes)
            )
        )
        difference = losses[1] - losses[0] + rng.normal(0, math.sqrt(2), CONFIRMATION_SEEDS)
        is_claim = abs(difference.mean()) > LEAST * difference.std(ddof=1)
        counts["claims"] += is_claim
        counts["worse"] += is_claim and difference.mean() > 0
        counts["allowed"] += all(allowed)
        counts["allowed_claims"] += is_claim and all(allowed)
        regret += sum(losses) / 2
    rates: dict[str, Any] = {name: int(count) / ablations for name, count in counts.items()}
    for name in ("claims", "worse", "allowed_claims"):
        rate = exact_rate(counts[name], ablations)
        rates[f"{name}_interval"] = [round(rate[end], 4) for end in ("low", "high")]
    return {**rates, "regret": round(regret / ablations, 4), "ablations": ablations}


SEARCHES = (
    Search(3),
    Search(3, interpolated=True),
    Search(3, 3, 2),
    Search(3, 3, 2, True),
    Search(8),
    Search(8, 3, 2),
    Search(8, 3, 2, True),
    Search(14),
)
"""One tuned field; 8 trials with 6 repeats cost as much as 14 trials."""
CURVATURES = (0.0, 4.0, 16.0, 64.0)


def write(output: Path, ablations: int) -> dict[str, Any]:
    """Simulate every cell and write the results."""
    started = time.perf_counter()
    rows = []
    for steep in (False, True):
        for curvature in CURVATURES:
            for search in SEARCHES:
                landscape = Landscape(curvature, steep)
                rates = claims((search, search), (landscape, landscape), ablations)
                rows.append({"search": search.name, "runs": search.runs, **asdict(landscape), **rates})
    policies = []
    for name, trials in (("equal", 8), ("per_dimension", 32)):
        for repeats in ((), (3, 2)):
            baseline, arm = Search(8, *repeats), Search(trials, *repeats)
            one, four = Landscape(16.0), Landscape(16.0, fields=4)
            rates = claims((baseline, arm), (one, four), ablations)
            policies.append({"policy": name, "baseline": baseline.name, "arm": arm.name, **asdict(four), **rates})
    report = {
        "one_field": rows,
        "one_against_four_fields": policies,
        "confirmation_seeds": CONFIRMATION_SEEDS,
        "effect": EFFECT,
    }
    write_report(output, report, started)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--ablations", type=int, default=1000, help="simulated in each cell")
    options = parser.parse_args()
    report = write(options.output, options.ablations)
    for row in report["one_field"]:
        shape = "steep" if row["steep"] else "even"
        print(
            f"c {row['curvature']:4g} {shape:5} {row['search']:48} claims {row['claims']:.3f}, without reservation "
            f"{row['allowed_claims']:.3f} of {row['allowed']:.3f} allowed, regret {row['regret']:.3f}"
        )
    for row in report["one_against_four_fields"]:
        print(f"{row['policy']:14} {row['arm']:40} claims {row['claims']:.3f}, worse {row['worse']:.3f}")


if __name__ == "__main__":
    main()
