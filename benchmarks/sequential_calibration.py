"""Calibration of the sequential designs: how often any look makes a false claim, and how many seeds a design takes.

    python benchmarks/sequential_calibration.py

Ablations are drawn from a normal model: arms share the baseline's noise (rho 0.5), and the first arm has the effect.
The rule is applied to many at once; a part of them also goes through the steps of a running ablation one by one: the
seeds of the next look, the verdict at that look (workbench.ablation.verdict.judge), the arms that stop
(workbench.ablation.verdict.sequential). The scenarios are our own definitions. The result goes to
results/calibration/sequential.json.

Legend: R ablations, A arms with the baseline, S seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import exact_rate, write_report
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import special

from workbench.ablation.spec.ablation import AblationConfig
from workbench.ablation.verdict.comparison import ArmMeasurements
from workbench.ablation.verdict.judge import judge
from workbench.ablation.verdict.sequential import (
    Look,
    arm_readings,
    decided,
    log_e_value,
    readings,
    seeds_needed_now,
)
from workbench.ablation.verdict.statistics import Floats

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "sequential.json"
SIZE_D = np.ones(1)
LEVEL = 100.0
"""Mean of every arm without an effect; far from the bounds of any metric."""


@dataclass(frozen=True)
class Scenario:
    """How the tables of a simulated ablation are drawn. The sd of paired differences is 1."""

    name: str
    stopping: Any
    arms: int = 1
    seeds: int = 8
    effect: float = 0.0
    """True difference of the first arm, in units of the sd of paired differences."""
    margin: float | None = None
    """Equivalence margin, in the same unit."""

    def config(self) -> AblationConfig:
        """The ablation that declares this design."""
        return AblationConfig.parse(
            {
                "name": "simulated",
                "arms": {f"arm{number}": {} for number in range(self.arms + 1)},
                "confirmation": {"seeds": list(range(self.seeds))},
                "protocol": {"stopping": self.stopping},
                "margin": self.margin,
                "tuning": {"seed": 10_000},
            }
        )


DESIGNS: tuple[tuple[str, Any, int], ...] = (
    ("fixed", "fixed", 8),
    ("looks 4, 6, 8", {"looks": [4, 6, 8]}, 8),
    ("anytime, to 20", {"anytime": True}, 20),
)

SCENARIOS = (
    *(
        Scenario(name, stopping, arms, seeds, effect)
        for name, stopping, seeds in DESIGNS
        for arms in (1, 3, 6)
        for effect in (0.0, 1.5, 2.5)
    ),
    *(
        Scenario(f"{name}, margin 2 sd", stopping, 1, seeds, effect, margin=2.0)
        for name, stopping, seeds in DESIGNS
        for effect in (0.0, 2.0)
    ),
)


def simulate(config: AblationConfig, values_AS: Floats) -> tuple[dict[str, str], dict[str, int]]:
    """One ablation from its first look to its end.

    Args:
        config: with a fixed or a sequential design.
        values_AS: (A, S), the metric of every arm and seed, the baseline first.

    Returns:
        arm -> word; arm -> seeds it was run on, the baseline included.
    """
    taken: list[Look] = []
    while True:
        needed = seeds_needed_now(config, taken)
        declared = readings(config, taken)
        look = Look(declared[len(taken)].seeds, {})
        measured = [
            ArmMeasurements(arm, {seed: row_S[seed : seed + 1] for seed in range(needed[arm])}, SIZE_D)
            for arm, row_S in zip(config.order, values_AS, strict=True)
        ]
        verdict = judge(
            measured[0],
            measured[1:],
            alpha=config.alpha,
            margin=config.margin,
            seeds=config.planned_seeds,
            replicates=0,
            readings=arm_readings(config, [*taken, look]),
        )
        words = {row.arm: row.verdict for row in verdict.rows[1:]}
        taken.append(Look(look.seeds, words))
        if len(taken) == len(declared) or set(decided(taken)) == set(words):
            return words, needed


def draw(scenario: Scenario, ablations: int, rng: Generator) -> Floats:
    """The metric of every ablation, arm and seed, (R, A, S), the baseline first."""
    values_RAS = LEVEL + math.sqrt(0.5) * rng.normal(size=(ablations, scenario.arms + 1, scenario.seeds))
    values_RAS[:, 1] += scenario.effect
    return values_RAS


def words_of(scenario: Scenario, values_RAS: Floats) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """The rule of :func:`simulate` on many ablations at once: words (R, A − 1) and seeds (R, A).

    Holm's procedure of one direction in terms of levels: with r arms claimed before in this direction, the i-th
    smallest one-sided p among the open arms, i from 0, is compared with half the look's level for
    alpha / (arms − r − i). One arm may have a margin.
    """
    config, arms = scenario.config(), scenario.arms
    difference_RAS = values_RAS[:, 1:] - values_RAS[:, :1]
    words_RA = np.full(difference_RAS.shape[:2], "undecided", dtype="U10")
    seeds_RA = np.full(difference_RAS.shape[:2], config.looks[-1])
    for reading in readings(config):
        n = reading.seeds
        mean_RA = difference_RAS[..., :n].mean(-1)
        error_RA = difference_RAS[..., :n].std(-1, ddof=1) / math.sqrt(n)
        open_RA, now_RA = words_RA == "undecided", np.zeros(words_RA.shape, bool)
        if scenario.margin is not None:  # goes first
            reach_RA = -special.stdtrit(n - 1, reading.nominal(2 * config.alpha) / 2) * error_RA
            now_RA = open_RA & (np.abs(mean_RA) + reach_RA < scenario.margin)
            words_RA, open_RA = np.where(now_RA, "equivalent", words_RA), open_RA & ~now_RA
        levels = np.array([0.0, *(reading.nominal(config.alpha / size) / 2 for size in range(1, arms + 1))])
        for side, word in ((1, "worse"), (-1, "better")):
            p_RA = np.where(open_RA, special.stdtr(n - 1, -side * mean_RA / error_RA), 2.0)
            order_RA = p_RA.argsort(1)
            claimed_R = (words_RA == word).sum(1, keepdims=True)
            sizes_RA = np.maximum(arms - claimed_R - np.arange(arms), 0)
            passed_RA = np.logical_and.accumulate(np.take_along_axis(p_RA, order_RA, 1) <= levels[sizes_RA], axis=1)
            claims_RA = np.zeros_like(open_RA)
            np.put_along_axis(claims_RA, order_RA, passed_RA, 1)
            words_RA, now_RA = np.where(claims_RA, word, words_RA), now_RA | claims_RA
        seeds_RA = np.where(now_RA, n, seeds_RA)
    return words_RA, np.concatenate([seeds_RA.max(1, keepdims=True), seeds_RA], axis=1)


def calibrate(scenario: Scenario, ablations: int = 20_000, checked: int = 100, seed: int = 0) -> dict[str, Any]:
    """Rates with exact intervals, and mean numbers of seeds of the first arm and of all arms.

    ``false``: an arm without an effect is better or worse, the first arm has the wrong sign, or it differs by the
    margin and is equivalent. ``detected``: the first arm is worse. ``equivalent``: the first arm is.

    Args:
        ablations: drawn and decided at once (:func:`words_of`).
        checked: how many of them also go through the public entry points, one by one; ``differing`` counts those whose
            words or seeds differ.
    """
    values_RAS = draw(scenario, ablations, np.random.default_rng(seed))
    words_RA, seeds_RA = words_of(scenario, values_RAS)
    config, differing = scenario.config(), 0
    for values_AS, row_A, seeds_A in zip(values_RAS[:checked], words_RA, seeds_RA):
        words, seeds = simulate(config, values_AS)
        differing += list(words.values()) != row_A.tolist() or list(seeds.values()) != seeds_A.tolist()
    different_RA = (words_RA == "better") | (words_RA == "worse")
    first_R = words_RA[:, 0]
    false_R = different_RA[:, 1:].any(1) | (first_R == "better") if scenario.effect else different_RA.any(1)
    if scenario.margin is not None and scenario.effect >= scenario.margin:
        false_R |= first_R == "equivalent"
    counts = {"false": false_R, "detected": first_R == "worse", "equivalent": first_R == "equivalent"}
    return {
        **asdict(scenario),
        "rates": {name: exact_rate(rows_R.sum(), ablations) for name, rows_R in counts.items()},
        "mean_seeds_of_first_arm": float(seeds_RA[:, 1].mean()),
        "mean_seeds_of_all_arms": float(seeds_RA.mean()),
        "checked": checked,
        "differing": differing,
    }


def continuous(
    seeds: int, paths: int = 20_000, scale: float = 2.0, alpha: float = 0.05, seed: int = 0
) -> dict[str, Any]:
    """The anytime-valid test alone, read after every seed from the second to the last: how often it ever rejects a true
    null, at either side and at the upper side of a test at 2 alpha (which equivalence rests on)."""
    x_RS = np.random.default_rng(seed).normal(size=(paths, seeds))
    n_S = np.arange(1, seeds + 1)
    mean_RS = x_RS.cumsum(1) / n_S
    sd_RS = np.sqrt(np.maximum((x_RS**2).cumsum(1) - n_S * mean_RS**2, 0)[:, 1:] / n_S[:-1])
    t_RS = mean_RS[:, 1:] / (sd_RS / np.sqrt(n_S[1:]))
    log_e_RS = np.vectorize(log_e_value)(t_RS, n_S[1:], scale)
    upper = ((log_e_RS >= -math.log(2 * alpha)) & (t_RS > 0)).any(1).sum()
    return {
        "seeds": seeds,
        "scale": scale,
        "ever_rejects": exact_rate((log_e_RS >= -math.log(alpha)).any(1).sum(), paths),
        "ever_rejects_upper_at_2_alpha": exact_rate(upper, paths),
    }


def write(output: Path, ablations: int, checked: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Calibrate every scenario and write the JSON file ``output``."""
    started, rows = time.perf_counter(), []
    for number, scenario in enumerate(SCENARIOS):
        rows.append(calibrate(scenario, ablations, checked, number))
        numbers = ", ".join(f"{name} {value['rate']:.4f}" for name, value in rows[-1]["rates"].items())
        about = f"{scenario.name}, {scenario.arms} arms, effect {scenario.effect:g}"
        seeds = f"{rows[-1]['mean_seeds_of_first_arm']:.2f} seeds, {rows[-1]['mean_seeds_of_all_arms']:.2f} of all arms"
        progress(f"{about}: {numbers}, {seeds}; {rows[-1]['differing']} of {checked} differ")
    report = {
        "designs": rows,
        "continuous": [continuous(seeds) for seeds in (20, 50)],
        "alpha": 0.05,
        "intervals": "exact (Clopper-Pearson), 95 %",
    }
    write_report(output, report, started)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file of the result")
    parser.add_argument("--ablations", type=int, default=20_000, help="per scenario")
    parser.add_argument("--checked", type=int, default=100, help="of them, through the public entry points")
    options = parser.parse_args()
    write(options.output, options.ablations, options.checked, lambda line: print(line, file=sys.stderr, flush=True))
    print(options.output)


if __name__ == "__main__":
    main()
