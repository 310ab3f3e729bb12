"""Calibration of the planned number of seeds: whether plans have the power that they print.

    python benchmarks/plan_calibration.py --pilots 2000

Pilots are simulated: a baseline and some arms over a few paired seeds, normal noise with correlation 1/2. A pilot goes
through `pilot_of` and `plan_seeds`; the plan's expected power is then compared with the power of its number of seeds at
the true sd (exact noncentral t), and with one simulated ablation per plan, whose t-test at alpha / arms shows the
effect or not. Also counted: how many pilots have 80 % power with the seeds of "9 of 10 pilots".

*Cells* fix the true effect in sd. Where the fewest seeds that a plan proposes are more than needed ("floored"), the
number of seeds no longer follows the pilot's sd, and plans print less power than they have in the mean. *Bins* draw the
true effect log-uniformly and sort plans by what they print: of plans that print 73 %, how many show the effect? The
scenarios are our own definition. Results go to results/calibration/plans.json.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import write_report
from scipy import special

from workbench.ablation.analysis.power import MIN_SEEDS, Pilot, pilot_of, plan_seeds
from workbench.ablation.verdict.statistics import POWER, power_of, seeds_needed

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "plans.json"
ALPHA = 0.05


@dataclass(frozen=True)
class Cell:
    """A design of pilot and ablation. The true sd of paired differences is 1."""

    pilot_seeds: int
    pilot_arms: int
    """Arms beside the baseline in the pilot."""
    arms: int
    """Arms beside the baseline in the ablation."""
    effect: float


CELLS = [
    Cell(seeds, pilot_arms, arms, effect)
    for seeds, (pilot_arms, arms), effect in itertools.product(
        (5, 8, 12), ((1, 1), (1, 3), (3, 3)), (0.8, 1.0, 1.25, 1.5, 2.0)
    )
]
BINNED = [Cell(seeds, 1, arms, 1.0) for seeds, arms in itertools.product((5, 8, 12), (1, 3))]
SPREAD = (0.05, 20.0)
"""True sd of the bins: wide, so that its ends do not matter to the pilots that are planned for."""


def draw(cell: Cell, sd: float, rng: np.random.Generator) -> Pilot:
    """The pilot of one cell whose paired differences have this true sd, and correlate at 1/2 between arms."""
    shared, own = rng.normal(size=cell.pilot_seeds), rng.normal(size=(cell.pilot_arms + 1, cell.pilot_seeds))
    values = {str(arm): dict(enumerate(sd * (shared + noise) / math.sqrt(2))) for arm, noise in enumerate(own)}
    return pilot_of(values, "0")


def outcome(cell: Cell, pilot: Pilot, sd: float, rng: np.random.Generator) -> dict[str, float]:
    """What the plan of one pilot prints and does.

    Returns:
        printed (expected power), power (true power), shown (whether a simulated ablation shows the effect), assured
        (whether the cautious seeds have 80 % power), floored (whether fewer seeds were needed), seeds, assured_seeds,
        df.
    """
    level = ALPHA / cell.arms
    plan = plan_seeds(pilot, arms=cell.arms, alpha=ALPHA, effect=cell.effect).for_effect
    assert plan is not None
    differences = cell.effect + sd * rng.normal(size=plan.seeds)
    t = differences.mean() / differences.std(ddof=1) * math.sqrt(plan.seeds)
    return {
        "printed": plan.expected,
        "power": power_of(plan.seeds, cell.effect / sd, level),
        "shown": float(abs(t) > special.stdtrit(plan.seeds - 1, 1 - level / 2)),
        "assured": float(power_of(plan.assured, cell.effect / sd, level) >= POWER),
        "floored": float(seeds_needed(cell.effect / pilot.sd_difference, level, POWER) < MIN_SEEDS),
        "seeds": plan.seeds,
        "assured_seeds": plan.assured,
        "df": pilot.df,
    }


def simulate(cell: Cell, pilots: int, seed: int = 0) -> dict[str, float]:
    """Means over pilots of :func:`outcome`, of the true sd 1; medians of seeds."""
    rng = np.random.default_rng([seed, cell.pilot_seeds, cell.pilot_arms, cell.arms, int(100 * cell.effect)])
    rows = [outcome(cell, draw(cell, 1.0, rng), 1.0, rng) for _ in range(pilots)]
    over = {"seeds": np.median, "assured_seeds": np.median}
    return {name: float(over.get(name, np.mean)([row[name] for row in rows])) for name in rows[0]}


def calibrate(cell: Cell, pilots: int, seed: int = 0) -> list[dict[str, float]]:
    """Plans sorted into bins of what they print, over log-uniform true sd: mean printed and true power of each bin.

    Only pilots in which the effect is 0.8 to 2 times the estimated sd are planned for.
    """
    rng = np.random.default_rng([seed, cell.pilot_seeds, cell.pilot_arms, cell.arms])
    rows: list[dict[str, float]] = []
    while len(rows) < pilots:
        sd = math.exp(rng.uniform(math.log(SPREAD[0]), math.log(SPREAD[1])))
        pilot = draw(cell, sd, rng)
        if 0.8 <= cell.effect / pilot.sd_difference <= 2:
            rows.append(outcome(cell, pilot, sd, rng))
    edges = np.quantile([row["printed"] for row in rows], [0.25, 0.5, 0.75])
    bins = np.searchsorted(edges, [row["printed"] for row in rows])
    means = ("printed", "power", "shown", "assured", "floored")
    table = [
        {"plans": len(members), **{name: float(np.mean([row[name] for row in members])) for name in means}}
        for number in range(4)
        if (members := [row for row, member in zip(rows, bins) if member == number])
    ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pilots", type=int, default=2_000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    started, cells, bins = time.perf_counter(), [], []
    for cell in BINNED:
        found = calibrate(cell, arguments.pilots)
        bins += [{**asdict(cell), **row} for row in found]
        print(cell, [(round(row["printed"], 3), round(row["power"], 3)) for row in found], flush=True)
    for cell in CELLS:
        means = simulate(cell, arguments.pilots)
        cells.append({**asdict(cell), **means})
        print(cell, {name: round(value, 3) for name, value in means.items()}, flush=True)
    result: dict[str, Any] = {
        "pilots": arguments.pilots,
        "largest_gap_of_bins": max(abs(row["printed"] - row["power"]) for row in bins),
        "largest_overstatement": max(row["printed"] - row["power"] for row in cells),
        "least_assured": min(row["assured"] for row in cells),
        "bins": bins,
        "cells": cells,
    }
    write_report(arguments.output, result, started)
    print({name: round(value, 3) for name, value in result.items() if isinstance(value, float)}, arguments.output)


if __name__ == "__main__":
    main()
