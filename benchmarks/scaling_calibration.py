"""Calibration of scaling laws: whether intervals of exponents and of predicted differences hold the truth.

    python benchmarks/scaling_calibration.py --laws 1000

Laws with and without a floor are drawn over sizes a factor 3 apart, with normal noise over seeds in log loss of which
arm and baseline share a part (rho 1/2). Counted: how often the interval of the exponent holds the true one, and how
often the prediction interval of the paired difference at 10 times the largest size holds the true difference. The
scenarios are our own definition. Results go to results/calibration/scaling.json.
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

from workbench.ablation.analysis.scaling import MIN_POINTS, fit_paired_law, fit_scaling_law

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "scaling.json"
REACH = 10.0
"""Predictions are made at this factor beyond the largest size."""


@dataclass(frozen=True)
class Case:
    """A true law, and how it is measured."""

    sizes: int
    seeds: int
    floor: float
    noise: float = 0.002
    """Relative sd over seeds."""
    exponents: tuple[float, float] = (0.28, 0.25)
    """Of arm and baseline; the losses at the smallest size are equal."""
    factor: float = 3.0
    """Between sizes."""

    def loss(self, arm: int, x: float) -> float:
        return self.floor + 2.0 * x ** -self.exponents[arm]

    def draw(self, rng: np.random.Generator) -> dict[float, tuple[list[float], list[float]]]:
        """Losses of arm and baseline at every size."""
        values = {}
        for x in self.factor ** np.arange(self.sizes):
            shared = rng.normal(size=self.seeds)
            logs = [math.sqrt(0.5) * (shared + rng.normal(size=self.seeds)) for _ in range(2)]
            values[float(x)] = tuple((self.loss(arm, x) * np.exp(self.noise * logs[arm])).tolist() for arm in (0, 1))
        return values


CASES = [Case(sizes, seeds, floor) for sizes, seeds, floor in itertools.product((3, 4, 6), (3, 8), (0.0, 0.6))]


def simulate(case: Case, laws: int, seed: int = 0) -> dict[str, float | None]:
    """Coverage of the exponent, and of the difference at ``REACH``; None where no interval is given. Also the median
    length of the prediction interval relative to the true difference."""
    rng = np.random.default_rng([seed, case.sizes, case.seeds, int(10 * case.floor)])
    exponents, predictions, lengths = [], [], []
    target = REACH * case.factor ** (case.sizes - 1)
    truth = case.loss(0, target) - case.loss(1, target)
    for _ in range(laws):
        values = case.draw(rng)
        law = fit_scaling_law({x: losses[0] for x, losses in values.items()}, replicates=200)
        if law.exponent_low is not None and law.exponent_high is not None:
            exponents.append(law.exponent_low <= case.exponents[0] <= law.exponent_high)
        if case.sizes >= MIN_POINTS:
            predicted = fit_paired_law(values, replicates=400).at(target)
            assert predicted.low is not None and predicted.high is not None
            predictions.append(predicted.low <= truth <= predicted.high)
            lengths.append((predicted.high - predicted.low) / abs(truth))
    return {
        "exponent": float(np.mean(exponents)) if exponents else None,
        "prediction": float(np.mean(predictions)) if predictions else None,
        "length": float(np.median(lengths)) if lengths else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laws", type=int, default=1_000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    started, rows = time.perf_counter(), []
    for case in CASES:
        found = simulate(case, arguments.laws)
        rows.append({**asdict(case), **found})
        print(case, found, flush=True)
    least = {name: min(row[name] for row in rows if row[name] is not None) for name in ("exponent", "prediction")}
    result: dict[str, Any] = {
        "laws": arguments.laws,
        "least_coverage": least,
        "cases": rows,
    }
    write_report(arguments.output, result, started)
    print(f"least coverage {least}: {arguments.output}")


if __name__ == "__main__":
    main()
